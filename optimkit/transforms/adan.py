"""Adan's direction: momentum of the gradient and of its change, over the root of their mix."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import map_leaves, zero_count, zeros_like
from optimkit.numerics import check_range, next_count, one_minus_power, saturate
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class ScaleByAdanState(NamedTuple):
    """``count``: int32 scalar; all else one array a parameter each.

    ``mu``, ``fast_mu``: averages of the gradient, with b1 and with b2. ``nu``: second moment.
    ``previous_gradient``.
    """

    count: Array
    mu: PyTree
    fast_mu: PyTree
    nu: PyTree
    previous_gradient: PyTree


def scale_by_adan(
    b1: Any = 0.98, b2: Any = 0.92, b3: Any = 0.99, eps: Any = 1e-8
) -> GradientTransformation:
    r"""Rescales gradients by Adan's three moments: of the gradient, its change, and their mix.

    .. math::

        d_t &= g_t - g_{t-1}, \quad d_1 = 0 \\
        m_t &= b_1 m_{t-1} + (1-b_1)\, g_t, \qquad v_t = b_2 v_{t-1} + (1-b_2)\, d_t, \qquad
            n_t = b_3 n_{t-1} + (1-b_3)(g_t + b_2 d_t)^2 \\
        u_t &= \frac{m_t/(1-b_1^t) + b_2 v_t/(1-b_2^t)}{\sqrt{n_t/(1-b_3^t)} + \epsilon}

    An average of changes is the change of an average: with :math:`a_t = b_2 a_{t-1} + (1-b_2)\,
    g_t` from :math:`a_1 = g_1`, :math:`b_2 v_t = (1-b_2)(g_t - a_t)`. The state keeps a
    (``fast_mu``) in place of v, so that the step needs the old gradient once only.

    Args:
      b1: decay of m, in [0, 1). All three are the code's, which are 1 minus the paper's betas.
      b2: decay of the change, in [0, 1), and its weight in n and u.
      b3: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.

    Returns:
      A transformation that gives a direction (no rate, no sign); 16 bytes of state a f32 parameter.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    A spike counts in two steps, by its coming and by its going. Entries above 1e15 (f32) count as
    1e15. A non-finite gradient poisons all four arrays: put a guard around it, which must hold
    ``previous_gradient`` back, too. ``optax.adan`` weighs the change with 1 - b2 = 0.08 where the
    authors have b2 = 0.92, and leaves their path at the second step.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_adan()
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([2.0, -0.5], [2.0, 0.5]):  # the second entry turns round
    ...     updates, state = tx.update(jnp.array(g), state)
    ...     print([round(float(u), 3) for u in updates])
    [1.0, -1.0]
    [1.0, 0.454]

    Reference: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models", 2022, arXiv 2208.06677.
    """
    check_range(b1=b1, b2=b2, b3=b3, ge=0, lt=1)
    check_range(eps=eps, ge=0)

    def init(params: PyTree) -> ScaleByAdanState:
        return ScaleByAdanState(zero_count(), *(zeros_like(params) for _ in range(4)))

    def update(
        updates: PyTree, state: ScaleByAdanState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByAdanState]:
        del params, extra
        count = next_count(state.count)
        first = state.count == 0
        mu_weight = 1 / one_minus_power(b1, count)
        change_weight = (1 - b2) / one_minus_power(b2, count)
        nu_correction = one_minus_power(b3, count)

        def step(
            g: Array, m: Array, a: Array, n: Array, previous: Array
        ) -> tuple[Array, Array, Array, Array, Array]:
            now = saturate(g)
            m = b1 * m + (1 - b1) * now
            a = jnp.where(first, now, b2 * a + (1 - b2) * now)
            change = jnp.where(first, 0, now - saturate(previous))
            n = b3 * n + (1 - b3) * jnp.square(now + b2 * change)
            # Never n, but the compiler cannot know: g replaces the old gradient after n has read
            # it. Otherwise XLA on CPUs copies the old one first.
            previous = jnp.where(n < 0, n, g)
            # Through the new state, once more: g itself, limited, would be stored.
            lead = saturate(previous) - a
            root = jnp.sqrt(n / nu_correction) + eps
            return (mu_weight * m + change_weight * lead) / root, m, a, n, previous

        updates, *moments = map_leaves(
            step, updates, state.mu, state.fast_mu, state.nu, state.previous_gradient
        )
        return updates, ScaleByAdanState(count, *moments)

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_adan,
    kind="piece",
    summary="Adan's direction, from the gradient and its change",
    traced=("b1", "b2", "b3", "eps"),
    position="middle",
    communication="none",
    response="bounded",
    state_bytes=16,
    moved_bytes=44,
    paper='Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep '
    'Models", 2022, arXiv 2208.06677',
    reference="sail-sg/Adan@2c65beaf400775753b155da4082c3819fea689b9:adan.py:Adan",
    licence="Apache-2.0",
)
