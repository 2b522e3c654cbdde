"""Leaps, their verification, extrapolation between rounds and rehearsal, on a few numbers."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimkit import controllers
from optimkit.controllers import (
    LeapController,
    accelerate_outer,
    accept,
    activation_similarity,
    activation_variance,
    calibrate_thresholds,
    extrapolate_log_policy,
    loss_curvature,
    power_law_sampler,
    predict_adam_momentum,
    predict_linear,
    predict_quadratic,
    regime_from_similarity,
    rehearsal_probabilities,
)

CALM = np.ones((2, 3), np.float32)
WILD = CALM * np.array([1, -1, 1], np.float32)


def square(w: Any) -> Any:
    return jnp.sum(jnp.square(w))


def observe_all(
    controller: LeapController, values: Any, loss: Any = square, state: Any = ()
) -> Any:
    step, made = 0, []
    for w in values:
        made.append(controller.observe(step, jnp.float32(w), state, CALM, loss))
        step = made[-1].step + controller.interval
    return made


# -- predictors -------------------------------------------------------------------------------


def test_quadratic_forms_agree_where_they_must() -> None:
    points = [jnp.float32(x) for x in (0.0, 1.0, 3.0)]
    linear = predict_linear(points[1], points[2], 10, 10)
    assert float(predict_quadratic(*points, 10, 10, form="paper")) == float(linear) == 5.0
    assert float(predict_quadratic(*points, 10, 10, form="newton_backward")) == 6.0
    assert float(predict_quadratic(*points, 10, 10)) == 5.5  # a = 1 is within half of v = 2
    assert float(predict_quadratic(*points, 10, 10, max_acceleration_ratio=0.25)) == 5.25


def test_predictors_keep_dtypes_and_integer_leaves() -> None:
    old = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.array(3)}
    new = {"w": 2 * jnp.ones(2, jnp.bfloat16), "n": jnp.array(4)}
    made = jax.jit(predict_linear)(old, new, 5, 10)
    assert made["w"].dtype == jnp.bfloat16
    assert (made["w"].tolist(), int(made["n"])) == ([2.5, 2.5], 4)


def test_momentum_with_bias_correction_is_adams_own_step() -> None:
    params, tx = jnp.ones(2), optax.adam(0.1)
    updates, state = tx.update(jnp.array([0.3, -2.0]), tx.init(params), params)
    mu, nu = (optax.tree.get(state, name) for name in ("mu", "nu"))
    made = predict_adam_momentum(params, mu, nu, 1, 0.1, bias_correction=True, count=1)
    np.testing.assert_allclose(made, params + updates, rtol=1e-6)
    assert predict_adam_momentum(params, 0 * mu, 0 * nu, 5, 1.0, eps=0.0).tolist() == [1, 1]


# -- regimes and acceptance -------------------------------------------------------------------


def test_cosines_of_rows_and_of_all() -> None:
    a, b = jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.array([[2.0, 0.0], [1.0, 1.0]])
    assert activation_similarity(a, b, reduce="rows").tolist() == [1, 0]
    together = activation_similarity(a, b, reduce="concatenated")
    np.testing.assert_allclose(together, 2 / np.sqrt(6), rtol=1e-6)


def test_regimes_include_their_bounds() -> None:
    assert regime_from_similarity([0.2, 0.5, 0.8], 0.2, 0.8).tolist() == [0, 1, 2]
    assert calibrate_thresholds([0.5, 0.5, np.nan]) == (0.499, 0.501)


def test_three_criteria() -> None:
    assert not accept(1.0, 1.0)
    assert accept(1.1, 1.0, criterion="adaptive", loss_std=0.2)
    assert not accept(1.1, 1.0, criterion="pct")
    assert not accept(float("nan"), 1.0, criterion="pct")


# -- the controller ---------------------------------------------------------------------------


def test_a_leap_that_raises_the_loss_changes_nothing() -> None:
    first, second = observe_all(LeapController(10, 10), [1.0, 0.1])
    assert (first.regime, second.regime) == ("unknown", "stable")
    assert not second.accepted
    assert (float(second.params), second.step) == (np.float32(0.1), 10)
    np.testing.assert_allclose(second.pred_loss, 0.64, rtol=1e-5)  # at 0.1 - 0.9


def test_after_a_leap_the_parameters_leapt_to_are_the_first_checkpoint() -> None:
    controller = LeapController(10, 5)
    decisions = observe_all(controller, [8.0, 6.0, 4.0])
    assert [d.accepted for d in decisions] == [False, True, True]
    assert [float(d.params) for d in decisions] == [8.0, 5.0, 3.5]  # from 5 to 4, half of it on
    assert [d.step for d in decisions] == [0, 15, 30]
    assert [entry[0] for entry in controller.history] == [0, 10, 25]


def test_moments_return_to_zero_and_counts_stay() -> None:
    tx = optax.adam(0.1)
    _, state = tx.update(jnp.float32(1.0), tx.init(jnp.float32(0.0)))
    decision = observe_all(LeapController(10, 5), [8.0, 6.0], state=state)[1]
    adam = decision.opt_state[0]
    assert (float(adam.mu), float(adam.nu), int(adam.count)) == (0.0, 0.0, 1)
    kept = observe_all(LeapController(10, 5, reset_moments=False), [8.0, 6.0], state=state)[1]
    assert float(kept.opt_state[0].mu) != 0


def test_nothing_leaps_while_training_is_wild_or_at_rate_zero() -> None:
    controller = LeapController(1, 1, regimes=("stable",), confirm=2)
    decisions = [
        controller.observe(step, jnp.float32(w), (), seen, square)
        for step, (w, seen) in enumerate([(9, CALM), (8, WILD), (7, WILD), (6, WILD)])
    ]
    assert [d.regime for d in decisions] == ["unknown", "chaotic", "stable", "stable"]
    assert [d.accepted for d in decisions] == [False, False, False, True]
    still = LeapController(1, 1, learning_rate=lambda step: 0.0)
    assert not any(d.accepted for d in observe_all(still, [3.0, 2.0, 1.0]))


def test_between_checkpoints_nothing_is_computed() -> None:
    controller = LeapController(10, 5)
    controller.observe(0, jnp.float32(1.0), (), lambda w: CALM, square)
    decision = controller.observe(9, jnp.float32(0.5), (), None, None)  # type: ignore
    assert decision.regime is None
    assert float(decision.params) == 0.5


def test_the_best_of_several_scales_is_judged_and_nan_is_the_worst() -> None:
    _, state = optax.scale_by_adam().update(jnp.float32(1.0), optax.scale_by_adam().init(0.0))
    controller = LeapController(
        1, 1, "momentum", regimes=("unknown",), learning_rate=1.0, scales=(1.0, 2.0, 3.0)
    )
    # m / sqrt(v) = 0.1 / sqrt(0.001) = 3.16: predictions 6.84, 3.68 and 0.51
    decision = controller.observe(
        0, jnp.float32(10.0), state, CALM, lambda w: jnp.where(w < 1, jnp.nan, w)
    )
    assert decision.accepted
    np.testing.assert_allclose(decision.pred_loss, 10 - 2 * 0.1 / np.sqrt(0.001), rtol=1e-5)


def test_a_restart_continues() -> None:
    whole = LeapController(10, 5, "quadratic", "adaptive")
    observe_all(whole, [9.0, 7.0])
    again = LeapController(10, 5, "quadratic", "adaptive")
    again.restore(json.loads(json.dumps(whole.to_dict())), whole.arrays)
    one, two = (c.observe(20, jnp.float32(5.5), (), CALM, square) for c in (whole, again))
    assert one.accepted
    assert float(one.params) == float(two.params)
    assert whole.to_dict() == again.to_dict()


# -- between rounds ---------------------------------------------------------------------------


def test_increments_of_exact_rounds_tend_to_the_accelerated_ones() -> None:
    reward, policy = jnp.array([1.0, 0.0]), jnp.log(jnp.array([0.5, 0.5]))
    init, update = accelerate_outer(0.5, space="logits")
    state, gaps = init(policy), []
    for _ in range(12):
        hat = jax.nn.log_softmax(policy + reward)
        gaps.append(float((hat - state.prev_hat)[0] - (hat - state.prev_hat)[1]))
        policy, state = update(hat, state)
    assert gaps[0] == pytest.approx(1.0)
    assert gaps[-1] == pytest.approx(2.0, rel=1e-3)  # 1 / (1 - 0.5)


def test_the_last_round_may_keep_its_solution_and_alpha_may_change() -> None:
    init, update = accelerate_outer(lambda t: 0.5 * t, skip_last=True)
    first, state = update(jnp.float32(2.0), init(jnp.float32(1.0)))
    second, state = update(jnp.float32(4.0), state)
    last, _ = update(jnp.float32(5.0), state, last=True)
    assert [float(x) for x in (first, second, last)] == [2.0, 5.0, 5.0]


def test_masked_actions_stay_masked() -> None:
    new, old = jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.0, -jnp.inf, -jnp.inf])
    np.testing.assert_allclose(
        jnp.exp(extrapolate_log_policy(new, old, 0.5)), [0.5, 0.5, 0.0], atol=1e-7
    )


# -- rehearsal --------------------------------------------------------------------------------


def test_rehearsal_follows_its_law() -> None:
    time = jnp.array([0, 1, 3])
    power = rehearsal_probabilities(time, exponent=2.0)
    np.testing.assert_allclose(power / power[0], [1, 1 / 4, 1 / 16], rtol=1e-5)
    fast = rehearsal_probabilities(time, exponent=2.0, kind="exponential")
    np.testing.assert_allclose(fast / fast[0], np.exp([0.0, -2, -6]), rtol=1e-5)
    drawn = power_law_sampler(time, exponent=2.0, key=jax.random.key(0), size=4000)
    np.testing.assert_allclose(jnp.bincount(drawn, length=3) / 4000, power, atol=0.03)


@pytest.mark.parametrize("kind", ["power", "exponential"])
def test_tasks_that_have_not_come_are_not_rehearsed(kind: Any) -> None:
    time = jnp.array([1, 0, jnp.inf])
    for exponent in (0.0, 2.0):
        some = rehearsal_probabilities(time, exponent=exponent, kind=kind)
        known = rehearsal_probabilities(time[:2], exponent=exponent, kind=kind)
        np.testing.assert_allclose(some, [*known, 0])
    none = rehearsal_probabilities(time[2:].repeat(4), exponent=2.0, kind=kind)
    np.testing.assert_allclose(none, 0.25)


# -- bad input --------------------------------------------------------------------------------


def test_bad_input() -> None:
    one: Any = jnp.ones(2)
    for call, message in (
        (lambda: predict_linear(one, jnp.ones(3), 1, 1), r"has shape \(2,\), but"),
        (lambda: predict_linear(one, one, 1, 0), "interval must be > 0"),
        (lambda: predict_quadratic(one, one, one, 1, 1, form="newton"), "form must be"),  # type: ignore
        (lambda: predict_adam_momentum(one, one, one, 1, 1, bias_correction=True), "needs count"),
        (lambda: activation_similarity(one, one), r"shape \(inputs, features\)"),
        (lambda: activation_variance(one), "two checkpoints or more"),
        (lambda: loss_curvature(jnp.ones((2, 2))), "must be a vector"),
        (lambda: regime_from_similarity(0.5, 0.9, 0.1), "tau_high - tau_low must be >= 0"),
        (lambda: calibrate_thresholds([]), "similarities is empty"),
        (lambda: accept(1, 1, criterion="adaptive"), "needs loss_std"),
        (lambda: LeapController(regimes="stable"), "regimes must be some of chaotic"),
        (lambda: LeapController(predictor="momentum"), "needs learning_rate"),
        (lambda: LeapController(K=0), "K must be an integer >= 1"),
        (lambda: LeapController().restore({}, {}), "version must be 1, got None"),
        (lambda: LeapController().observe(0, one, (), one, square), "activations must be"),
        (lambda: accelerate_outer(1.0), "alpha must be >= 0 and < 1"),
        (lambda: accelerate_outer(0.5).update(one, accelerate_outer(0.5).init(jnp.ones(3))),
         "solution leaf"),
        (lambda: extrapolate_log_policy(one, jnp.ones(3), 0.5), "previous log policy leaf"),
        (lambda: rehearsal_probabilities(jnp.ones(0), exponent=1), "at least one"),
        (lambda: rehearsal_probabilities(-one, exponent=1), "time_since_last must be >= 0"),
        (lambda: power_law_sampler(one, exponent=-1, key=jax.random.key(0), size=1), "exponent"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    controller = LeapController()
    controller.observe(50, one, (), CALM, square)
    with pytest.raises(ValueError, match="step must not fall: 3 after 50"):
        controller.observe(3, one, (), CALM, square)
    assert controllers.extrapolate_policy is extrapolate_log_policy
