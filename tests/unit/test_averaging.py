"""Averagers, the average beside an optimizer, and averages of saved checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.checkpoint import (
    Checkpoints,
    average_checkpoints,
    average_saved,
    checkpoint_weights,
    decay_equivalent_weights,
)
from optimkit.wrappers import (
    ema_params,
    sqrt_decay_weights,
    uniform_window_average,
    weighted_running_average,
)


def fed(averager, values):
    state = averager.init({"w": jnp.float32(values[0])})
    found = []
    for value in values:
        state = averager.update({"w": jnp.float32(value)}, state)
        found.append(float(state.value["w"]))
    return found


def test_window_means_stand_until_the_next_window_is_full():
    averager = uniform_window_average(horizon=2)
    assert fed(averager, [1, 3, 8, 10, 20]) == [1, 2, 2, 9, 9]


def test_a_window_takes_every_interval_th_step():
    assert fed(uniform_window_average(horizon=4, interval=2), [1, 9, 3, 9, 7]) == [1, 1, 2, 2, 2]


def test_an_average_starts_late_and_keeps_to_the_grid():
    # Copies at count 1; renewed at counts 2 and 4, not at 3 and 5.
    averager = ema_params(0.5, every=2, start_step=1)
    assert fed(averager, [4, 8, 16, 0, 4, 0]) == [4, 8, 12, 12, 8, 8]


def test_debiased_from_zero_is_exact_on_constant_parameters():
    averager = ema_params(0.9, init="zeros", debias=True)
    np.testing.assert_allclose(fed(averager, [3, 3, 3]), 3, rtol=1e-6)
    biased = ema_params(0.5, init="zeros")
    assert fed(biased, [4, 4]) == [2, 3]


def test_a_momentum_schedule_is_read_at_the_old_count():
    averager = ema_params(lambda count: jnp.where(count < 2, 0.0, 1.0))
    assert fed(averager, [1, 2, 3, 4]) == [1, 2, 2, 2]


def test_weights_of_zero_leave_the_average_alone():
    averager = weighted_running_average(lambda count: jnp.where(count < 1, 0.0, 1.0))
    assert fed(averager, [5, 1, 3]) == [5, 1, 2]


def test_integers_are_copied_from_the_newest():
    averager = ema_params(0.5)
    state = averager.init({"w": jnp.float32(0), "steps": jnp.int32(0)})
    for step in (1, 2):
        state = averager.update({"w": jnp.float32(step), "steps": jnp.int32(step)}, state)
    assert (float(state.value["w"]), int(state.value["steps"])) == (1.5, 2)


def test_bf16_parameters_are_averaged_in_f32():
    state = ema_params(0.999).init(jnp.ones(2, jnp.bfloat16))
    assert state.average.dtype == jnp.float32
    state = ema_params(0.999).update(jnp.full(2, 2, jnp.bfloat16), state)
    tx = ok.with_averaged_params(optax.sgd(0.1), ema_params(0.999))
    params = jnp.ones(2, jnp.bfloat16)
    assert ok.averaged_params(tx.init(params), params).dtype == jnp.bfloat16


@pytest.mark.parametrize(("before", "expected"), [(False, [3.0, 2.5]), (True, [4.0, 3.5])])
def test_which_parameters_are_averaged(before, expected):
    tx = ok.with_averaged_params(optax.sgd(1.0), ema_params(0.5, update_before_step=before))
    params = jnp.float32(4.0)
    state, found = tx.init(params), []
    for _ in range(2):
        updates, state = tx.update(jnp.float32(1.0), state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(ok.averaged_params(state, params)))
    assert found == expected


def test_masked_leaves_come_from_the_parameters():
    params = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    inner = ok.with_averaged_params(optax.sgd(1.0), ema_params(0.5))
    tx = optax.masked(inner, {"a": True, "b": False})
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    found = ok.averaged_params(state, {"a": jnp.zeros(2), "b": jnp.full(2, 7.0)})
    assert (found["a"].tolist(), found["b"].tolist()) == ([0, 0], [7, 7])


def test_one_checkpoint_is_itself_and_alpha_one_is_the_newest():
    trees = [{"w": jnp.float32(w), "n": jnp.int32(w)} for w in (1, 2, 6)]
    assert average_checkpoints(trees[:1])["w"] == 1
    for scheme in ("ema", "ema_recursive"):
        assert average_checkpoints(trees, scheme=scheme, alpha=1.0)["w"] == 6
    mean = average_checkpoints(trees, scheme="sma")
    assert (float(mean["w"]), int(mean["n"])) == (3, 6)
    custom = average_checkpoints(trees, scheme="custom", weights=[2, 1, 1])
    assert float(custom["w"]) == 2.5


def test_a_checkpoint_that_is_not_finite_can_be_left_out():
    trees = [jnp.array([1.0]), jnp.array([jnp.nan]), jnp.array([3.0])]
    assert np.isnan(average_checkpoints(trees, scheme="sma")[0])
    assert average_checkpoints(trees, scheme="sma", skip_non_finite=True)[0] == 2
    with pytest.raises(ValueError, match="no checkpoints to average that are finite"):
        average_checkpoints(trees[1:2], skip_non_finite=True)


def test_averaging_equals_a_decay_of_the_updates():
    updates, factors = np.array([3.0, -1.0, 2.0]), [0.9, 0.5, 0.2]
    path = np.cumsum([10.0, *updates])
    merged = decay_equivalent_weights(factors) @ path
    np.testing.assert_allclose(merged, 10 + np.sum(factors * updates), rtol=1e-12)


def test_saved_checkpoints_are_averaged(tmp_path):
    saved = Checkpoints(tmp_path, keep=4)
    for step in (1, 2, 3, 4):
        saved.save(step, params={"w": jnp.full(2, float(step))}, opt_state={"n": jnp.int32(step)})
    target = {"w": jnp.zeros(2)}
    assert average_saved(saved, target, last=2, scheme="wma")["w"][0] == pytest.approx(11 / 3)
    assert average_saved(saved, target, steps=[1, 3], scheme="sma")["w"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="last=6 checkpoints were asked for, and there are 4"):
        average_saved(saved, target, last=6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema_params(1.5), "momentum must be >= 0 and <= 1, got 1.5"),
        (lambda: ema_params(0.5, every=0), "every must be an integer >= 1, got 0"),
        (lambda: ema_params(0.5, debias=True), "debias needs init='zeros'"),
        (lambda: uniform_window_average(horizon=5, interval=2), "interval must divide horizon"),
        (lambda: sqrt_decay_weights(0.5, switch_step=1, decay_steps=0), "decay_steps must be > 0"),
        (lambda: checkpoint_weights(0, scheme="sma"), "n must be an integer >= 1, got 0"),
        (lambda: checkpoint_weights(3, scheme="ema", alpha=0.0), "alpha must be > 0 and <= 1"),
        (lambda: checkpoint_weights(3, scheme="lawa"), "scheme must be one of 'sma'"),
        (lambda: decay_equivalent_weights([np.nan]), "decay_factors must be a list of finite"),
        (lambda: average_checkpoints([]), "there are no checkpoints to average"),
        (lambda: average_checkpoints([1.0], weights=[1.0]), "weights go with scheme='custom'"),
        (
            lambda: average_checkpoints([1.0, 2.0], scheme="custom", weights=[1.0]),
            "weights must be 2 numbers",
        ),
        (
            lambda: average_checkpoints([1.0, 2.0], scheme="custom", weights=[1.0, -1.0]),
            "weights must have a finite sum other than 0",
        ),
        (
            lambda: average_checkpoints([{"w": jnp.ones(2)}, {"w": jnp.ones(3)}]),
            "checkpoint leaf 'w' has shape",
        ),
        (
            lambda: ema_params(0.5).update({"v": 1.0}, ema_params(0.5).init({"w": 1.0})),
            "parameter and the average are different trees",
        ),
        (lambda: ok.averaged_params({}, {}), "opt_state holds no states of with_averaged_params"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_a_weight_schedule_must_be_a_function():
    with pytest.raises(TypeError, match="weight_schedule must be a function of the count"):
        weighted_running_average(1.0)  # pyright: ignore[reportArgumentType]
