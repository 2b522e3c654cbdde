"""Steps of a radius that is searched for: it grows while steps bring enough, and shrinks else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import recipe, zero_count
from optimkit.numerics import (
    check_count,
    check_range,
    hyperparameter_dtype,
    next_count,
    tree_norm,
    tree_vdot,
)
from optimkit.protocols import (
    Array,
    GradientTransformation,
    PyTree,
    ScalarOrSchedule,
    transformation,
)

Product: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""``(params, v) -> matrix times v``."""

Direction: TypeAlias = Callable[[Array, Array, PyTree], tuple[PyTree, Array]]
"""``(lambda, gamma, direction of the last try) -> (direction, whether it was found)``."""


class GammaSearchState(NamedTuple):
    """``count``, ``solves``: int32 scalars. ``gamma``: the radius, scalar in f32 or better."""

    count: Array
    gamma: Array
    solves: Array


def search_radius(
    directions: Callable[..., Direction],
    learning_rate: ScalarOrSchedule,
    *,
    gamma0: Any,
    adaptive: bool,
    max_search_steps: int,
    gamma_min: Any,
    eps: Any,
    refine_factor: tuple[float, float],
    accept_constant: Any,
    noise_tolerance: Any,
) -> GradientTransformation:
    """An optimizer whose step is a direction, of a radius that is searched for."""
    check_range(gamma0=gamma0, accept_constant=accept_constant, gt=0, lt=jnp.inf)
    check_range(gamma_min=gamma_min, eps=eps, noise_tolerance=noise_tolerance, ge=0)
    check_range(learning_rate=learning_rate, ge=0)
    check_count(max_search_steps=max_search_steps)
    grow, shrink = refine_factor
    check_range(**{"refine_factor[0]": grow}, ge=1)
    check_range(**{"refine_factor[1]": shrink}, gt=0, lt=1)

    def init(params: PyTree) -> GammaSearchState:
        del params
        gamma = jnp.array(gamma0, hyperparameter_dtype(), copy=True)
        return GammaSearchState(zero_count(), gamma, zero_count())

    def update(
        updates: PyTree,
        state: GammaSearchState,
        params: PyTree | None = None,
        *,
        value: Any = None,
        value_fn: Callable[[PyTree], Any] | None = None,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        hvp_fn: Product | None = None,
        **extra: Any,
    ) -> tuple[PyTree, GammaSearchState]:
        del extra
        if value_fn is None or (adaptive and value is None):
            raise ValueError(
                "a search for the radius needs the loss, as a number and as a function: call "
                "update(gradients, state, params, value=loss, value_fn=loss_fn)"
            )
        if not jax.tree.leaves(updates):
            return updates, state._replace(count=next_count(state.count))
        dtype = state.gamma.dtype
        gradient = grad_fn or jax.grad(value_fn)
        direction = directions(params, updates, gradient, hvp_fn)
        norm = tree_norm(updates).astype(dtype)
        moving = norm > 0

        def shift_of(gamma: Array) -> Array:
            return norm / (gamma + eps)

        def judge(lam: Array, d: PyTree) -> tuple[Array, Array]:
            """Whether the step brings what the theory asks for, and leads to a finite loss."""
            ahead = jax.tree.map(lambda p, x: p + x.astype(p.dtype), params, d)
            now, then = jnp.asarray(value, dtype), jnp.asarray(value_fn(ahead), dtype)
            slope = tree_norm(gradient(ahead)).astype(dtype)
            enough = now - then >= slope * (slope / (accept_constant * lam))
            noise = noise_tolerance * jnp.finfo(dtype).eps * jnp.abs(now)
            noise = noise * (jnp.asarray(noise_tolerance) > 0)
            same = (jnp.abs(now - then) <= noise) & (jnp.asarray(noise_tolerance) > 0)
            finite = jnp.isfinite(then) & jnp.isfinite(slope)
            return finite & (enough | same), finite

        zero = jax.tree.map(jnp.zeros_like, updates)

        def attempt(carry: Any) -> Any:
            gamma, d, tries, _, _ = carry
            lam = shift_of(gamma)
            d, solved = direction(lam, gamma, d)
            done = finite = jnp.ones((), bool)
            if adaptive:
                good, finite = judge(lam, d)
                done = solved & good
            after = jnp.where(done, jnp.maximum(grow * gamma, gamma_min), shrink * gamma)
            return (after if adaptive else gamma).astype(dtype), d, tries + 1, done, finite

        def going(carry: Any) -> Array:
            _, _, tries, done, _ = carry
            return moving & ~done & (tries <= (max_search_steps if adaptive else 0))

        never = jnp.zeros((), bool)
        start = (state.gamma, zero, jnp.zeros((), jnp.int32), never, ~never)
        gamma, d, tries, _, finite = jax.lax.while_loop(going, attempt, start)
        finite &= jnp.isfinite(tree_vdot(d, d))
        d = jax.tree.map(lambda x: jnp.where(finite, x, 0), d)
        return d, GammaSearchState(next_count(state.count), gamma, state.solves + tries)

    search = transformation(init, update)
    if learning_rate is None:
        return recipe(search)
    return recipe(search, optax.scale_by_learning_rate(learning_rate, flip_sign=False))
