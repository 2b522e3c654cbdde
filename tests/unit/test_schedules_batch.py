"""Rates and regimes for a larger batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.schedules import adapt_regime


def rates(schedule, n):
    return np.asarray(schedule(np.arange(n)))


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 2.0), ("linear", 4.0), ("none", 1.0)])
def test_the_rules(rule, factor):
    schedule = ok.linear_decay_schedule(1.0, 4)
    scaled = ok.scale_lr_for_batch(schedule, 1024, rule=rule)
    np.testing.assert_allclose(rates(scaled, 6), factor * rates(schedule, 6), rtol=1e-6)
    assert float(ok.scale_lr_for_batch(0.5, 1024, rule=rule)) == 0.5 * factor
    assert float(ok.scale_lr_for_batch(0.5, 32, base_batch_size=128)) == 0.25


def test_a_rate_may_be_traced():
    traced = jax.jit(ok.scale_lr_for_batch)(0.5, 1024)
    assert float(traced) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be > 0, got 0"),
        ({"base_batch_size": -1}, "base_batch_size must be > 0, got -1"),
        ({"lr_or_schedule": -0.1}, "lr_or_schedule must be >= 0, got -0.1"),
        ({"rule": "cubic"}, "rule must be one of 'sqrt', 'linear', 'none', got 'cubic'"),
    ],
)
def test_bad_scale(change, message):
    with pytest.raises(ValueError, match=message):
        ok.scale_lr_for_batch(**{"lr_or_schedule": 0.1, "batch_size": 256, **change})


def test_stretch():
    schedule = optax.cosine_decay_schedule(1.0, 10)
    longer = ok.stretch_schedule(schedule, 3)
    np.testing.assert_allclose(rates(longer, 40)[::3], [schedule(c) for c in range(14)], rtol=1e-6)
    shorter = ok.stretch_schedule(schedule, 0.5)
    np.testing.assert_allclose(rates(shorter, 6), [schedule(2 * c) for c in range(6)], rtol=1e-6)


def test_bad_stretch():
    with pytest.raises(ValueError, match="factor must be > 0, got 0"):
        ok.stretch_schedule(optax.constant_schedule(1.0), 0)
    with pytest.raises(ValueError, match=r"schedule must be a function of the count, got 0\.1"):
        ok.stretch_schedule(0.1, 2)


REGIME = {"boundaries": [2, 3], "values": [4.0, 2.0, 1.0], "num_epochs": 5}


def test_regime_keeps_the_number_of_updates():
    examples = 96
    small = adapt_regime(**REGIME, batch_size=8, base_batch_size=8)
    large = adapt_regime(**REGIME, batch_size=32, base_batch_size=8)
    assert (large.boundaries, large.num_epochs) == ((8, 12), 20)
    assert small.num_epochs * (examples // 8) == large.num_epochs * (examples // 32)
    counts = np.arange(60)
    np.testing.assert_allclose(
        large.schedule(examples // 32)(counts), 2 * small.schedule(examples // 8)(counts)
    )


def test_regime_rounds_up_and_never_shortens():
    boundaries, values, num_epochs = adapt_regime(**REGIME, batch_size=9, base_batch_size=8)
    assert (boundaries, num_epochs) == ((4, 6), 10)
    np.testing.assert_allclose(values, np.sqrt(9 / 8) * np.array([4, 2, 1]), rtol=1e-6)
    smaller = adapt_regime(**REGIME, batch_size=2, base_batch_size=8)
    assert (smaller.boundaries, smaller.num_epochs) == ((2, 3), 5)
    np.testing.assert_allclose(smaller.values, [2, 1, 0.5])
    kept = adapt_regime(**REGIME, batch_size=32, base_batch_size=8, adapt_epochs=False)
    assert (kept.boundaries, kept.num_epochs) == ((2, 3), 5)


def test_regime_by_epoch_and_by_step():
    regime = adapt_regime(**REGIME, batch_size=8, base_batch_size=8)
    np.testing.assert_array_equal([regime(epoch) for epoch in range(5)], [4, 4, 2, 1, 1])
    traced = jax.jit(lambda steps: regime.schedule(steps)(jnp.arange(9)))(2)
    np.testing.assert_array_equal(traced, [4, 4, 4, 4, 2, 2, 1, 1, 1])
    constant = adapt_regime([], [3.0], 0, batch_size=8, base_batch_size=8, lr_rule="linear")
    np.testing.assert_array_equal(constant.schedule(7)(np.arange(3)), [3, 3, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundaries": [3, 2]}, r"boundaries must be increasing integers above 0, got \[3, 2\]"),
        ({"boundaries": [0, 2]}, "boundaries must be increasing integers above 0"),
        ({"values": [1.0]}, "values must be one more than boundaries, 3, got 1"),
        ({"values": [1.0, -2.0, 1.0]}, r"values\[1\] must be >= 0, got -2"),
        ({"num_epochs": -1}, "num_epochs must be an integer >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"base_batch_size": 0}, "base_batch_size must be an integer >= 1, got 0"),
        ({"lr_rule": "cubic"}, "lr_rule must be one of .*, got 'cubic'"),
    ],
)
def test_bad_regime(change, message):
    with pytest.raises(ValueError, match=message):
        adapt_regime(**{**REGIME, "batch_size": 8, **change})


def test_bad_steps_per_epoch():
    with pytest.raises(ValueError, match="steps_per_epoch must be > 0, got 0"):
        adapt_regime(**REGIME, batch_size=8).schedule(0)
