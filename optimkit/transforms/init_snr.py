"""SGD-SaI's factors: one a block, from the signal-to-noise ratio of its first gradient."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.layout import select_leaves
from optimkit.leaves import (
    check_match,
    check_real,
    check_structure,
    matching_leaves,
    narrow_like,
    widen,
)
from optimkit.numerics import check_choice, check_range, compute_dtype, in_turn, safe_div, safe_norm
from optimkit.protocols import (
    Array,
    GradientTransformation,
    LeafSelector,
    Method,
    PyTree,
    transformation,
)


class ScaleByInitSnrState(NamedTuple):
    """``factor``: f32, the measured ratio. ``seen``: bool, whether it has been measured.

    One scalar a leaf each; for a stacked leaf one a layer, with axes of size one.
    """

    factor: PyTree
    seen: PyTree


def _ratio(g: Array, eps: Any, stacked: bool) -> Array:
    """Norm over standard deviation (of the sample, n - 1) of a gradient, or of its layers."""
    axes = tuple(range(1, g.ndim)) if stacked else None
    count = math.prod(g.shape[stacked:])
    norm = safe_norm(g, axes, keepdims=stacked)
    centred = g - jnp.sum(g / max(count, 1), axis=axes, keepdims=True)
    deviation = safe_norm(centred, axes, keepdims=stacked) / math.sqrt(max(count - 1, 1))
    return safe_div(norm, deviation + eps)


def _over_largest(scales: PyTree) -> PyTree:
    leaves = [jnp.max(s, initial=0) for s in jax.tree.leaves(scales)]
    if not leaves:
        return scales
    largest = jnp.max(jnp.stack(leaves))
    return jax.tree.map(lambda s: safe_div(s, largest.astype(s.dtype)), scales)


def init_snr(grads: PyTree, eps: Any = 1e-8, normalize: bool = False) -> PyTree:
    r"""The signal-to-noise ratio of every leaf: its norm over its entries' standard deviation.

    .. math:: G = \frac{\|g\|_2}{\sigma(g) + \epsilon}, \qquad
        \sigma^2 = \tfrac{1}{n-1}\textstyle\sum_i (g_i - \bar g)^2

    Args:
      grads: a tree of gradients.
      eps: added to the deviation, > 0. Where all entries are equal, or there is but one, it is the
        whole denominator.
      normalize: divide all ratios by the largest.

    Returns:
      A tree of scalars, f32 at least. About the root of the leaf's size where the mean is near
      zero, and more where the entries share a sign; zero for a zero gradient.

    >>> import jax.numpy as jnp
    >>> ratios = init_snr({"a": jnp.array([1.0, -1.0, 1.0, -1.0]), "b": jnp.array([3.0, 4.0])})
    >>> round(float(ratios["a"]), 4), round(float(ratios["b"]), 4)  # 2 / sqrt(4/3), 5 / sqrt(1/2)
    (1.7321, 7.0711)

    Reference: Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need",
    2024, arXiv 2412.11768.
    """
    ratios = jax.tree.map(lambda g: _ratio(g, eps, False), widen(grads))
    return _over_largest(ratios) if normalize else ratios


def scale_by_init_snr(
    eps: Any = 1e-8,
    *,
    normalize: bool = False,
    probe: Literal["raw"] | None = None,
    wait_for_nonzero: bool = False,
    max_factor: Any = math.inf,
    stacked_leaves: LeafSelector = None,
) -> GradientTransformation:
    r"""Multiplies every leaf by the signal-to-noise ratio of its first gradient, for ever.

    At the first update ``init_snr`` measures :math:`G = \|g\| / (\sigma(g) + \epsilon)` for every
    leaf; that update and all later ones are multiplied by it.

    Args:
      eps: added to the deviation, > 0; 1e-8 is the authors'.
      normalize: divide the factors by the largest of the tree, as the paper's algorithm says and
        the authors' code does not; the rate must then be larger by as much.
      probe: what is measured: the incoming updates, or, with ``"raw"``, the extra argument
        ``grad``, where this link stands behind a momentum.
      wait_for_nonzero: measure each leaf at its first gradient that is not zero. The authors'
        rule gives a leaf whose first gradient is zero, such as LoRA's A, the factor zero for ever.
      max_factor: largest factor, > 0. Infinity, the authors' rule, sets no limit.
      stacked_leaves: leaves whose first axis numbers layers, as of scanned layers: a tree of
        bools, ``(path, leaf) -> bool``, or path patterns. Each layer is then a block of its own.
        Default: none.

    Returns:
      A transformation for anywhere in a chain. It keeps two scalars a leaf. Inside ``shard_map``
      each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or ``grad`` is
        missing where ``probe="raw"`` needs it.

    A leaf of one entry, or of equal entries, has no deviation: its factor is norm / eps, 1e8 times
    the gradient. Set ``max_factor``, or leave such leaves out with ``optax.masked``. A first
    gradient that is not finite spoils the factor for good: put a guard in front.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_init_snr()
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([3.0, 4.0], [1.0, 0.0]):
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> [round(float(u), 4) for u in updates]  # 5 / sqrt(1/2), from the first gradient
    [7.0711, 0.0]

    Reference: Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need",
    2024, arXiv 2412.11768. Agrees with the authors' code (``gsnr/`` of ``sgd_sai__*``).
    """
    check_range(eps=eps, max_factor=max_factor, gt=0)
    if probe is not None:
        check_choice(("raw",), probe=probe)

    def init(params: PyTree) -> ScaleByInitSnrState:
        stacked = select_leaves(
            stacked_leaves, params, default=lambda name, leaf: False, argument="stacked_leaves"
        )

        def zeros(p: Any, stacked: bool, dtype: Any = None) -> Array:
            shape = jnp.shape(p)
            shape = (*shape[:1], *[1] * len(shape[1:])) if stacked else ()
            return jnp.zeros(shape, dtype or compute_dtype(p))

        return ScaleByInitSnrState(
            jax.tree.map(zeros, params, stacked),
            jax.tree.map(lambda p, s: zeros(p, s, bool), params, stacked),
        )

    def update(
        updates: PyTree,
        state: ScaleByInitSnrState,
        params: PyTree | None = None,
        *,
        grad: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByInitSnrState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        check_structure(updates, state.factor, what="gradient", like="the state")
        if probe is None:
            raw = updates
        elif grad is None:
            raise ValueError(
                'probe="raw" needs the gradient: call update(updates, state, params, grad=gradient)'
            )
        else:
            raw = matching_leaves(grad, updates, what="grad")

        def measure(state: ScaleByInitSnrState) -> ScaleByInitSnrState:
            turn: Array | None = None

            def ratio(g: Array, old: Array, seen: Array) -> Array:
                nonlocal turn
                new = _ratio(in_turn(g, turn), eps, stacked=old.ndim > 0)
                turn = jnp.max(new, initial=0)
                return jnp.where(seen, old, new).astype(old.dtype)

            def decided(seen: Array, ratio: Array) -> Array:
                return seen | (ratio != 0) if wait_for_nonzero else jnp.ones_like(seen)

            scale = jax.tree.map(ratio, widen(raw), *state)
            return ScaleByInitSnrState(scale, jax.tree.map(decided, state.seen, scale))

        flags = [jnp.all(seen) for seen in jax.tree.leaves(state.seen)]
        if flags:
            # Later steps read the gradient once, not four times.
            done = jnp.all(jnp.stack(flags))
            state = jax.lax.cond(done, lambda state: state, measure, state)
        factors = jax.tree.map(lambda s: jnp.minimum(s, max_factor), state.factor)
        if normalize:
            factors = _over_largest(factors)
        new = jax.tree.map(lambda u, f: u * f.astype(u.dtype), widen(updates), factors)
        return narrow_like(new, updates), state

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_init_snr,
    kind="piece",
    summary="a factor a leaf, from the signal-to-noise ratio of its first gradient",
    example={"max_factor": 100.0},
    traced=("eps", "max_factor"),
    static=("normalize", "probe", "wait_for_nonzero", "stacked_leaves"),
    position="any",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need", '
    "2024, arXiv 2412.11768",
    reference="AnonymousAlethiometer/SGD_SaI@e21308038ddb46b98b1cc61550bf182fd454de18:"
    "sgd_sai/sgd_sai.py:SGD_sai",
    licence="Apache-2.0",
)
