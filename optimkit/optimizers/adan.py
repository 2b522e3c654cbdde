"""Adan: Nesterov momentum from the change between gradients, over an adaptive root."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optimkit.leaves import map_leaves, recipe
from optimkit.numerics import check_count, check_range, tree_norm
from optimkit.protocols import (
    GradientTransformation,
    Mask,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.adan import scale_by_adan
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.proximal_decay import apply_proximal_decay
from optimkit.wrappers.momentum_reset import momentum_reset


def _clip_by_global_norm(max_norm: Any, eps: Any) -> GradientTransformation:
    """Multiplies by ``min(1, max_norm / (norm + eps))``; a ``max_norm`` of zero clips nothing."""

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra
        factor = jnp.minimum(1, max_norm / (tree_norm(updates) + eps))
        factor = jnp.where(max_norm > 0, factor, 1)
        return map_leaves(lambda g: g * factor, updates), state

    return transformation(lambda params: optax.EmptyState(), update)


def adan(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.98,
    b2: Any = 0.92,
    b3: Any = 0.99,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    no_prox: bool = False,
    max_grad_norm: Any = 0.0,
    restart_every: int | None = None,
) -> GradientTransformation:
    r"""Steps by momentum that looks ahead along the change of the gradient; proximal decay.

    .. math::

        g_t &\leftarrow g_t \min\big(1, c / (\|g_t\| + \epsilon)\big)
            \text{ over the whole tree, if } c > 0 \\
        m_t &= b_1 m_{t-1} + (1-b_1)\, g_t, \qquad
            v_t = b_2 v_{t-1} + (1-b_2)(g_t - g_{t-1}) \\
        n_t &= b_3 n_{t-1} + (1-b_3)\big(g_t + b_2 (g_t - g_{t-1})\big)^2 \\
        u_t &= \frac{m_t/(1-b_1^t) + b_2 v_t/(1-b_2^t)}{\sqrt{n_t/(1-b_3^t)} + \epsilon}, \qquad
            w_t = \frac{w_{t-1} - \eta u_t}{1 + \eta\lambda}

    In the first step the change is zero.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. The authors' code has 1e-3.
      b1: decay of m, in [0, 1). All three are the code's, which are 1 minus the paper's betas.
      b2: decay of the change, in [0, 1), and its weight.
      b3: decay of the second moment, in [0, 1).
      eps: added to the root and to the norm of the clip, >= 0.
      weight_decay: lambda, times the rate.
      mask: which leaves are decayed (True = decayed); default all.
      no_prox: decay as AdamW does, :math:`w_t = w_{t-1}(1 - \eta\lambda) - \eta u_t`. The two
        differ by about :math:`\eta^2\lambda(u + \lambda w)` a step.
      max_grad_norm: c; 0: no clip. The stored gradient is the clipped one. When injected or
        traced, the norm is computed even if it is 0.
      restart_every: begin anew, as in the first step but for the schedule of the rate, after every
        so many steps; None or 0: never. In the authors' code the loop calls a function for it.

    Returns:
      An optimizer that needs ``params``; 16 bytes of state a f32 parameter (AdamW: 8).

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    A spike counts in two steps, by its coming and by its going. ``optax.adan`` is another method:
    it weighs the change with 1 - b2 in place of b2, adds 1e-8 inside the root, and decays as AdamW.
    The two agree at b2 = 0.5 with ``eps_root=0`` there and ``no_prox=True`` here.

    >>> import jax.numpy as jnp, optax
    >>> tx = adan(0.1, weight_decay=2.5)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([0.5, -2.0]), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]  # 0.9 and 1.1 over 1.25
    [0.72, 0.88]

    Reference: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models", 2022, arXiv 2208.06677. Agrees with the authors' code to rounding; with the clip, to
    1e-6, since that code adds up the norm in float32 (goldens ``adan__*``).
    """
    check_range(
        learning_rate=learning_rate, weight_decay=weight_decay, max_grad_norm=max_grad_norm, ge=0
    )
    check_count(restart_every=restart_every or 0)
    direction = scale_by_adan(b1, b2, b3, eps)
    if restart_every:
        direction = momentum_reset(direction, restart_every, moments="after", counts="after")
    never_clips = isinstance(max_grad_norm, (int, float)) and max_grad_norm == 0
    clip = optax.identity() if never_clips else _clip_by_global_norm(max_grad_norm, eps)
    rate = optax.scale_by_learning_rate(learning_rate)
    if no_prox:
        return recipe(clip, direction, decayed_weights(weight_decay, mask), rate)
    return recipe(clip, direction, rate, apply_proximal_decay(learning_rate, weight_decay, mask))


RECORD = Method(
    factory=adan,
    kind="recipe",
    summary="Nesterov momentum from the change between gradients, proximal decay",
    example={"learning_rate": 1e-3, "weight_decay": 0.1},
    traced=(
        "learning_rate",
        "b1",
        "b2",
        "b3",
        "eps",
        "weight_decay",
        "max_grad_norm",
    ),
    static=("mask", "no_prox", "restart_every"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=16,
    moved_bytes=44,
    paper='Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep '
    'Models", 2022, arXiv 2208.06677',
    reference="sail-sg/Adan@2c65beaf400775753b155da4082c3819fea689b9:adan.py:Adan",
    licence="Apache-2.0",
)
