"""Linear decay, one cycle, and a factor on a schedule; optax where the two must agree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok


def rates(schedule, n):
    return np.asarray(schedule(np.arange(n)))


class LinearTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_by_hand(self):
        schedule = ok.linear_decay_schedule(4.0, 6, warmup_steps=2)
        step = self.variant(schedule)
        got = jnp.stack([step(jnp.int32(count)) for count in range(8)])
        chex.assert_trees_all_equal(got, jnp.array([0.0, 2.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0]))


def test_linear_is_optax_linear_without_a_warmup():
    ours = ok.linear_decay_schedule(0.3, 7, end_value=0.1)
    theirs = optax.linear_schedule(0.3, 0.1, 7)
    np.testing.assert_allclose(rates(ours, 10), [theirs(c) for c in range(10)], rtol=1e-6)


def test_linear_is_wsd_without_a_stable_phase():
    ours = ok.linear_decay_schedule(0.3, 9, warmup_steps=2, end_value=0.1)
    theirs = ok.wsd_schedule(
        0.3, warmup_steps=2, stable_steps=0, decay_steps=7, end_value=0.1, decay="linear"
    )
    np.testing.assert_array_equal(rates(ours, 12), rates(theirs, 12))


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (0, 0, [1, 1, 1, 1]),  # no budget: the end value
        (1, 0, [5, 1, 1, 1]),
        (2, 2, [0, 2.5, 1, 1]),  # the budget is the warm-up
        (2, 5, [0, 1, 2, 3]),  # warm-up longer than the budget: the ramp, never above the peak
    ],
)
def test_linear_short_runs(steps, warmup, expected):
    with jax.debug_nans(True):
        schedule = ok.linear_decay_schedule(5.0, steps, warmup_steps=warmup, end_value=1.0)
        np.testing.assert_allclose(rates(schedule, 4), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transition_steps": -1}, "transition_steps must be >= 0, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"init_value": -1.0}, "init_value must be >= 0, got -1"),
        ({"end_value": -1.0}, "end_value must be >= 0, got -1"),
    ],
)
def test_bad_linear(change, message):
    with pytest.raises(ValueError, match=message):
        ok.linear_decay_schedule(**{"init_value": 1.0, "transition_steps": 4, **change})


def test_scale_schedule():
    halved = ok.scale_schedule(optax.linear_schedule(1.0, 0.0, 4), 0.5)
    np.testing.assert_array_equal(rates(halved, 6), [0.5, 0.375, 0.25, 0.125, 0, 0])
    np.testing.assert_array_equal(rates(ok.scale_schedule(4.0, 0.25), 3), [1, 1, 1])
    np.testing.assert_array_equal(rates(ok.scale_schedule(4.0, 0), 3), [0, 0, 0])


@pytest.mark.parametrize(
    ("rate", "factor", "message"),
    [(1.0, -0.5, "factor must be >= 0, got -0.5"), (-1.0, 0.5, "schedule_or_value must be >= 0")],
)
def test_bad_scale(rate, factor, message):
    with pytest.raises(ValueError, match=message):
        ok.scale_schedule(rate, factor)


def test_one_cycle_by_hand():
    # The peak at 0.5 * 6 - 1 = 2, the end at 5; 1/4 of the peak at the start, 1/8 of that at last.
    schedule = ok.one_cycle_schedule(
        8.0, 6, pct_start=0.5, div_factor=4, final_div_factor=8, anneal="linear"
    )
    np.testing.assert_allclose(
        rates(schedule, 8), [2, 5, 8, 5.416667, 2.833333, 0.25, 0.25, 0.25], rtol=1e-6
    )


def test_one_cycle_in_three_phases_by_hand():
    schedule = ok.one_cycle_schedule(
        8.0,
        10,
        pct_start=0.3,
        div_factor=4,
        final_div_factor=2,
        anneal="linear",
        three_phase=True,
    )  # up to count 2, back at count 4, end at count 9
    np.testing.assert_allclose(
        rates(schedule, 11), [2, 5, 8, 5, 2, 1.8, 1.6, 1.4, 1.2, 1, 1], rtol=1e-6
    )


def test_one_cycle_is_optax_cosine_one_count_earlier():
    # Ours peaks at f T - 1 and ends at T - 1, optax's at int(f T) and T.
    ours = ok.one_cycle_schedule(0.1, 11, pct_start=4 / 11)
    theirs = optax.cosine_onecycle_schedule(10, 0.1, pct_start=0.3)
    np.testing.assert_allclose(
        rates(ours, 14), [theirs(c) for c in range(14)], rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("pct_start", [0.0, 0.3, 1.0])
def test_one_cycle_short_runs_stay_between_their_ends(steps, pct_start):
    with jax.debug_nans(True), jax.debug_infs(True):
        got = rates(ok.one_cycle_schedule(1.0, steps, pct_start=pct_start), 5)
    assert np.all((got >= 0) & (got <= 1))
    np.testing.assert_allclose(got[max(steps, 1) :], 1 / 25 / 1e4, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anneal": "cos"}, "anneal must be one of 'cosine', 'linear', got 'cos'"),
        ({"transition_steps": -1}, "transition_steps must be >= 0, got -1"),
        ({"pct_start": 1.5}, "pct_start must be >= 0 and <= 1, got 1.5"),
        ({"pct_start": 0.6, "three_phase": True}, "pct_start must be >= 0 and <= 0.5, got 0.6"),
        ({"div_factor": 0.0}, "div_factor must be > 0, got 0"),
        ({"final_div_factor": -1.0}, "final_div_factor must be > 0, got -1"),
        ({"peak_value": -1.0}, "peak_value must be >= 0, got -1"),
    ],
)
def test_bad_one_cycle(change, message):
    with pytest.raises(ValueError, match=message):
        ok.one_cycle_schedule(**{"peak_value": 1.0, "transition_steps": 10, **change})
