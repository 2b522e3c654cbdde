"""The power law in tokens, its warm-up and its cool-down."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimkit as ok

LAW = {"peak_value": 1.0, "batch_size": 2, "tokens_per_step": 4, "a": 1.0, "b": -0.5}


def rates(schedule, n):
    return np.asarray(schedule(np.arange(n)))


def test_the_law_by_hand():
    # 2 / sqrt(4 c), at most 1
    np.testing.assert_allclose(
        rates(ok.power_schedule(**LAW), 5), [1, 1, 2**-0.5, 3**-0.5, 0.5], rtol=1e-6
    )


def test_the_ramp_aims_at_the_law():
    rate = ok.power_schedule(**LAW, warmup_steps=4)
    np.testing.assert_allclose(rates(rate, 6), [0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5**-0.5], rtol=1e-6)


def test_the_cooldown_starts_at_the_rate_reached():
    rate = ok.power_schedule(**LAW, total_steps=6, cooldown_steps=2, end_value=0.1)
    half = 0.1 + 0.4 * (math.exp(0.5) - 1) / (math.e - 1)
    np.testing.assert_allclose(rates(rate, 8)[3:], [3**-0.5, 0.5, half, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((8, 4, 0), [0, 0.125 * 8**-0.5, 0.25 * 8**-0.5, 0.375 * 8**-0.5, 0]),  # only the ramp
        ((8, 4, 2), [0, 0.125 * 8**-0.5, 0.25 * 8**-0.5, None, 0]),  # cools from within it
        ((0, 0, 0), [0, 0, 0, 0, 0]),
        ((0, 1, 0), [1, 0, 0, 0, 0]),
        ((0, 1, 1), [1, 0, 0, 0, 0]),
        ((0, 4, 4), [1, None, None, None, 0]),  # nothing but cool-down
    ],
)
def test_lengths(lengths, expected):
    names = ("warmup_steps", "total_steps", "cooldown_steps")
    with jax.debug_nans(True), jax.debug_infs(True):
        got = rates(ok.power_schedule(**LAW, **dict(zip(names, lengths, strict=True))), 5)
    known = [i for i, value in enumerate(expected) if value is not None]
    np.testing.assert_allclose(got[known], [expected[i] for i in known], rtol=1e-6)
    assert np.all((got >= 0) & (got <= 1))


def test_token_counts_beyond_int32():
    rate = ok.power_schedule(1.0, batch_size=1, tokens_per_step=2**22, a=2.0**12, b=-0.5)
    assert float(rate(2**18)) == pytest.approx(2.0**-8)


def test_exponential_cooldown_is_the_shifted_exponential():
    start, end, steps = 1.0, 0.1, 40
    a, b = (1 - end) * math.e / (math.e - 1), (end * math.e - 1) / (math.e - 1)
    rate = ok.exponential_cooldown(start, hold_steps=3, transition_steps=steps, end_value=end)
    x = np.arange(steps + 1)
    np.testing.assert_allclose(rate(3 + x), a * np.exp(-x / steps) + b, rtol=1e-5)
    assert float(rate(1000)) == pytest.approx(end)
    same = ok.wsd_schedule(
        start, warmup_steps=0, stable_steps=3, decay_steps=steps, end_value=end,
        decay="shifted_exponential",
    )  # fmt: skip
    np.testing.assert_array_equal(rates(rate, 50), rates(same, 50))


def test_everything_may_be_traced_at_once():
    lengths = {"warmup_steps": 2, "total_steps": 6, "cooldown_steps": 2}
    traced = jax.jit(lambda kwargs: ok.power_schedule(**kwargs)(jnp.arange(8)))(LAW | lengths)
    np.testing.assert_allclose(traced, rates(ok.power_schedule(**LAW, **lengths), 8), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_value": -1.0}, "peak_value must be >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be > 0, got 0"),
        ({"tokens_per_step": -5}, "tokens_per_step must be > 0, got -5"),
        ({"a": 0.0}, "a must be > 0, got 0"),
        ({"b": 0.5}, "b must be < 0, got 0.5"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"total_steps": -1}, "total_steps must be >= 0, got -1"),
        ({"cooldown_steps": 3}, "total_steps must be given with cooldown_steps=3, got None"),
        ({"total_steps": 5, "cooldown_steps": 6}, "cooldown_steps must be >= 0 and <= 5, got 6"),
        ({"end_value": -0.1}, "end_value must be >= 0, got -0.1"),
    ],
)
def test_bad_power(change, message):
    with pytest.raises(ValueError, match=message):
        ok.power_schedule(**{**LAW, **change})


@pytest.mark.parametrize("name", ["init_value", "hold_steps", "transition_steps", "end_value"])
def test_bad_cooldown(name):
    kwargs = {"init_value": 1.0, "hold_steps": 1, "transition_steps": 4, "end_value": 0.1}
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got -1"):
        ok.exponential_cooldown(**{**kwargs, name: -1})
