"""Broken transformations that the suite must reject, each for its own reason, and optax's adamw."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.protocols import Method


class CountState(NamedTuple):
    count: Any


class MuState(NamedTuple):
    mu: Any


def _transformation(init: Any, update: Any) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(init, update)


def gives_nan() -> optax.GradientTransformationExtraArgs:
    """Divides by a norm that may be zero."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return jax.tree.map(lambda g: g / jnp.linalg.norm(g), updates), state

    return _transformation(lambda params: optax.EmptyState(), update)


def changes_dtype() -> optax.GradientTransformationExtraArgs:
    """Hands every update back in float32."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return jax.tree.map(lambda g: g.astype(jnp.float32) * 2, updates), state

    return _transformation(lambda params: optax.EmptyState(), update)


def recompiles() -> optax.GradientTransformationExtraArgs:
    """Starts with an integer count and goes on with a float."""

    def update(updates: Any, state: CountState, params: Any = None, **extra: Any) -> Any:
        return updates, CountState(state.count + 1.0)

    return _transformation(lambda params: CountState(jnp.zeros((), jnp.int32)), update)


def breaks_on_a_mesh() -> optax.GradientTransformationExtraArgs:
    """Flattens leaves that may be sharded."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def flat_norm(g: Any) -> Any:
            norm = jnp.sqrt(jnp.sum(jnp.square(g.reshape(-1).astype(jnp.float32))))
            return (g / jnp.maximum(norm, 1).astype(g.dtype)).astype(g.dtype)

        return jax.tree.map(flat_norm, updates), state

    return _transformation(lambda params: optax.EmptyState(), update)


def broadcasts() -> optax.GradientTransformationExtraArgs:
    """Adds a gradient of any shape that broadcasts."""

    def update(updates: Any, state: MuState, params: Any = None, **extra: Any) -> Any:
        mu = jax.tree.map(lambda m, g: 0.9 * m + jnp.broadcast_to(g, m.shape), state.mu, updates)
        return jax.tree.map(lambda m, g: m.astype(g.dtype), mu, updates), MuState(mu)

    def init(params: Any) -> MuState:
        return MuState(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    return _transformation(init, update)


def bare_adamw(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """optax's own AdamW: in float16 its eps vanishes, and a zero gradient gives 0/0."""
    return optax.with_extra_args_support(optax.adamw(learning_rate))


PROBES: dict[str, tuple[Method, str, str]] = {
    record.name: (record, rule, dtype)
    for record, rule, dtype in (
        (Method(factory=gives_nan, kind="piece", summary=""), "finite", "float32"),
        (Method(factory=changes_dtype, kind="piece", summary=""), "dtype", "bfloat16"),
        (Method(factory=recompiles, kind="piece", summary=""), "compile", "float32"),
        (
            Method(factory=broadcasts, kind="piece", summary="", state_bytes=4),
            "bad_input",
            "float32",
        ),
        (
            Method(
                factory=bare_adamw,
                kind="recipe",
                summary="",
                example={"learning_rate": 1e-3},
                traced=("learning_rate",),
                needs=("params",),
                state_bytes=8,
            ),
            "finite",
            "float16",
        ),
    )
}
"""Probe -> its record, the rule that must reject it, and a dtype in which it does."""

MESH_PROBE = Method(factory=breaks_on_a_mesh, kind="piece", summary="", communication="reduce")
