"""Telemetry is found at any depth, under names that stay."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optimkit as ok
from optimkit.diagnostics import metrics

PARAMS: Any = {
    "dense": {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "bias": jnp.array([4.0, 0.0])}
}
GRADS: Any = jax.tree.map(lambda p: 2 * p, PARAMS)


def lion(rate: float) -> Any:
    return ok.inject_hyperparams(ok.lion)(learning_rate=rate)


def after_one(tx: Any) -> tuple[Any, Any]:
    return jax.jit(optax.with_extra_args_support(tx).update)(GRADS, tx.init(PARAMS), PARAMS)


def values(found: dict[str, Any]) -> dict[str, float]:
    assert all(np.shape(value) == () for value in found.values())
    return {name: round(float(value), 5) for name, value in found.items()}


def test_what_is_given_is_measured() -> None:
    updates, state = after_one(optax.sgd(0.5))
    assert values(metrics(state, PARAMS, updates, GRADS)) == {
        "param_norm": 5,
        "update_norm": 5,
        "update_ratio": 1,
        "gradient_norm": 10,
    }
    assert metrics(state) == {}


NESTS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("rest", tx)),
    "masked": lambda tx: optax.masked(tx, {"dense": {"kernel": True, "bias": False}}),
    "partition": lambda tx: optax.partition({"a": tx}, jax.tree.map(lambda _: "a", PARAMS)),
    "by_kind": lambda tx: ok.by_kind(tx, optax.sgd(0.1)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "momentum_reset": lambda tx: ok.momentum_reset(tx, 5),
    "skip_bad_steps": lambda tx: ok.skip_bad_steps(tx),
    "all": lambda tx: optax.chain(
        ok.skip_bad_steps(
            optax.MultiSteps(
                ok.by_kind(optax.named_chain(("one", ok.momentum_reset(tx, 5))), optax.sgd(0.1)), 1
            ).gradient_transformation()
        )
    ),
}


@pytest.mark.parametrize("nest", NESTS)
def test_the_rate_and_the_step_are_found_at_any_depth(nest: str) -> None:
    _, state = after_one(NESTS[nest](optax.chain(ok.track_spike_score(), lion(0.25))))
    found = values(metrics(state))
    assert found["learning_rate"] == 0.25
    assert found["step"] == 1
    assert found["spike_count"] == 0
    assert found["hyperparams/b1"] == 0.9


def test_two_of_a_kind_get_their_paths() -> None:
    tx = ok.by_kind(lion(0.1), optax.chain(lion(0.2), optax.identity()))
    _, state = after_one(tx)
    rates = {k: v for k, v in values(metrics(state)).items() if k.startswith("learning_rate")}
    assert rates == {
        "learning_rate/inner_states/matrix/inner_state": 0.1,
        "learning_rate/inner_states/vector/inner_state/0": 0.2,
    }


def test_an_argument_keeps_the_plain_name() -> None:
    tx = ok.skip_bad_steps(lion(0.1), spike_threshold=5.0)
    _, state = after_one(tx)
    found = values(metrics(state, grads=PARAMS, learning_rate=lambda count: 7.0 + count))
    assert found["gradient_norm"] == 5
    assert found["learning_rate"] == 7  # read at count 0, the last update's
    assert found["learning_rate/inner_state"] == 0.1
    assert found["norm_mean"] == 10
    assert found["step"] == 1
    assert metrics(state)["step"].dtype == jnp.int32


def test_names_stay_from_step_to_step_and_nothing_compiles_anew() -> None:
    tx = ok.skip_bad_steps(ok.stable_spam(1e-3), reset_momentum_after=2)
    traces = []

    @jax.jit
    def step(state: Any, grads: Any) -> Any:
        traces.append(1)
        updates, state = tx.update(grads, state, PARAMS)
        return state, metrics(state, PARAMS, updates, grads, moments=True)

    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    names = set()
    for grads in (GRADS, bad, bad, GRADS):
        state, found = step(state, grads)
        names.add(tuple(sorted(found)))
    assert len(traces) == len(names) == 1
    assert found["skipped_steps"] == 2
    assert found["momentum_resets"] == 1
    assert found["mu_norm"] > 0
    assert {"tracked_max", "norm_mean", "skip_limit_reached"} <= found.keys()


def test_optax_guards_and_accumulation() -> None:
    tx = optax.apply_if_finite(optax.sgd(0.1), 5)
    _, state = tx.update(jax.tree.map(lambda g: g / 0, GRADS), tx.init(PARAMS), PARAMS)
    assert values(metrics(state)) == {"skipped_steps": 1, "consecutive_skips": 1}
    tx = optax.MultiSteps(optax.adam(0.1), 3)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    found = metrics(state)
    assert values(found) == {"step": 0, "mini_step": 1}
    assert found["mini_step"].dtype == jnp.int32


def test_scalars_of_schedule_free() -> None:
    _, state = after_one(ok.schedule_free_adamw(0.5, warmup_steps=2))
    found = values(metrics(state))
    assert found["learning_rate"] == found["max_learning_rate"] == 0.25
    assert found["b1"] == 0.9


class Weights(NamedTuple):
    """Parameters whose names are those of state fields."""

    count: Any
    norm: Any
    learning_rate: Any


def test_names_of_the_model_are_no_metrics() -> None:
    params = Weights(jnp.ones(2), jnp.ones(3), jnp.ones(()))
    tx = optax.adam(0.1)
    _, state = tx.update(params, tx.init(params), params)
    assert values(metrics(state)) == {"step": 1}


def test_an_nnx_optimizer() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ok.skip_bad_steps(lion(0.125)), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model))
    found = values(metrics(optimizer.opt_state))
    assert found["learning_rate"] == 0.125
    assert found["step"] == 1
    assert found["skipped_steps"] == 0


def test_seeds_under_vmap() -> None:
    tx = ok.skip_bad_steps(lion(0.1))
    grads = jax.tree.map(lambda g: jnp.stack([g, g * jnp.nan]), GRADS)
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(2))
    _, state = jax.vmap(tx.update, in_axes=(0, 0, None))(grads, state, PARAMS)
    np.testing.assert_array_equal(jax.vmap(metrics)(state)["skipped_steps"], [0, 1])


def test_a_schedule_needs_a_count() -> None:
    with pytest.raises(ValueError, match="learning_rate is a schedule, but the state holds no"):
        metrics(optax.EmptyState(), learning_rate=lambda count: count)
