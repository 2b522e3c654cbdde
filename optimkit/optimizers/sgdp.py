"""SGDP: momentum SGD without the radial part of its step on scale-invariant weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optimkit.leaves import decay_tree, map_leaves, recipe, zeros_like
from optimkit.numerics import check_range, in_turn, turn_after
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Mask,
    MatrixAxes,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.radial import leaf_decision
from optimkit.wrappers.radial import ChannelAxis, axes_tree


class ProjectedTraceState(NamedTuple):
    """``trace``: momentum accumulated without averaging, one array a parameter."""

    trace: PyTree


def sgdp(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.0,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    dampening: Any = 0.0,
    nesterov: bool = False,
    eps: Any = 1e-8,
    delta: Any = 0.1,
    wd_ratio: Any = 0.1,
    channel_axis: ChannelAxis | None = None,
    project_buffer: bool | None = None,
) -> GradientTransformation:
    r"""Momentum SGD whose step loses its radial part on weights found to be scale invariant.

    With momentum m, dampening d and projection P (the one of ``adamp``: the raw gradient decides,
    first for all output channels, then for the layer as one):

    .. math::

        b_t &= m\, b_{t-1} + (1-d)\, g_t, \qquad
            u_t = g_t + m\, b_t \text{ with Nesterov, else } b_t \\
        (u_t, r) &\leftarrow (P u_t,\, r_{wd}) \text{ where } g_t \text{ is tangential, else }
            (u_t, 1) \\
        w_t &= w_{t-1} - \eta\,\big(u_t + \tfrac{\lambda\, r}{1-m}\, w_{t-1}\big)

    The gradient is dampened from the first step on; torch's SGD copies the first one undampened.
    The factor 1/(1-m) makes the decoupled decay as strong as coupled decay under momentum.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. The authors' README has 0.1.
      momentum: m, in [0, 1). The default 0 is the code's; their README has 0.9.
      weight_decay: lambda, times the rate; their README has 1e-5.
      mask: which leaves are decayed (True = decayed); default all.
      dampening: d, <= 1.
      nesterov: mix the gradient in once more; their README says True.
      eps: guards the norms of the projection, > 0.
      delta: threshold on the cosine; the authors' default.
      wd_ratio: r_wd, factor on the decay of projected matrices; the authors' default.
      channel_axis: ``(path, leaf) -> axis or axes`` of the output channels; default: last axis,
        first of an embedding table. Leaves of rank below two are never projected.
      project_buffer: keep the projected step as the momentum, as the code does without Nesterov:
        there the step is the buffer itself, and is projected in place. Default: what the code
        does, that is, exactly when not ``nesterov``. False: project only the step, which is the
        paper's algorithm.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter (AdamW: 8), also at
      momentum 0. The update is proportional to the gradient: float16 parameters overflow where
      rate times gradient / (1-m) does.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a leaf's layout
        is ambiguous.

    A zero gradient counts as tangential. At momentum 0 the method is SGD on weights that are
    truly scale invariant: their gradient has no radial part to begin with.

    >>> import jax.numpy as jnp, optax
    >>> tx = sgdp(0.1)
    >>> params = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> grads = {"kernel": jnp.array([[0.001], [1.0]])}  # almost orthogonal to the weight
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)["kernel"].ravel()]
    [1.0, -0.1]

    Reference: Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on
    Scale-invariant Weights", ICLR 2021, arXiv 2006.08217. Agrees with the authors' code.
    """
    check_range(
        learning_rate=learning_rate, weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio, ge=0
    )
    check_range(momentum=momentum, ge=0, lt=1)
    check_range(dampening=dampening, le=1)
    check_range(eps=eps, gt=0)
    if project_buffer is None:
        project_buffer = not nesterov
    if project_buffer and nesterov:
        raise ValueError(
            "project_buffer must be None or False with nesterov=True: the step is not the buffer"
        )
    return recipe(
        _projected_trace(
            momentum,
            dampening,
            nesterov=nesterov,
            project_buffer=project_buffer,
            weight_decay=weight_decay / (1 - momentum),
            mask=mask,
            channel_axis=channel_axis,
            projection={"delta": delta, "eps": eps, "wd_ratio": wd_ratio},
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def _projected_trace(
    momentum: Any,
    dampening: Any,
    *,
    nesterov: bool,
    project_buffer: bool,
    weight_decay: Any,
    mask: Mask,
    channel_axis: ChannelAxis | None,
    projection: dict[str, Any],
) -> GradientTransformation:
    """Momentum that is projected itself, which a wrapper around a momentum cannot do."""

    def init(params: PyTree) -> ProjectedTraceState:
        axes_tree(params, channel_axis)  # an ambiguous layout shows before training starts
        return ProjectedTraceState(zeros_like(params))

    def update(
        updates: PyTree, state: ProjectedTraceState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ProjectedTraceState]:
        del extra
        turn: Array | None = None

        def step(
            g: Array, b: Array, w: Array, axes: MatrixAxes | None, decayed: Any
        ) -> tuple[Array, Array]:
            nonlocal turn
            g = in_turn(g, turn)
            b = momentum * b + (1 - dampening) * g
            u = g + momentum * b if nesterov else b
            decision = leaf_decision(g, w, u, axes, **projection)
            if axes is not None:
                turn = turn_after(w, turn, jnp.sum(decision.factor))
            u = u - decision.factor * w
            decay = jnp.where(decayed, weight_decay * decision.ratio, 0)
            return u + decay * w, u if project_buffer else b

        reads = (params, axes_tree(params, channel_axis), decay_tree(mask, params))
        updates, trace = map_leaves(step, updates, state.trace, reads=reads)
        return updates, ProjectedTraceState(trace)

    return transformation(init, update)


RECORD = Method(
    factory=sgdp,
    kind="recipe",
    summary="momentum SGD without the radial step on scale-invariant weights",
    example={"learning_rate": 1e-2, "momentum": 0.9, "weight_decay": 1e-2},
    traced=(
        "learning_rate",
        "momentum",
        "weight_decay",
        "dampening",
        "eps",
        "delta",
        "wd_ratio",
    ),
    static=("mask", "nesterov", "channel_axis", "project_buffer"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=28,  # 20, and gradient and parameter once more for the cosine
    paper='Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on '
    'Scale-invariant Weights", ICLR 2021, arXiv 2006.08217',
    reference="clovaai/AdamP@7f6f0383ff6ad3839d5c7f79f1db0a44c5a12fdb:adamp/sgdp.py:SGDP",
    licence="MIT",
)
