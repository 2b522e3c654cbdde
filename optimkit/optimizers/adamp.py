"""AdamP: Adam without the radial part of its step on scale-invariant weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optimkit.leaves import decay_tree, map_leaves, recipe, zero_count, zeros_like
from optimkit.numerics import check_range, in_turn, next_count, turn_after
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
from optimkit.transforms.adam import ScaleByAdamState, adam_rule
from optimkit.transforms.radial import leaf_decision
from optimkit.wrappers.radial import ChannelAxis, axes_tree


def adamp(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    delta: Any = 0.1,
    wd_ratio: Any = 0.1,
    nesterov: bool = False,
    channel_axis: ChannelAxis | None = None,
) -> GradientTransformation:
    r"""Adam whose step loses its radial part on weights found to be scale invariant.

    .. math::

        u_t &= \hat m_t / (\sqrt{\hat v_t} + \epsilon) \\
        (u_t, r) &\leftarrow (u_t - \hat w\langle\hat w, u_t\rangle,\, r_{wd})
            \text{ if } \max_r|\cos(g_r, w_r)| < \delta/\sqrt n \text{ else } (u_t, 1) \\
        w_t &= w_{t-1} - \eta\,(u_t + \lambda\, r\, w_{t-1})

    The test takes the raw gradient, first for all output channels (n = entries a channel), then
    for the layer as one (n = its size); the first view that passes is projected.

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the corrected root; also guards the norms of the projection.
      weight_decay: decoupled decay, times the rate. The authors' README example has 1e-2.
      mask: which leaves are decayed (True = decayed); default all.
      delta: threshold on the cosine; the authors' default.
      wd_ratio: factor on the decay of projected matrices; the authors' default.
      nesterov: use ``b1 m + (1-b1) g`` in place of ``m``, corrected like ``m``: not optax's form.
      channel_axis: ``(path, leaf) -> axis or axes`` of the output channels; default: last axis,
        first of an embedding table. Leaves of rank below two are plain AdamW.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, like AdamW.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a leaf's layout
        is ambiguous.

    Expect a smaller norm growth, hence a larger effective step, than Adam's at the same rate:
    retune the rate before comparing. A zero gradient counts as orthogonal. The paper states the
    threshold with the dimension of the whole weight; code and this use that of the current view.

    >>> import jax.numpy as jnp, optax
    >>> tx = adamp(0.1)
    >>> params = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> grads = {"kernel": jnp.array([[0.001], [1.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)["kernel"].ravel()]
    [1.0, -0.1]

    Reference: Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on
    Scale-invariant Weights", ICLR 2021, arXiv 2006.08217. Agrees with the authors' code.
    """
    check_range(learning_rate=learning_rate, ge=0)
    check_range(b1=b1, b2=b2, ge=0, lt=1)
    check_range(weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio, ge=0)
    check_range(eps=eps, gt=0)
    projection = {"delta": delta, "eps": eps, "wd_ratio": wd_ratio}

    def init(params: PyTree) -> ScaleByAdamState:
        axes_tree(params, channel_axis)  # an ambiguous layout shows before training starts
        return ScaleByAdamState(zero_count(), zeros_like(params), zeros_like(params))

    def update(
        updates: PyTree, state: ScaleByAdamState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByAdamState]:
        del extra
        count = next_count(state.count)
        adam = adam_rule(b1, b2, eps, count, nesterov=nesterov)
        turn: Array | None = None

        def step(
            g: Array, m: Array, v: Array, w: Array, axes: MatrixAxes | None, decayed: Any
        ) -> tuple[Array, Array, Array]:
            nonlocal turn
            g = in_turn(g, turn)
            u, m, v = adam(g, m, v)
            decision = leaf_decision(g, w, u, axes, **projection)
            if axes is not None:
                turn = turn_after(w, turn, jnp.sum(decision.factor))
            decay = jnp.where(decayed, weight_decay * decision.ratio, 0)
            return u + (decay - decision.factor) * w, m, v

        reads = (params, axes_tree(params, channel_axis), decay_tree(mask, params))
        updates, mu, nu = map_leaves(step, updates, state.mu, state.nu, reads=reads)
        return updates, ScaleByAdamState(count, mu, nu)

    return recipe(transformation(init, update), optax.scale_by_learning_rate(learning_rate))


RECORD = Method(
    factory=adamp,
    kind="recipe",
    summary="Adam without the radial step on scale-invariant weights",
    example={"learning_rate": 1e-3, "weight_decay": 0.1},
    traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "delta", "wd_ratio"),
    static=("mask", "nesterov", "channel_axis"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=8,
    moved_bytes=36,  # 28, and gradient and parameter once more for the cosine
    paper='Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on '
    'Scale-invariant Weights", ICLR 2021, arXiv 2006.08217',
    reference="clovaai/AdamP@7f6f0383ff6ad3839d5c7f79f1db0a44c5a12fdb:adamp/adamp.py",
    licence="MIT",
)
