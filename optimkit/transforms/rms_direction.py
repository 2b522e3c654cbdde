"""AdamW's direction without a first moment, made so that it can be computed twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optimkit.leaves import map_leaves, zero_count, zeros_like
from optimkit.numerics import next_count, one_minus_power, saturate
from optimkit.protocols import Array, GradientTransformation, Mask, PyTree, transformation
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.rectify import rectification


class RootMeanSquareState(NamedTuple):
    """``count``: int32 scalar. ``nu``: second moment, one array a parameter."""

    count: Array
    nu: PyTree


class RmsDirection(NamedTuple):
    """An inner transformation, and its direction once more from its new state."""

    inner: GradientTransformation
    recompute: Callable[[PyTree, PyTree, PyTree], PyTree]


def rms_direction(
    b2: Any,
    eps: Any,
    weight_decay: Any,
    mask: Mask,
    *,
    corrected: bool = True,
    rectified: bool = False,
) -> RmsDirection:
    """The gradient over the root of its second moment, plus decay: AdamW without a first moment.

    ``corrected`` divides the moment by ``1 - b2^t``; ``rectified`` gives the plain gradient where
    the second moment is too young to be trusted.
    """
    decay = decayed_weights(weight_decay, mask)

    def quotient(count: Array, scale: float) -> Callable[[Array, Array], Array]:
        # ``scale``, a power of two, cancels exactly: it only makes another expression of it.
        correction = one_minus_power(b2, count) if corrected else jnp.ones(())
        trusted = rectification(b2, count)[1] > 4 if rectified else True
        # No finite gradient exceeds this but one that the moment saw saturated.
        bound = jnp.sqrt(correction / (1 - b2))

        def divide(g: Array, v: Array) -> Array:
            root = jnp.sqrt(scale**2 * v / correction) + scale * eps
            direction = jnp.clip(scale * g / root, -bound, bound)
            return jnp.where(trusted, direction, g) if rectified else direction

        return divide

    def init(params: PyTree) -> RootMeanSquareState:
        return RootMeanSquareState(zero_count(), zeros_like(params))

    def update(
        updates: PyTree, state: RootMeanSquareState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, RootMeanSquareState]:
        del params, extra
        count = next_count(state.count)
        divide = quotient(count, 1.0)

        def step(g: Array, v: Array) -> tuple[Array, Array]:
            v = b2 * v + (1 - b2) * jnp.square(saturate(g))
            return divide(g, v), v

        updates, nu = map_leaves(step, updates, state.nu)
        return updates, RootMeanSquareState(count, nu)

    inner = optax.chain(transformation(init, update), decay)

    def recompute(updates: PyTree, state: PyTree, params: PyTree) -> PyTree:
        mine, decay_state = state
        directions = map_leaves(quotient(mine.count, 2.0), updates, reads=(mine.nu,))
        return decay.update(directions, decay_state, params)[0]

    return RmsDirection(optax.with_extra_args_support(inner), recompute)
