"""The forecast, the search, the controller's messages, and a quadratic trained under it."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.controllers import (
    AutoLRSController,
    AutoLRSTraining,
    exponential_forecast,
    gp_lcb_suggest,
    run_autolrs,
)

# -- pieces -----------------------------------------------------------------------------------


def test_a_flat_or_short_curve_predicts_its_level():
    assert exponential_forecast([2.0] * 40, horizon=400).predicted == pytest.approx(2.0)
    assert exponential_forecast([3.0, 1.0], horizon=9) == (2.0, 0.0, 0.0, 2.0)


def test_a_rising_curve_is_forecast_and_does_not_fail():
    rising = exponential_forecast(np.linspace(1.0, 2.0, 50), horizon=500).predicted
    assert math.isfinite(rising)
    assert rising > 2


def test_the_search_goes_to_the_ends_first_and_never_repeats():
    tried = [0.01]
    for end in (0.001, 0.1):
        tried.append(gp_lcb_suggest(tried, [1.0, 1.1, 0.9][: len(tried)], 0.001, 0.1,
                                    kernel=(1.0, 0.5, 0.0)))  # fmt: skip
        assert tried[-1] == pytest.approx(end)
    few = [0.001, 0.1]
    assert gp_lcb_suggest(
        few, [1.0, 2.0], 0.001, 0.1, num_grid=3, kappa=0.0, kernel=(1.0, 0.5, 0.0)
    ) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="every point of the grid has been tried"):
        gp_lcb_suggest([0.001, 0.1], [1.0, 2.0], 0.001, 0.1, num_grid=2)


def test_the_search_survives_a_bad_try():
    lr = gp_lcb_suggest([0.001, 0.01, 0.1], [1.0, 0.9, 1e6], 0.001, 0.1)
    assert 0.001 < lr < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoLRSController(0.0, 0.1), "min_lr must be > 0"),
        (lambda: AutoLRSController(0.1, 0.1), "min_lr must be < max_lr, got 0.1 and 0.1"),
        (lambda: AutoLRSController(0.1, 1.0, tau=0), "tau must be an integer >= 1"),
        (lambda: AutoLRSController(0.1, 1.0).start(math.nan), "must be finite, got nan"),
        (lambda: exponential_forecast([1.0, math.nan], horizon=5), "losses must be finite"),
        (lambda: exponential_forecast([1.0], horizon=0), "horizon must be > 0"),
        (lambda: gp_lcb_suggest([0.5], [1.0], 0.001, 0.1), "lrs must be >= 0.001 and <= 0.1"),
        (lambda: gp_lcb_suggest([0.01], [math.inf], 0.001, 0.1), "losses must be"),
        (lambda: gp_lcb_suggest([0.01], [1.0, 2.0], 0.001, 0.1), "lrs and losses must be as many"),
        (lambda: AutoLRSController.from_dict({"version": 99}), "version must be an integer <= 1"),
        (lambda: AutoLRSController.from_dict({"version": 1}), "the stored controller lacks"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- messages ---------------------------------------------------------------------------------


class Listed(AutoLRSController):
    """Tries the same rates in every stage, without a search."""

    rates = (0.1, 0.4, 0.02)

    def suggest(self, lrs, losses):
        return self.rates[len(lrs)]


def listed(**settings):
    return Listed(0.01, 1.0, **{"tau": 8, "tau_prime": 4, "num_lrs": 3, **settings})


def test_messages_out_of_order_are_refused():
    controller = listed()
    with pytest.raises(RuntimeError, match="step was called before start"):
        controller.step(1.0)
    controller.start(1.0)
    with pytest.raises(RuntimeError, match="start was called in the middle of a stage"):
        controller.start(1.0)
    with pytest.raises(RuntimeError, match="no validation loss was asked for"):
        controller.val(1.0)


def test_a_bad_loss_ends_the_trial_and_is_recorded():
    controller = listed()
    controller.start(1.0)
    assert controller.step(math.inf) == ("restore", 0.4)
    assert controller.trials == [(0.1, math.inf)]


def test_all_bad_falls_back_and_then_gives_up():
    controller = listed()
    controller.start(1.0)
    commands = [controller.step(math.nan) for _ in range(3)]
    assert commands[-1] == ("restore", 0.01)  # the first stage: the lowest rate
    with pytest.raises(FloatingPointError, match=r"loss of stage 1 is nan at the rate 0\.01"):
        controller.step(math.nan)


def test_a_diverging_stage_takes_the_next_best_rate():
    controller = listed(tau_prime=1)
    controller.start(1.0)
    for loss in (0.5, 0.2, 0.9):
        command = controller.step(loss)
    assert command == ("restore", 0.4)
    assert controller.step(math.nan) == ("restore", 0.1)


def test_trials_are_judged_by_validation_once_tau_is_largest():
    controller = listed(tau=2, tau_prime=2, tau_max=10, val_evals_per_trial=2, num_lrs=1)
    controller.start(9.0)
    kinds = [controller.step(1.0).kind for _ in range(4)]
    assert kinds == ["continue", "restore", "continue", "stage_done"]
    assert controller.start(1.0).kind == "snapshot"
    assert controller.step(1.0).kind == "evaluate"
    with pytest.raises(RuntimeError, match="step was called where val is due"):
        controller.step(1.0)
    assert controller.val(0.7).kind == "continue"
    assert controller.step(1.0).kind == "restore"
    assert controller.history[-1] == (2, 0.1, 0.7)


# -- training ---------------------------------------------------------------------------------

STEPS = 3 * 4 + 8 + 3 * 8 + 10  # two searches, one stage and most of the second


@jax.jit
def momentum_step(state, batch, lr):
    w, trace = state["params"], state["opt_state"]
    loss = jnp.sum(jnp.square(w)) * 0.5 + 0.01 * batch
    trace = 0.5 * trace + w
    return {"params": w - lr * trace, "opt_state": trace}, loss


donating_step = jax.jit(lambda *a: momentum_step(*a), donate_argnums=0)


def start_state():
    return {"params": jnp.array([1.0, -2.0]), "opt_state": jnp.zeros(2)}


def batches():
    return np.random.default_rng(0).random(STEPS)


@pytest.fixture(scope="module")
def straight():
    training = AutoLRSTraining(donating_step, start_state(), listed())
    kinds = [training.step(batch).kind for batch in batches()]
    return training, kinds


def test_a_quadratic_is_trained_and_every_trial_restored(straight):
    training, kinds = straight
    assert kinds[:12].count("restore") == 3
    assert kinds.index("stage_done") == 3 * 4 + 8 - 1
    assert [lr for _, lr, _ in training.controller.history] == [*Listed.rates, *Listed.rates]
    assert float(jnp.max(jnp.abs(training.committed["params"]))) < 0.2


def test_a_stage_is_what_training_at_its_rate_alone_gives():
    training = AutoLRSTraining(donating_step, start_state(), listed())
    for batch in batches()[:20]:
        training.step(batch)
    alone = start_state()
    for batch in batches()[12:20]:
        alone, _ = momentum_step(alone, batch, training.controller.lr)
    np.testing.assert_array_equal(training.committed["params"], alone["params"])


@pytest.mark.parametrize("killed_after", [0, 2, 5, 12, 17, 20, 23, 45])
def test_a_killed_run_continues_bit_for_bit(straight, killed_after):
    data = batches()
    first = AutoLRSTraining(donating_step, start_state(), listed())
    for batch in data[:killed_after]:
        first.step(batch)
    stored = json.dumps(first.to_dict(), allow_nan=False)
    trees = jax.tree.map(np.asarray, (first.state, first.snapshot))
    state, snapshot = jax.tree.map(jnp.asarray, trees)
    described = json.loads(stored)
    controller = Listed.from_dict(described["controller"])
    second = AutoLRSTraining(donating_step, state, controller, snapshot=snapshot)
    for batch in data[killed_after:]:
        second.step(batch)
    whole, _ = straight
    assert second.to_dict() == whole.to_dict()
    for ours, theirs in zip(
        jax.tree.leaves((second.state, second.snapshot)),
        jax.tree.leaves((whole.state, whole.snapshot)),
        strict=True,
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_nan_loss_leaves_the_training_state_untouched():
    def poisoned(state, batch, lr):
        state, loss = momentum_step(state, 0.0, lr)
        return jax.tree.map(lambda x: x * jnp.nan, state), loss * jnp.nan if batch else loss

    training = AutoLRSTraining(poisoned, start_state(), listed())
    with pytest.raises(ValueError, match="must be finite, got nan"):
        training.step(1)
    np.testing.assert_array_equal(training.state["params"], [1.0, -2.0])
    training = AutoLRSTraining(poisoned, start_state(), listed())
    training.controller.start(1.0)
    for _ in range(3):
        assert training.step(1).kind == "restore"
        np.testing.assert_array_equal(training.state["params"], [1.0, -2.0])
    with pytest.raises(FloatingPointError, match="every rate that was tried has failed"):
        training.step(1)
    np.testing.assert_array_equal(training.state["params"], [1.0, -2.0])


def test_the_search_itself_and_its_restart():
    """Two rates a stage, chosen by the Gaussian process, on the driver that users call."""
    settings = {"tau": 8, "tau_prime": 4, "num_lrs": 2, "seed": 1}
    controller = AutoLRSController(0.01, 0.5, **settings)
    state = run_autolrs(momentum_step, start_state(), batches()[:16], controller)
    assert float(jnp.max(jnp.abs(state["params"]))) < 2
    rates = [lr for _, lr, _ in controller.history]
    assert len(rates) == 2
    assert min(abs(rates[1] - 0.01), abs(rates[1] - 0.5)) < 1e-6  # an end of the interval
    again = AutoLRSController.from_dict(json.loads(json.dumps(controller.to_dict())))
    assert again.to_dict() == controller.to_dict()


def test_the_warm_up_comes_first():
    controller = listed(warmup_steps=2, warmup_lr=0.1)
    training = AutoLRSTraining(momentum_step, start_state(), controller)
    assert [training.step(0.0).lr for _ in range(2)] == [0.05, 0.1]
    assert controller.phase == "idle"
    training.step(0.0)
    assert controller.phase == "search"
    assert training.lr == 0.1
