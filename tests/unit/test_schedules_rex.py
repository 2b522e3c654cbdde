"""REX, the profiles, and how often they are read."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.schedules.sampling import sample_count


def rates(schedule, n):
    return np.asarray(schedule(np.arange(n)))


def test_rex_by_hand():
    # (1-p) / (1 - p/2) at quarters
    np.testing.assert_allclose(
        rates(ok.rex_schedule(1.0, 4), 6), [1, 6 / 7, 2 / 3, 2 / 5, 0, 0], rtol=1e-6
    )


def test_rex_shape_zero_is_optax_linear():
    ours = ok.rex_schedule(0.3, 7, shape=0.0, end_value=0.1)
    theirs = optax.linear_schedule(0.3, 0.1, 7)
    np.testing.assert_allclose(rates(ours, 10), [theirs(c) for c in range(10)], rtol=1e-6)


def test_rex_slopes_at_the_ends():
    rate = ok.rex_schedule(1.0, 1000, shape=0.75)
    assert 1000 * (float(rate(0)) - float(rate(1))) == pytest.approx(0.25, rel=1e-2)
    assert 1000 * (float(rate(999)) - float(rate(1000))) == pytest.approx(4.0, rel=1e-2)


def test_rex_warmup_comes_before_the_budget():
    rate = ok.rex_schedule(1.0, 4, warmup_steps=2, warmup_init_value=0.5)
    np.testing.assert_allclose(rates(rate, 7), [0.5, 0.75, 1, 6 / 7, 2 / 3, 2 / 5, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "expected"), [(0, [1, 1, 1]), (-5, [1, 1, 1]), (1, [1, 0.25, 0.25])]
)
def test_rex_short_runs(steps, expected):
    with jax.debug_nans(True):
        np.testing.assert_array_equal(
            rates(ok.rex_schedule(1.0, steps, end_value=0.25), 3), expected
        )


def test_rex_may_rise():
    assert np.all(np.diff(rates(ok.rex_schedule(0.1, 8, end_value=1.0), 9)) > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": 1.0}, "shape must be >= 0 and < 1, got 1"),
        ({"shape": -0.1}, "shape must be >= 0 and < 1, got -0.1"),
        ({"init_value": -1.0}, "init_value must be >= 0, got -1"),
        ({"end_value": -1.0}, "end_value must be >= 0, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
    ],
)
def test_bad_rex(change, message):
    with pytest.raises(ValueError, match=message):
        ok.rex_schedule(**{"init_value": 1.0, "transition_steps": 4, **change})


def test_cosine_profile_is_optax_cosine():
    ours = ok.profile_schedule("cosine", 0.3, 9, end_value=0.06)
    theirs = optax.cosine_decay_schedule(0.3, 9, alpha=0.2)
    np.testing.assert_allclose(rates(ours, 12), [theirs(c) for c in range(12)], rtol=1e-6)


def test_rex_profile_is_rex():
    ours = ok.profile_schedule("rex", 0.3, 9, end_value=0.1, warmup_steps=3)
    theirs = ok.rex_schedule(0.3, 9, end_value=0.1, warmup_steps=3)
    np.testing.assert_allclose(rates(ours, 14), rates(theirs, 14), rtol=1e-6)


def test_exponential_profile_is_optax_exponential():
    ours = ok.profile_schedule("exponential", 1.0, 8, gamma=np.log(4.0))
    theirs = optax.exponential_decay(1.0, 8, 0.25)
    np.testing.assert_allclose(rates(ours, 9), [theirs(c) for c in range(9)], rtol=1e-6)
    assert float(ours(100)) == pytest.approx(0.25)


def test_a_function_as_profile():
    ours = ok.profile_schedule(lambda p: (1 - p) ** 2, 4.0, 2)
    np.testing.assert_array_equal(rates(ours, 4), [4, 1, 0, 0])


def test_warmup_is_read_at_every_count_and_sampling_starts_after_it():
    ours = ok.profile_schedule("linear", 1.0, 8, sampling=4, warmup_steps=2)
    np.testing.assert_array_equal(rates(ours, 12), [0, 0.5, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "step"}, "profile must be one of .*'exponential', got 'step'"),
        ({"profile": "exponential"}, "gamma must be >= 0 with profile='exponential', got None"),
        ({"gamma": -1.0}, "gamma must be >= 0, got -1"),
        ({"sampling": 0}, "sampling must be an integer >= 1, got 0"),
        ({"sampling": "always"}, "sampling must be 'every', .* got 'always'"),
        ({"sampling": (0.6, 0.3)}, r"sampling must be .*, got \(0.6, 0.3\)"),
        ({"sampling": (0.5, 1.0)}, r"sampling must be .*, got \(0.5, 1.0\)"),
        ({"sampling": ()}, r"sampling must be .*, got \(\)"),
        ({"sampling": True}, "sampling must be .*, got True"),
        ({"sampling": 2.5}, "sampling must be an integer >= 1, got 2.5"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
    ],
)
def test_bad_profile_schedule(change, message):
    kwargs = {"profile": "linear", "init_value": 1.0, "transition_steps": 8, **change}
    with pytest.raises(ValueError, match=message):
        ok.profile_schedule(**kwargs)


def test_sampling_every_count_changes_nothing():
    schedule = optax.cosine_decay_schedule(1.0, 10)
    sampled = ok.sample_schedule(schedule, 10, "every")
    np.testing.assert_allclose(rates(sampled, 12), [schedule(c) for c in range(12)], rtol=1e-6)


def test_a_step_schedule_is_an_exponential_read_at_milestones():
    decades = optax.exponential_decay(1.0, 30, 0.1)  # a tenth every 30 %
    sampled = ok.sample_schedule(decades, 100, (0.3, 0.6, 0.9))
    steps = optax.piecewise_constant_schedule(1.0, {30: 0.1, 60: 0.1, 90: 0.1})
    np.testing.assert_allclose(rates(sampled, 105), [steps(c) for c in range(105)], rtol=1e-5)


def test_sampling_refuses_what_is_no_schedule():
    with pytest.raises(ValueError, match=r"schedule must be a function of the count, got 0\.1"):
        ok.sample_schedule(0.1, 10, 2)


@pytest.mark.parametrize("k", [1, 3, 7, 10, 49, 93])
def test_every_kth_count_is_exact_in_single_precision(k):
    counts = np.arange(2000)
    read = jax.jit(lambda c: sample_count(c, 0, k))(counts)
    np.testing.assert_array_equal(read, k * (counts // k))


def test_milestones_fall_on_the_exact_count():
    counts = jnp.arange(220)
    read = jax.jit(lambda steps: sample_count(counts, steps, (0.1, 0.3, 0.6, 0.9)))
    milestones = [Fraction(digit, 10) for digit in (1, 3, 6, 9)]
    for steps in range(1, 200, 3):
        passed = [sum(Fraction(c, steps) >= m for m in milestones) for c in range(220)]
        expected = np.array([0, *map(float, milestones)])[passed] * steps
        np.testing.assert_allclose(read(steps), expected, rtol=1e-6)
