"""Normalize-and-Project for the scale and offset of normalisation layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import named_leaves, path_name
from optimkit.leaves import check_match, check_real, require_params, zero_count
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    compute_dtype,
    due,
    narrow,
    next_count,
    safe_div,
    safe_norm,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation

MODES = ("joint", "decay")

Pair: TypeAlias = tuple[str, str | None]
"""Paths of a scale and of the offset beside it, if there is one."""

Pairs: TypeAlias = Iterable[Pair] | Callable[[PyTree], Iterable[Pair]] | None


class ProjectScaleOffsetState(NamedTuple):
    """``count``: int32 scalar."""

    count: Array


def default_pairs(params: PyTree) -> list[Pair]:
    """Every leaf called ``scale`` with the ``bias`` of the same shape beside it, as in Flax.

    >>> import numpy as np
    >>> default_pairs({"norm": {"scale": np.ones(3), "bias": np.zeros(3)}, "rms": {"scale": 1.0}})
    [('norm/scale', 'norm/bias')]
    """
    shapes = {name: np.shape(leaf) for name, leaf in named_leaves(params)}
    pairs: list[Pair] = []
    for name, shape in shapes.items():
        parent, _, last = name.rpartition("/")
        if last != "scale" or not shape:
            continue
        bias = f"{parent}/bias" if parent else "bias"
        pairs.append((name, bias if shapes.get(bias) == shape else None))
    return pairs


def project_scale_offset(
    *,
    every: int = 1,
    mode: Literal["joint", "decay"] = "joint",
    pairs: Pairs = None,
    decay: Any = 0.0,
) -> GradientTransformation:
    r"""Holds the scales s and offsets b of normalisation layers where they began: near 1 and 0.

    With d features, after the step that other links propose, at every n-th step:

    .. math::

        \text{joint:} \quad & (s, b) \leftarrow (s, b)\, \sqrt{\frac{d}{\|s\|^2 + \|b\|^2}} \\
        \text{decay:} \quad & s \leftarrow s - \lambda (s - 1), \quad b \leftarrow (1 - \lambda)\, b

    The joint form leaves the network's function as it is only if what follows is positively
    homogeneous, such as ReLU; otherwise use decay.

    Args:
      every: act at every so many updates, >= 1, the first time at update number ``every``.
      mode: ``"joint"`` or ``"decay"``.
      pairs: ``(scale path, offset path or None)`` for each layer, or a function of the parameters
        that gives them. Default: every leaf called ``scale``, with the ``bias`` beside it.
      decay: lambda, in [0, 1], of mode ``"decay"``; not multiplied by the rate.

    Returns:
      A transformation for the very end of a chain, after the rate and the decay; it needs
      ``params``. Its state is one int32. Inside ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, params are missing, a gradient has another shape,
        or a path of ``pairs`` names no leaf.

    The features are the last axis: layers stacked along others are projected each on its own. Where
    scale and offset would both be zero, or not finite, the step stays as it is. Which of the two
    forms the paper's experiments used is not known to us.

    >>> import jax.numpy as jnp
    >>> tx = project_scale_offset()
    >>> w = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    >>> u = {"scale": jnp.array([2.0, -1.0]), "bias": jnp.array([0.0, 4.0])}  # to (3, 0), (0, 4)
    >>> u, _ = tx.update(u, tx.init(w), w)
    >>> [round(float(x), 3) for x in (w["scale"] + u["scale"])]  # norm 5 becomes sqrt(2)
    [0.849, 0.0]

    Reference: Lyle et al., "Normalization and effective learning rates in reinforcement learning",
    NeurIPS 2024, arXiv 2407.01800, of which no code is public. The radius sqrt(d) is that of
    s = 1, b = 0; one third-party code has sqrt(2) at any d.
    """
    check_count(every=every, least=1)
    check_choice(MODES, mode=mode)
    check_range(decay=decay, ge=0, le=1)

    def chosen(params: PyTree) -> list[Pair]:
        given = default_pairs if pairs is None else pairs
        found = list(given(params) if callable(given) else given)
        names = [name for name, _ in named_leaves(params)]
        for path in (path for pair in found for path in pair if path is not None):
            # An empty tree has nothing to match (optax.tree_map_params inits on one).
            if names and path not in names:
                raise ValueError(f"pairs: {path!r} is none of the leaves {names}")
        return found

    def init(params: PyTree) -> ProjectScaleOffsetState:
        chosen(params)
        return ProjectScaleOffsetState(zero_count())

    def project(moved: list[Array]) -> list[Array]:
        """The new scale, and the new offset if there is one."""
        if mode == "decay":
            return [x - decay * (x - start) for x, start in zip(moved, (1, 0), strict=False)]
        features = moved[0].shape[-1]
        joined = jnp.concatenate(moved, axis=-1)
        factor = safe_div(jnp.sqrt(float(features)), safe_norm(joined, (-1,), keepdims=True))
        # Zero where the norm is zero or infinite; NaN is not above zero.
        return [jnp.where(factor > 0, x * factor.astype(x.dtype), x) for x in moved]

    def update(
        updates: PyTree,
        state: ProjectScaleOffsetState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ProjectScaleOffsetState]:
        del extra
        params = require_params(params, "project_scale_offset")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        count = next_count(state.count)
        now = due(count, every)
        steps, weights = dict(named_leaves(updates)), dict(named_leaves(params))
        for pair in chosen(params):
            names = [name for name in pair if name is not None and name in weights]
            if not names or np.size(weights[names[0]]) == 0:
                continue
            wide = compute_dtype(*(weights[n] for n in names), *(steps[n] for n in names))
            old = [jnp.asarray(weights[n], wide) for n in names]
            step = [jnp.asarray(steps[n], wide) for n in names]
            new = project([w + u for w, u in zip(old, step, strict=True)])
            for name, w, u, x in zip(names, old, step, new, strict=True):
                steps[name] = narrow(jnp.where(now, x - w, u), jnp.result_type(steps[name]))
        updates = jax.tree_util.tree_map_with_path(lambda path, _: steps[path_name(path)], updates)
        return updates, ProjectScaleOffsetState(count)

    return transformation(init, update)


RECORD = Method(
    factory=project_scale_offset,
    kind="piece",
    summary="hold scales and offsets of norm layers near 1 and 0",
    traced=("decay",),
    static=("every", "mode", "pairs"),
    needs=("params",),
    position="last",
    communication="reduce",
    response="proportional",  # other leaves pass as they are
    state_bytes=0,
    moved_bytes=12,
    status="provisional",
    paper='Lyle et al., "Normalization and effective learning rates in reinforcement learning", '
    "NeurIPS 2024, arXiv 2407.01800",
    reference="a third-party Flax implementation, nap_project(), repository not known",
    licence="",
)
