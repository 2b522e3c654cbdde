"""The curves, the join and the cycles that all schedules are made of."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from optimkit.schedules.phases import after_warmup, check_budgets, constant, cycles, join
from optimkit.schedules.shapes import (
    DECAYS,
    PROFILES,
    RATIO_DECAYS,
    between,
    check_ends,
    half_cosine,
    progress,
    rational_map,
    transition,
)

# The factor at a quarter, the middle and three quarters; and for the ratio decays the rates
# themselves, from 4 to 1.
QUARTERS = {
    "linear": (0.75, 0.5, 0.25),
    "1-sqrt": (0.5, 1 - 0.5**0.5, 1 - 0.75**0.5),
    "cosine": ((1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2),
    "square": (15 / 16, 3 / 4, 7 / 16),
    "mirror_cosine": (1.5 - (1 + 0.5**0.5) / 2, 0.5, 0.5 - (1 - 0.5**0.5) / 2),
    "rex": (6 / 7, 2 / 3, 2 / 5),
    "rsqrt": tuple(1 - ((1 + 10 * x) ** -0.5 - 1) / (11**-0.5 - 1) for x in (0.25, 0.5, 0.75)),
    "shifted_exponential": tuple((math.exp(y) - 1) / (math.e - 1) for y in (0.75, 0.5, 0.25)),
    "exponential": (4 / 2**0.5, 2.0, 2**0.5),
    "inverse": (16 / 7, 1.6, 16 / 13),
}


class ShapesTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters(*QUARTERS)
    def test_quarters(self, name):
        steps = self.variant(lambda x: DECAYS[name](x, jnp.float32(4.0), jnp.float32(1.0)))
        rates = steps(jnp.array([0.0, 0.25, 0.5, 0.75, 1.0]))
        inner = QUARTERS[name]
        if name in PROFILES:
            inner = [1 + 3 * factor for factor in inner]
        chex.assert_trees_all_close(rates, jnp.array([4.0, *inner, 1.0]), rtol=1e-6)


def test_every_decay_is_tested():
    assert set(QUARTERS) == set(DECAYS) == set(PROFILES) | set(RATIO_DECAYS)


@pytest.mark.parametrize("name", PROFILES)
def test_the_ends_are_exact(name):
    start, end = jnp.float32(0.3), jnp.float32(0.1)
    assert DECAYS[name](jnp.float32(0), start, end) == start
    assert DECAYS[name](jnp.float32(1), start, end) == end


@pytest.mark.parametrize("name", RATIO_DECAYS)
@pytest.mark.parametrize("ends", [(0.0, 0.1), (0.1, 0.0), (0.0, 0.0)])
def test_zero_ends_of_a_ratio_decay_stay_finite(name, ends):
    # Concrete zeros are refused; a traced value may still become zero.
    with jax.debug_nans(True), jax.debug_infs(True):
        rates = DECAYS[name](jnp.linspace(0, 1, 5), *map(jnp.float32, ends))
    assert np.all(np.isfinite(rates))


def test_progress_is_clipped_and_an_empty_phase_is_over_at_once():
    np.testing.assert_array_equal(progress(np.arange(-2, 6), 4), [0, 0, 0, 0.25, 0.5, 0.75, 1, 1])
    for length in (0, -3):
        np.testing.assert_array_equal(progress(np.arange(-1, 2), length), [0, 1, 1])
        np.testing.assert_array_equal(progress(np.arange(-1, 2), length, if_empty=0.0), [0, 0, 0])


def test_rational_map():
    z = jnp.linspace(0, 1, 5)
    np.testing.assert_array_equal(rational_map(z, 0.0), z)
    np.testing.assert_allclose(rational_map(z, -1.0), z / (2 - z), rtol=1e-6)
    assert rational_map(jnp.float32(0), jnp.float32(1)) == 0  # 0/0 without the guard


def test_transition_takes_a_name_or_a_curve():
    named = transition(1.0, 0.2, 8, "cosine")
    given = transition(1.0, 0.2, 8, between(half_cosine))
    np.testing.assert_array_equal(named(np.arange(10)), given(np.arange(10)))


def test_join_counts_every_phase_from_its_own_start():
    pieces = join((0, constant(9.0)), (2, lambda c: c), (2, lambda c: 10 + c), (4, lambda c: -c))
    np.testing.assert_array_equal(pieces(np.arange(-1, 7)), [9, 9, 9, 10, 11, 0, -1, -2])


def test_join_never_starts_an_infinitely_late_phase():
    pieces = join((0, constant(1.0)), (float("inf"), transition(1.0, 0.0, 5)))
    np.testing.assert_array_equal(pieces(np.array([0, 2**31 - 2])), [1, 1])


def test_after_warmup():
    rate = after_warmup(constant(4.0), warmup_steps=4, start_value=2.0, peak_value=4.0)
    np.testing.assert_array_equal(rate(np.arange(6)), [2, 2.5, 3, 3.5, 4, 4])


def test_cycles_pass_index_and_length():
    built = []

    def build(index, length):
        built.append((index, length))
        return lambda count: 10 * index + count

    rate = cycles(build, np.array([2, 5, 6]), end_value=-1.0)
    assert built == [(0, 2), (1, 3), (2, 1)]
    np.testing.assert_array_equal(rate(np.arange(8)), [0, 1, 10, 11, 12, 20, -1, -1])


@pytest.mark.parametrize("bad", [[], [0, 5], [5, 5], [5, 3], [2.5], [True], 7, "12"])
def test_bad_budgets(bad):
    with pytest.raises(ValueError, match="budgets must be increasing integers above 0, got"):
        check_budgets(bad)


def test_check_ends():
    check_ends("linear", end_value=0.0)
    check_ends("inverse", peak_value=1.0, end_value=0.1)
    with pytest.raises(ValueError, match=r"peak_value \(with decay='exponential'\) must be > 0"):
        check_ends("exponential", peak_value=0.0, end_value=0.1)
    with pytest.raises(ValueError, match="end_value must be >= 0, got -1"):
        check_ends("linear", end_value=-1.0)
