"""diffGrad's friction: smaller steps where the gradient has hardly changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from optimkit.leaves import map_leaves, matching_leaves, zero_count, zeros_like
from optimkit.numerics import check_choice, check_range, next_count, one_minus_power, saturate
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation

Friction: TypeAlias = Literal["sigmoid_abs", "sigmoid_signed", "wide"]

FRICTIONS: Mapping[str, Callable[[Array], Array]] = {
    "sigmoid_abs": lambda change: jax.nn.sigmoid(jnp.abs(change)),
    "sigmoid_signed": lambda change: jax.nn.sigmoid(change),
    "wide": lambda change: 9 * jax.nn.sigmoid(jnp.abs(change) / 2) - 4,
}
"""Coefficients of (old gradient - new gradient); none is ever negative."""


class ScaleByDiffgradState(NamedTuple):
    """``count``: int32 scalar; all else one array a parameter each.

    ``mu``, ``nu``: first and second moment. ``previous_gradient``.
    """

    count: Array
    mu: PyTree
    nu: PyTree
    previous_gradient: PyTree


class GradientFrictionState(NamedTuple):
    """``previous_gradient``: one array a parameter."""

    previous_gradient: PyTree


def _store_after(coefficient: Array, g: Array) -> Array:
    """``g``, to be stored over the old gradient once the coefficient has been made of that.

    The compiler cannot know that no coefficient is negative; without the select XLA on CPUs copies
    the old gradient first.
    """
    return jnp.where(coefficient < 0, coefficient, g)


def scale_by_diffgrad(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    friction: Friction | Literal["normalized"] = "sigmoid_abs",
) -> GradientTransformation:
    r"""Adam's direction, multiplied entry by entry by a coefficient of the gradient's change.

    .. math::

        m_t &= b_1 m_{t-1} + (1-b_1)\, g_t, \qquad v_t = b_2 v_{t-1} + (1-b_2)\, g_t^2 \\
        \xi_t &= \frac{1}{1 + e^{-|g_{t-1} - g_t|}}, \quad g_0 = 0, \qquad
            u_t = \frac{\sqrt{1-b_2^t}}{1-b_1^t} \cdot \frac{\xi_t m_t}{\sqrt{v_t} + \epsilon}

    The moments do not see the coefficient.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0: in the first step it weighs 32 times as much as in
        ``optax.scale_by_adam``.
      friction: ``"sigmoid_abs"`` as above, in [1/2, 1). ``"sigmoid_signed"``: without the absolute
        value, in (0, 1). ``"wide"``: :math:`9/(1 + e^{-|g_{t-1} - g_t|/2}) - 4`, in [1/2, 5). These
        two are variants known from third-party code only; they are not verified.
        ``"normalized"``, ours: the change over Adam's corrected root plus eps goes into the first.

    Returns:
      A transformation that gives a direction (no rate, no sign); 12 bytes of state a f32 parameter.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The coefficient compares the change with 1, however large the gradients are: see ``diffgrad``.
    Entries above 1e15 (f32) count as 1e15. A non-finite gradient poisons all three arrays: put a
    guard around it, which must hold ``previous_gradient`` back, too.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_diffgrad()
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([0.01, -9.0], [0.01, -9.0]):  # the second gradient is the first
    ...     updates, state = tx.update(jnp.array(g), state)
    ...     print([round(float(u), 3) for u in updates])
    [0.502, -1.0]
    [0.5, -0.5]

    Reference: Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks",
    IEEE TNNLS 2020, arXiv 1909.11015.
    """
    check_range(b1=b1, b2=b2, ge=0, lt=1)
    check_range(eps=eps, ge=0)
    check_choice((*FRICTIONS, "normalized"), friction=friction)
    normalized = friction == "normalized"
    coefficient = FRICTIONS["sigmoid_abs" if normalized else friction]

    def init(params: PyTree) -> ScaleByDiffgradState:
        return ScaleByDiffgradState(zero_count(), *(zeros_like(params) for _ in range(3)))

    def update(
        updates: PyTree, state: ScaleByDiffgradState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByDiffgradState]:
        del params, extra
        count = next_count(state.count)
        nu_correction = one_minus_power(b2, count)
        correction = jnp.sqrt(nu_correction) / one_minus_power(b1, count)

        def step(
            g: Array, m: Array, previous: Array, v: Array
        ) -> tuple[Array, Array, Array, Array]:
            change = previous - g
            if normalized:
                now = b2 * v + (1 - b2) * jnp.square(saturate(g))
                change = change / (jnp.sqrt(now / nu_correction) + eps)
            xi = coefficient(change)
            # All that follows reads the stored gradient: g itself, be it a sum with the decay, is
            # then read for the last time before the parameters change.
            g = _store_after(xi, saturate(g))
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * jnp.square(g)
            return xi * m / (jnp.sqrt(v) + eps) * correction, m, g, v

        updates, mu, previous, nu = map_leaves(
            step, updates, state.mu, state.previous_gradient, state.nu
        )
        return updates, ScaleByDiffgradState(count, mu, nu, previous)

    return transformation(init, update)


def gradient_friction(friction: Friction = "sigmoid_abs") -> GradientTransformation:
    r"""Multiplies updates by diffGrad's coefficient of the gradient's change.

    .. math:: u_t \leftarrow \xi_t u_t, \qquad \xi_t = \frac{1}{1 + e^{-|g_{t-1} - g_t|}},
        \quad g_0 = 0

    Args:
      friction: ``"sigmoid_abs"`` as above, ``"sigmoid_signed"`` or ``"wide"``: see
        ``scale_by_diffgrad``.

    Returns:
      A transformation; 4 bytes of state a f32 parameter. g is the extra argument ``grad`` of
      ``update`` if it is given, so that friction may follow a momentum or a preconditioner; else
      the incoming update.

    Raises:
      ValueError: if ``friction`` is another word, or a gradient has another shape.

    The coefficient compares the change with 1: for gradients below 0.1 it is 1/2 throughout.

    >>> import jax.numpy as jnp
    >>> tx = gradient_friction()
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([8.0, 0.0], [8.0, 100.0]):
    ...     updates, state = tx.update(jnp.array(g), state)
    ...     print([round(float(u), 2) for u in updates])
    [8.0, 0.0]
    [4.0, 100.0]

    Reference: Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks",
    IEEE TNNLS 2020, arXiv 1909.11015.
    """
    check_choice(tuple(FRICTIONS), friction=friction)
    coefficient = FRICTIONS[friction]

    def init(params: PyTree) -> GradientFrictionState:
        return GradientFrictionState(zeros_like(params))

    def update(
        updates: PyTree, state: GradientFrictionState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, GradientFrictionState]:
        del params
        given = extra.get("grad")
        reads = () if given is None else (matching_leaves(given, updates, what="grad"),)

        def step(u: Array, previous: Array, *grad: Array) -> tuple[Array, Array]:
            g = grad[0] if grad else u
            xi = coefficient(previous - g)
            return xi * u, _store_after(xi, g)

        updates, previous = map_leaves(step, updates, state.previous_gradient, reads=reads)
        return updates, GradientFrictionState(previous)

    return transformation(init, update)


_PAPER = (
    'Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks", '
    "IEEE TNNLS 2020, arXiv 1909.11015"
)
_REFERENCE = "shivram1987/diffGrad@73233ba4708701cf552bcecb1f065d46d2d77164:diffGrad_v2.py:diffgrad"

RECORDS = (
    Method(
        factory=scale_by_diffgrad,
        kind="piece",
        summary="Adam's direction with friction where gradients do not change",
        traced=("b1", "b2", "eps"),
        static=("friction",),
        position="middle",
        communication="none",
        response="bounded",
        state_bytes=12,
        moved_bytes=36,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="MIT",
    ),
    Method(
        factory=gradient_friction,
        kind="piece",
        summary="multiply updates by a coefficient of the gradient's change",
        static=("friction",),
        position="any",
        communication="none",
        response="proportional",
        state_bytes=4,
        moved_bytes=20,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="MIT",
    ),
)
