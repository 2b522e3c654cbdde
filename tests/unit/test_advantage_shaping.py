"""Shaped advantages against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.controllers import RankMeasures, rank_advantage_shaping, update_rank_means

MEANS = RankMeasures(10.0, 2.0, 0.5)


def measures(*rows):
    return RankMeasures(*(jnp.array(column) for column in zip(*rows, strict=True)))


def test_the_acceleration_weighs_rank_against_velocity():
    # Deviations (+1/2, -1/2, +1/2), (+1/2, -1/2, -1/2), (-5 by the limit, +5, -1).
    given = measures((15.0, 1.0, 0.75), (15.0, 1.0, 0.25), (-90.0, 22.0, 0.0))
    u = []
    for rank, velocity, acceleration in ((0.5, -0.5, 0.5), (0.5, -0.5, -0.5), (-5, 5, -1)):
        w = 1 / (1 + math.exp(-1.5 * acceleration))
        u.append(w * math.tanh(rank) + (1 - w) * math.tanh(velocity))
    assert u[0] > 0.16
    assert u[1] < 0
    shaped = rank_advantage_shaping(jnp.array([1.0, 1.0, 10.0]), given, MEANS)
    np.testing.assert_allclose(shaped, [1 + u[0], 1, 10 + u[2]], rtol=1e-6)
    half = rank_advantage_shaping(jnp.array([1.0, 1.0, 10.0]), given, MEANS, performance=0.5)
    np.testing.assert_allclose(half, [1 + u[0] / 2, 1, 10 + u[2] / 2], rtol=1e-6)


def test_the_bonus_is_at_most_half_the_advantage():
    given = measures((1e9, 1e9, 0.5), (1e9, 1e9, 0.5))
    advantages = jnp.array([[1.0, -1.0, 0.0], [4.0, -4.0, 0.5]], jnp.bfloat16)
    shaped = jax.jit(rank_advantage_shaping)(advantages, given, MEANS)
    assert shaped.dtype == jnp.bfloat16
    np.testing.assert_allclose(  # u is 1 but for tanh(5)
        np.asarray(shaped, np.float32), [[1.5, -0.5, 0], [5, -3, 0.75]], rtol=1e-2
    )


def test_the_means_run_over_steps_from_zero():
    batch = measures((9.0, 1.0, -1.0), (11.0, 3.0, 1.0))
    first = update_rank_means(None, batch)
    np.testing.assert_allclose(first, [7.0, 1.4, 0.0], rtol=1e-6)
    np.testing.assert_allclose(update_rank_means(first, batch), [9.1, 1.82, 0.0], rtol=1e-6)
    np.testing.assert_allclose(update_rank_means(first, batch, weight=1.0), [10, 2, 0], rtol=1e-6)


def test_a_zero_mean_gives_the_limit_and_nothing_else_breaks():
    given = measures((1.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    zeros = RankMeasures(0.0, 0.0, 0.0)
    shaped = rank_advantage_shaping(jnp.array([2.0, 2.0]), given, zeros)
    np.testing.assert_allclose(shaped, [2 + math.tanh(5) / 2, 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gain": -1.0}, "gain must be >= 0, got -1"),
        ({"performance": -1.0}, "performance must be >= 0, got -1"),
        ({"limit": 0.0}, "limit must be > 0, got 0"),
        ({"advantages": jnp.ones(3)}, r"measures.rank has shape \(1,\), but .* need \(3,\)"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {"advantages": jnp.ones(1), "measures": measures((1.0, 1.0, 1.0)), "means": MEANS}
    with pytest.raises(ValueError, match=message):
        rank_advantage_shaping(**{**given, **arguments})
    with pytest.raises(ValueError, match="weight must be >= 0 and <= 1, got 2"):
        update_rank_means(None, given["measures"], weight=2.0)
