"""Safe arithmetic and range checks, also on values that hypothesis draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optimkit import numerics

ANY_F32 = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float32, st.sampled_from([(1,), (7,), (3, 4)]), elements=ANY_F32)


@settings(deadline=None, max_examples=60)
@given(ARRAYS)
def test_safe_norm_never_overflows(x: np.ndarray) -> None:
    norm = float(numerics.safe_norm(jnp.asarray(x)))
    assert norm == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(ARRAYS, ARRAYS)
def test_safe_div_is_finite_where_the_quotient_is(x: np.ndarray, y: np.ndarray) -> None:
    y = np.resize(y, x.shape)
    got = np.asarray(numerics.safe_div(jnp.asarray(x), jnp.asarray(y), otherwise=7.0))
    assert np.all(got[y == 0] == 7.0)
    assert not np.any(np.isnan(got))


@settings(deadline=None, max_examples=40)
@given(st.floats(0.5, 0.99999), st.integers(1, 10**6))
def test_one_minus_power_keeps_its_digits(decay: float, count: int) -> None:
    exact = -np.expm1(count * np.log(decay))
    assert float(numerics.one_minus_power(decay, count)) == pytest.approx(exact, rel=3e-6)


def test_one_minus_power_at_the_ends() -> None:
    assert float(numerics.one_minus_power(0.0, 1)) == 1.0
    assert float(numerics.one_minus_power(jnp.float32(0.0), 3)) == 1.0
    # The plain expression is off by 5e-5 of itself here.
    assert float(numerics.one_minus_power(0.999, 1)) == pytest.approx(1e-3, rel=1e-6)


def test_safe_norm_of_nothing_and_of_extremes() -> None:
    assert float(numerics.safe_norm(jnp.zeros((0, 3)))) == 0.0
    assert numerics.safe_norm(jnp.zeros((0, 3)), 0).shape == (3,)
    assert float(numerics.safe_norm(jnp.full(4, 1e30))) == pytest.approx(2e30)
    assert float(numerics.safe_norm(jnp.full(4, 1e-30))) == pytest.approx(2e-30)
    assert np.isnan(float(numerics.safe_norm(jnp.array([1.0, np.nan]))))
    rows = numerics.safe_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]]), 1, keepdims=True)
    np.testing.assert_allclose(rows, [[5.0], [0.0]])


def test_subnormal_numbers_are_not_half_zero() -> None:
    # Compiled code flushes them in some operations and not in others.
    tiny = jnp.full((3, 4), 1e-39)
    assert np.all(np.isfinite(jax.jit(lambda x: numerics.safe_norm(x, ()))(tiny)))
    assert np.all(np.isfinite(jax.jit(numerics.safe_norm)(tiny)))
    assert np.all(np.isfinite(jax.jit(numerics.safe_div)(jnp.ones((3, 4)), tiny)))


def test_gradient_through_a_norm_at_zero_is_finite() -> None:
    slope = jax.grad(lambda x: numerics.safe_div(x, jnp.abs(x)).sum())(jnp.zeros(2))
    assert np.all(np.isfinite(slope))


def test_saturate_limits_finite_entries_only() -> None:
    x = jnp.array([1.0, -1e30, np.inf, np.nan])
    np.testing.assert_array_equal(numerics.saturate(x), np.float32([1.0, -1e15, np.inf, np.nan]))


def test_tree_reductions() -> None:
    a = {"x": jnp.array([1.0, 2.0], jnp.bfloat16), "y": jnp.float32(3.0)}
    assert float(numerics.tree_vdot(a, a)) == 14.0
    assert float(numerics.tree_norm(a)) == pytest.approx(14**0.5)
    assert float(numerics.tree_norm({})) == 0.0
    assert numerics.tree_vdot(a, a).dtype == jnp.float32


def test_counts() -> None:
    largest = jnp.asarray(2**31 - 1, jnp.int32)
    assert int(numerics.next_count(largest)) == 2**31 - 1
    assert int(numerics.next_count(jnp.zeros((), jnp.int32))) == 1
    assert [bool(numerics.due(jnp.int32(t), 3)) for t in range(4)] == [True, False, False, True]
    assert [bool(numerics.due(jnp.int32(t), 3, phase=1)) for t in range(3)] == [False, True, False]
    assert not bool(numerics.due(jnp.int32(0), 0))


def test_counts_become_wide_floats(x64: None) -> None:
    assert (numerics.as_float(jnp.int32(7)) / 8).dtype == jnp.float64


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"b1": 1.0, "ge": 0, "lt": 1}, "b1 must be >= 0 and < 1, got 1"),
        ({"eps": float("nan"), "ge": 0}, "eps must be >= 0, got nan"),
        ({"rates": jnp.array([0.1, -0.1]), "ge": 0}, r"rates must be >= 0, got \[0.1"),
        ({"learning_rate": np.float32(-1), "ge": 0}, "learning_rate must be >= 0, got -1"),
    ],
)
def test_range_checks_name_the_argument(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numerics.check_range(**keywords)


def test_range_checks_skip_what_is_not_known_yet() -> None:
    numerics.check_range(learning_rate=lambda count: -1.0, decay=None, ge=0)
    jax.jit(lambda b: [numerics.check_range(b1=b, ge=0, lt=1), b][1])(5.0)
    jax.vmap(lambda b: [numerics.check_range(b1=b, ge=0, lt=1), b][1])(jnp.array([5.0]))


def test_word_and_count_checks() -> None:
    with pytest.raises(ValueError, match="form must be one of 'a', 'b', got 'c'"):
        numerics.check_choice(("a", "b"), form="c")
    with pytest.raises(ValueError, match=r"interval must be an integer >= 0, got 2\.5"):
        numerics.check_count(interval=2.5)
    with pytest.raises(ValueError, match="rank must be an integer >= 1, got 0"):
        numerics.check_count(rank=0, least=1)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((64, 3), (0,)), ((3, 64), (1,)), ((2, 72, 5), (0, 1)), ((80,), (0,)), ((5, 3), (0,))],
)
@pytest.mark.parametrize("number", [1, 3])
def test_sums_together_are_sums(shape, axes, number) -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(number)]
    got = jax.jit(lambda xs: numerics.sums_together(xs, axes))(arrays)
    for x, total in zip(arrays, got, strict=True):
        expected = np.sum(np.asarray(x, np.float64), axis=axes, keepdims=True)
        assert total.shape == expected.shape
        np.testing.assert_allclose(total, expected, atol=1e-5)


def test_sums_together_can_be_mapped_and_differentiated() -> None:
    x = jnp.arange(128.0).reshape(2, 64)

    def total(x):
        a, b = numerics.sums_together([x, jnp.square(x)], (0,))
        return (a + b)[0]

    np.testing.assert_allclose(jax.vmap(total)(x), jnp.sum(x + x**2, axis=1))
    np.testing.assert_allclose(jax.grad(total)(x[0]), 1 + 2 * x[0])


def test_a_turn_changes_nothing() -> None:
    x = jnp.arange(4.0)
    wait = jax.jit(numerics.in_turn)
    for previous in (0.0, -2.0, jnp.nan, -jnp.inf):
        np.testing.assert_array_equal(wait(x, jnp.float32(previous)), x)
    assert numerics.turn_after(x, None) is None  # too small to take a turn
    large = jnp.full(2**14, 3.0)
    assert float(numerics.turn_after(large, None)) == 3
    assert float(numerics.turn_after(large, None, jnp.float32(7))) == 7
