"""Normalize-and-Project's projection: after a step, kernels return to the norm they began with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimkit import layout
from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import check_match, check_real, require_params, zero_count
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    compute_dtype,
    due,
    in_turn,
    narrow,
    next_count,
    safe_div,
    safe_norm,
    sums_together,
    turn_after,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class ProjectToNormState(NamedTuple):
    """``count``: int32 scalar. ``target_norm``: norms at init, f32, with reduced axes of size one.

    One value a kernel; a scalar zero for leaves that are not projected.
    """

    count: Array
    target_norm: PyTree


def projected_leaves(mask: Any, params: PyTree, default: Callable[[str, Any], bool]) -> PyTree:
    """A mask as a tree of bools: True = projected.

    Args:
      mask: None, a tree of bools, a function of the parameters that gives one, or path patterns.
      params: the tree to choose from.
      default: the rule for None.
    """
    if callable(mask) and jax.tree.leaves(params):
        mask = mask(params)
    return layout.select_leaves(mask, params, default=default, argument="mask")


def project_to_norm(
    *,
    every: int = 1,
    target: Literal["initial"] = "initial",
    axis: int | tuple[int, ...] | None = None,
    mask: Any = None,
    eps: Any = 0.0,
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""Rescales the parameters that a step makes to the norm that they had at init.

    .. math::

        W \leftarrow (W + u)\, \frac{\|W_0\|}{\|W + u\| + \epsilon}
        \quad\text{at every n-th step, that is}\quad
        u \leftarrow (W + u) \frac{\|W_0\|}{\|W + u\| + \epsilon} - W

    A kernel that a normalisation layer follows computes the same at any scale, but its gradient
    shrinks as it grows: the rate that acts is the one written over the norm (Adam) or over its
    square (SGD). Held norms make the schedule you write the schedule you get.

    Args:
      every: project at every so many updates, >= 1, the first time at update number ``every``. The
        paper finds 1 and 1000 nearly identical.
      target: ``"initial"``, the norm of the parameters given to ``init``.
      axis: the axis or axes that number the norms: -1 gives every output unit of a Dense or Conv
        kernel its own, which is ours. Default: one norm a kernel, or a layer of a stack of them.
      mask: which leaves are projected (True = projected): a tree of bools, a function of the
        parameters, or path patterns. Default: leaves of rank two or more but embeddings, output
        heads and norm scales. Project only what a normalisation follows.
      eps: added to the norm, >= 0; 0 is ours, as are the guards below.
      matrix_axes: which axes of a leaf are batch where name and shape do not tell; not needed with
        ``axis``.

    Returns:
      A transformation for the very end of a chain, after the rate and the decay; it needs
      ``params``. It keeps an int32 and one f32 scalar a kernel. Inside ``shard_map`` each device
      must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, params are missing, a gradient has another shape,
        or the layout of a leaf is ambiguous.

    ``init`` needs the real initial parameters; when you resume, restore the state. A kernel that is
    zero at init is not projected, nor is one whose new norm is zero or not finite. Moments of the
    optimizer are left alone. The result reaches the norm to rounding of the parameters' dtype.

    >>> import jax.numpy as jnp
    >>> tx = project_to_norm()
    >>> w = {"kernel": jnp.array([[3.0], [4.0]])}  # norm 5
    >>> u, _ = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(w), w)
    >>> (w["kernel"] + u["kernel"]).ravel().tolist()
    [3.0, 4.0]

    Reference: Lyle et al., "Normalization and effective learning rates in reinforcement learning",
    NeurIPS 2024, arXiv 2407.01800, of which no code is public.
    """
    check_count(every=every, least=1)
    check_choice(("initial",), target=target)
    check_range(eps=eps, ge=0)

    def chosen(params: PyTree) -> PyTree:
        return projected_leaves(mask, params, layout.is_hidden_matrix)

    def summed_axes(path: Any, leaf: Any) -> tuple[int, ...]:
        """The axes that one norm is taken over."""
        name, rank = layout.path_name(path), len(np.shape(leaf))
        if axis is None:
            axes = layout.matrix_axes(name, leaf, matrix_axes)
            kept: tuple[int, ...] = axes.batch if axes else ()
        else:
            kept = (axis,) if isinstance(axis, int) else tuple(axis)
        if any(not -rank <= a < rank for a in kept):
            raise ValueError(f"axis {axis} does not exist in leaf {name!r} of rank {rank}")
        return tuple(a for a in range(rank) if a not in {k % rank for k in kept})

    def init(params: PyTree) -> ProjectToNormState:
        def norm(path: Any, w: Array, projected: bool) -> Array:
            dtype = compute_dtype(w)
            if not projected:
                return jnp.zeros((), dtype)
            return safe_norm(jnp.asarray(w, dtype), summed_axes(path, w), keepdims=True)

        norms = jax.tree_util.tree_map_with_path(norm, params, chosen(params))
        return ProjectToNormState(zero_count(), norms)

    def update(
        updates: PyTree, state: ProjectToNormState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ProjectToNormState]:
        del extra
        params = require_params(params, "project_to_norm")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        count = next_count(state.count)
        now = due(count, every)

        previous: Array | None = None

        def project(path: Any, u: Array, w: Array, norm: Array, projected: bool) -> Array:
            nonlocal previous
            if not projected or u.size == 0:
                return u
            dtype = compute_dtype(u, w)
            w, wide = w.astype(dtype), u.astype(dtype)
            square = jnp.square(w + in_turn(wide, previous))
            (total,) = sums_together([square], summed_axes(path, w))
            factor = safe_div(norm, jnp.sqrt(total) + eps)
            previous = turn_after(w, previous, jnp.sum(total))
            # Behind the barrier the sum is computed anew, where else it would be stored.
            factor = jax.lax.optimization_barrier(factor)
            # Zero where either norm is zero or the new one is infinite; NaN is not above zero.
            wide = jnp.where(now & (factor > 0), (w + wide) * factor - w, wide)
            return narrow(wide, jnp.result_type(u))

        updates = jax.tree_util.tree_map_with_path(
            project, updates, params, state.target_norm, chosen(params)
        )
        return updates, ProjectToNormState(count, state.target_norm)

    return transformation(init, update)


RECORD = Method(
    factory=project_to_norm,
    kind="piece",
    summary="return kernels to their initial norm after the step",
    traced=("eps",),
    static=("every", "target", "axis", "mask", "matrix_axes"),
    needs=("params",),
    position="last",
    communication="reduce",
    response="proportional",  # leaves that are not projected pass as they are
    state_bytes=0,
    moved_bytes=12,
    paper='Lyle et al., "Normalization and effective learning rates in reinforcement learning", '
    "NeurIPS 2024, arXiv 2407.01800",
    reference="RLE-Foundation/Plasticine@aa00b4bb18f7fe298a47e1ce36c32ba55ce064e8:"
    "plasticine/ppo_continual_dmc_base.py:plasticine_normalize_and_project (third party)",
    licence="MIT",
)
