"""AdamP's projection around any direction: it needs the raw gradient, so it is a wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import matrix_axes, path_name
from optimkit.leaves import check_match, check_real, decay_tree, require_params
from optimkit.numerics import check_range, compute_dtype, narrow
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Mask,
    MatrixAxes,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.radial import leaf_decision

ChannelAxis = Callable[[str, Any], int | tuple[int, ...]]


class ProjectRadialState(NamedTuple):
    """``inner_state``: state of the wrapped transformation; the projection keeps none."""

    inner_state: PyTree


def channel_axes(name: str, leaf: Any, channel_axis: ChannelAxis | None) -> MatrixAxes | None:
    """How a leaf is seen by the projection; None for vectors, which are never projected."""
    rank = len(np.shape(leaf))
    if rank < 2:
        return None
    if channel_axis is None:
        return matrix_axes(name, leaf)
    kept = channel_axis(name, leaf)
    kept = (kept,) if isinstance(kept, int) else tuple(kept)
    outputs = tuple(sorted(axis % rank for axis in kept))
    return MatrixAxes((), tuple(a for a in range(rank) if a not in outputs), outputs)


def axes_tree(params: PyTree, channel_axis: ChannelAxis | None) -> PyTree:
    """``channel_axes`` of every leaf; raises, naming the leaf, where a layout is ambiguous."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: channel_axes(path_name(path), p, channel_axis), params
    )


def project_radial(
    inner: optax.GradientTransformation,
    *,
    delta: Any = 0.1,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    wd_ratio: Any = 0.1,
    mask: Mask = None,
    channel_axis: ChannelAxis | None = None,
) -> GradientTransformation:
    r"""Removes the radial part of the inner update on weights found to be scale invariant.

    A weight that a normalisation follows has a gradient orthogonal to it. Where the cosine between
    the raw gradient and the weight is below ``delta / sqrt(n)``, for every output channel or for
    the layer as one, the update loses its component along the weight, and decay is reduced:

    .. math:: u \leftarrow u - \hat w \langle \hat w, u \rangle + \lambda\, r\, w, \qquad
        r = r_{wd} \text{ if projected else } 1

    Args:
      inner: gives a direction, for example ``scale_by_adam()``.
      delta: threshold on the cosine, >= 0.
      eps: guards the norms, > 0.
      weight_decay: lambda; decoupled, and multiplied by the rate that a later link applies.
      wd_ratio: r_wd, factor on the decay of projected matrices.
      mask: which leaves are decayed (True = decayed); default all.
      channel_axis: ``(path, leaf) -> axis or axes`` that number the output channels. Default: the
        last axis, the first of an embedding table, heads and head size of an attention kernel.
        Leaves of rank below two are never projected.

    Returns:
      A transformation that needs ``params``. No state of its own.

    Raises:
      ValueError: if an argument is out of range, params are missing, a gradient has another shape,
        or the layout of a leaf is ambiguous (the message shows the readings).

    A zero gradient has cosine zero, so its leaf counts as scale invariant in that step.

    >>> import jax.numpy as jnp, optax
    >>> tx = project_radial(optax.identity())
    >>> w = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> g = {"kernel": jnp.array([[0.01], [1.0]])}  # almost orthogonal to w
    >>> tx.update(g, tx.init(w), w)[0]["kernel"].ravel().tolist()
    [0.0, 1.0]

    Reference: Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on
    Scale-invariant Weights", ICLR 2021, arXiv 2006.08217.
    """
    check_range(delta=delta, weight_decay=weight_decay, wd_ratio=wd_ratio, ge=0)
    check_range(eps=eps, gt=0)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ProjectRadialState:
        axes_tree(params, channel_axis)  # an ambiguous layout shows before training starts
        return ProjectRadialState(inner.init(params))

    def update(
        updates: PyTree,
        state: ProjectRadialState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ProjectRadialState]:
        params = require_params(params, "project_radial")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        directions, inner_state = inner.update(updates, state.inner_state, params, **extra)

        def project(g: Array, w: Array, u: Array, axes: MatrixAxes | None, decayed: Any) -> Array:
            dtype, wide = u.dtype, compute_dtype(g, w)
            g, w, u = g.astype(wide), w.astype(wide), u.astype(wide)
            decision = leaf_decision(g, w, u, axes, delta=delta, eps=eps, wd_ratio=wd_ratio)
            decay = jnp.where(decayed, weight_decay * decision.ratio, 0)
            return narrow(u + (decay - decision.factor) * w, dtype)

        updates = jax.tree.map(
            project,
            updates,
            params,
            directions,
            axes_tree(params, channel_axis),
            decay_tree(mask, params),
        )
        return updates, ProjectRadialState(inner_state)

    return transformation(init, update)


RECORD = Method(
    factory=project_radial,
    kind="wrapper",
    summary="remove the radial part of the update on scale-invariant weights",
    example={"weight_decay": 0.1},
    example_made={"inner": scale_by_adam},
    traced=("delta", "eps", "weight_decay", "wd_ratio"),
    static=("inner", "mask", "channel_axis"),
    needs=("params",),
    position="middle",
    communication="reduce",
    response="bounded",
    state_bytes=8,
    moved_bytes=36,  # 28, and gradient and parameter once more for the cosine
    paper='Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on '
    'Scale-invariant Weights", ICLR 2021, arXiv 2006.08217',
    reference="clovaai/AdamP@7f6f0383ff6ad3839d5c7f79f1db0a44c5a12fdb:adamp/adamp.py",
    licence="MIT",
)
