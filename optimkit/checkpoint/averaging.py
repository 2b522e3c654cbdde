"""Averages of saved checkpoints: what a decay would have done, after the fact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.checkpoint.sequence import Checkpoints
from optimkit.leaves import check_match
from optimkit.numerics import check_choice, check_count, check_range, compute_dtype
from optimkit.protocols import PyTree

SCHEMES = ("sma", "wma", "ema", "ema_recursive", "custom")


def checkpoint_weights(n: int, *, scheme: str, alpha: Any = 0.2) -> np.ndarray:
    r"""The weight of each of n checkpoints, oldest first; they sum to 1.

    ================= ===========================================================
    ``sma``           :math:`1/n`
    ``wma``           :math:`2i/(n(n+1))`
    ``ema``           :math:`\propto (1-\alpha)^{n-i}`, a truncated exponential average
    ``ema_recursive`` :math:`m_1 = c_1`, :math:`m_i = \alpha c_i + (1-\alpha) m_{i-1}`
    ================= ===========================================================

    Args:
      n: how many, >= 1.
      scheme: one of the above.
      alpha: weight of the newest, in (0, 1], for the last two.

    Returns:
      A float64 NumPy array of n weights.

    Raises:
      ValueError: if an argument is out of range.

    The two exponential averages differ a lot in a short window: of 6 with alpha 0.2, the oldest has
    weight 0.09 in ``ema`` and 0.33 in ``ema_recursive``.

    >>> checkpoint_weights(3, scheme="ema", alpha=0.5).round(4).tolist()
    [0.1429, 0.2857, 0.5714]
    >>> checkpoint_weights(3, scheme="ema_recursive", alpha=0.5).tolist()
    [0.25, 0.25, 0.5]
    """
    check_count(least=1, n=n)
    check_choice(SCHEMES[:-1], scheme=scheme)
    check_range(alpha=alpha, gt=0, le=1)
    age = np.arange(n - 1, -1, -1, dtype=np.float64)
    if scheme == "sma":
        weights = np.ones(n)
    elif scheme == "wma":
        weights = n - age
    else:
        weights = (1 - float(alpha)) ** age
        if scheme == "ema_recursive":
            weights[1:] *= float(alpha)
    return weights / np.sum(weights)


def decay_equivalent_weights(decay_factors: Sequence[float]) -> np.ndarray:
    r"""The checkpoint weights that do what a decaying rate would have done.

    Take updates :math:`u_1 \dots u_K` at a constant rate after :math:`c_0`. Averaging
    :math:`c_0 \dots c_K` with weights a equals scaling the updates by
    :math:`f_i = \sum_{j \ge i} a_j`; so :math:`a_j = f_j - f_{j+1}` with :math:`f_0 = 1`,
    :math:`f_{K+1} = 0`.

    Args:
      decay_factors: :math:`f_1 \dots f_K`, the decayed rates over the constant one.

    Returns:
      A float64 NumPy array of K + 1 weights, oldest checkpoint first; they sum to 1. They are
      >= 0 where the factors do not rise and stay in [0, 1].

    Raises:
      ValueError: if the factors are no finite list of numbers.

    Exact only as far as the gradients would have been the same.

    >>> decay_equivalent_weights([0.75, 0.5, 0.25]).tolist()  # a linear decay is a plain mean
    [0.25, 0.25, 0.25, 0.25]

    Reference: Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
    Pre-training", 2025, arXiv 2507.17634.
    """
    factors = np.asarray(decay_factors, np.float64)
    if factors.ndim != 1 or not np.all(np.isfinite(factors)):
        raise ValueError(f"decay_factors must be a list of finite numbers, got {decay_factors!r}")
    return -np.diff(np.concatenate([[1.0], factors, [0.0]]))


def average_checkpoints(
    checkpoints: Iterable[PyTree],
    *,
    scheme: str = "ema",
    alpha: Any = 0.2,
    weights: Sequence[float] | None = None,
    skip_non_finite: bool = False,
) -> PyTree:
    """One set of parameters from several, oldest first.

    Args:
      checkpoints: trees of the same structure and shapes, at least one.
      scheme: ``"sma"``, ``"wma"``, ``"ema"`` or ``"ema_recursive"`` (see ``checkpoint_weights``),
        or ``"custom"``.
      alpha: for the exponential schemes. 0.2 over the last 6 checkpoints is what is reported of Luo
        et al.; which of the two schemes they use is not established.
      weights: with ``"custom"`` one number a checkpoint; they are divided by their sum.
      skip_non_finite: leave out checkpoints with NaN or infinity, which would poison the average.
        Their custom weights go with them.

    Returns:
      A tree like the newest checkpoint. Sums are made in f32 or better; integer and bool leaves are
      copies of the newest.

    Raises:
      ValueError: if there are no checkpoints, their trees differ, an argument is out of range, or
        the number or the sum of the weights is wrong.

    Statistics of BatchNorm are averaged like the rest where they are in the tree; taking them anew
    at the average is the safer way.

    >>> import jax.numpy as jnp
    >>> average_checkpoints([jnp.array([1.0]), jnp.array([4.0])], scheme="wma").tolist()
    [3.0]

    Reference: Luo et al., "How Learning Rate Decay Wastes Your Best Data in Curriculum-Based LLM
    Pretraining", ICLR 2026, arXiv 2511.18903; Li et al., "Model Merging in Pre-training of Large
    Language Models", 2025, arXiv 2505.12082.
    """
    reads = [lambda tree=tree: tree for tree in checkpoints]
    return _average(reads, scheme, alpha, weights, skip_non_finite)


def average_saved(
    checkpoints: Checkpoints,
    target: PyTree,
    *,
    steps: Sequence[int] | None = None,
    last: int | None = None,
    name: str = "params",
    scheme: str = "ema",
    alpha: Any = 0.2,
    weights: Sequence[float] | None = None,
    skip_non_finite: bool = False,
) -> PyTree:
    """``average_checkpoints`` of what one run has saved; two trees are in memory at a time.

    Args:
      checkpoints: the run's ``Checkpoints``; its ``keep`` must have let enough of them stand.
      target: what the tree looks like, as in ``restore``.
      steps: which, ascending; default all that there are.
      last: only the newest so many of these; 6 is reported of Luo et al.
      name: under which name the tree was saved.
      scheme: as in ``average_checkpoints``, like the arguments that follow.
      alpha: of the exponential schemes.
      weights: of the scheme ``"custom"``.
      skip_non_finite: leave out checkpoints with NaN or infinity, which are then read twice.

    Returns:
      A tree like ``target``.

    Raises:
      ValueError: as ``average_checkpoints`` does.
      DamagedCheckpoint: if one of them cannot be read, and as in ``Checkpoints.restore``.

    >>> import tempfile, jax.numpy as jnp
    >>> saved = Checkpoints(tempfile.mkdtemp(), keep=3)
    >>> for step in (1, 2, 3):
    ...     _ = saved.save(step, params={"w": jnp.full(2, 10.0 * step)})
    >>> average_saved(saved, {"w": jnp.zeros(2)}, last=2, scheme="sma")["w"].tolist()
    [25.0, 25.0]
    """
    check_count(least=1, last=1 if last is None else last)
    chosen = list(checkpoints.steps() if steps is None else steps)
    if last is not None and len(chosen) < last:
        raise ValueError(f"last={last} checkpoints were asked for, and there are {len(chosen)}")
    chosen = chosen[-last:] if last is not None else chosen

    def read(step: int) -> PyTree:
        return checkpoints.restore(step, **{name: target}).trees[name]

    reads = [lambda step=step: read(step) for step in chosen]
    return _average(reads, scheme, alpha, weights, skip_non_finite)


def _average(
    reads: list[Callable[[], PyTree]],
    scheme: str,
    alpha: Any,
    weights: Sequence[float] | None,
    skip_non_finite: bool,
) -> PyTree:
    check_choice(SCHEMES, scheme=scheme)
    if (weights is not None) != (scheme == "custom"):
        raise ValueError(f"weights go with scheme='custom' and only there, got scheme={scheme!r}")
    given = None if weights is None else np.asarray(weights, np.float64)
    if given is not None and given.shape != (len(reads),):
        raise ValueError(
            f"weights must be {len(reads)} numbers, one a checkpoint, got shape {given.shape}"
        )
    if skip_non_finite:
        kept = [index for index, read in enumerate(reads) if _finite(read())]
        reads = [reads[index] for index in kept]
        given = None if given is None else given[kept]
    if not reads:
        raise ValueError(
            "there are no checkpoints to average" + " that are finite" * skip_non_finite
        )
    if given is None:
        given = checkpoint_weights(len(reads), scheme=scheme, alpha=alpha)
    total = np.sum(given)
    if not np.isfinite(total) or total == 0:
        raise ValueError(f"weights must have a finite sum other than 0, got {given.tolist()}")

    newest = reads[-1]()
    average = _add(None, newest, given[-1] / total)
    for read, weight in zip(reads[:-1], given[:-1] / total, strict=True):
        tree = read()
        check_match(tree, newest, what="checkpoint", like="the newest one")
        average = _add(average, tree, weight)
    return jax.tree.map(
        lambda a, x: jnp.asarray(a, jnp.result_type(x)) if _summed(x) else x, average, newest
    )


def _summed(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _finite(tree: PyTree) -> bool:
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree) if _summed(x))


def _add(total: PyTree | None, tree: PyTree, weight: float) -> PyTree:
    def term(x: Any) -> Any:
        return jnp.asarray(x, compute_dtype(x)) * weight if _summed(x) else x

    if total is None:
        return jax.tree.map(term, tree)
    return jax.tree.map(lambda a, x: a + term(x) if _summed(x) else a, total, tree)
