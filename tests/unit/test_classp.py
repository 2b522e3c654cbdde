"""CLASSP: its two gates, its sum, and the change from one task to the next."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok


def directions(tx, *gradients):
    state = tx.init(jnp.zeros_like(gradients[0]))
    out = []
    for g in gradients:
        u, state = tx.update(g, state)
        out.append(u)
    return np.asarray(out), state


def test_gated_entries_neither_move_nor_count():
    tx = ok.scale_by_classp(0.25, eps=0.0, power=2, gate="element", accumulate="power")
    g = jnp.array([3.0, 0.5, 0.0])
    (first, second), state = directions(tx, g, jnp.array([4.0, 1.0, 0.1]))
    np.testing.assert_allclose(first, [1.0, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(second, [4 / 5, 1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(state.magnitude_sum, [25.0, 1.0, 0.0], rtol=1e-6)


def test_published_sum_ignores_the_power():
    tx = ok.scale_by_classp(0.0, eps=0.0, power=2)
    (u,), state = directions(tx, jnp.array([4.0, -9.0]))
    np.testing.assert_allclose(u, [2.0, -3.0], rtol=1e-6)
    np.testing.assert_allclose(state.magnitude_sum, [4.0, 9.0])


def test_a_published_threshold_of_one_lets_nothing_pass():
    (u,), state = directions(ok.scale_by_classp(1.0), jnp.array([5.0]))
    assert u == 0
    assert state.magnitude_sum == 0


def test_sum_gathered_without_scaling_serves_the_next_task():
    gather = ok.scale_by_classp(0.0, eps=0.0, apply_scaling=False)
    (u,), state = directions(gather, jnp.array([3.0]))
    assert u == 3
    u, _ = ok.scale_by_classp(0.0, eps=0.0).update(jnp.array([1.0]), state)
    np.testing.assert_allclose(u, [0.25])


def test_squares_with_threshold_zero_are_adagrad():
    tx = ok.classp(0.1, 0.0, 1e-8, 2, gate="element", accumulate="power")
    adagrad = optax.chain(optax.scale_by_rss(0.0, eps=1e-8), optax.scale(-0.1))
    params = jnp.array([1.0, -2.0])
    state, other = tx.init(params), adagrad.init(params)
    for scale in (1.0, 0.3):
        g = scale * jnp.array([0.5, -2.0])
        u, state = tx.update(g, state, params)
        v, other = adagrad.update(g, other, params)
    np.testing.assert_allclose(u, v, rtol=1e-5)


def test_element_gate_keeps_nan_out_of_the_sum():
    g = jnp.array([jnp.nan, 1.0])
    _, state = directions(ok.scale_by_classp(1e-4, gate="element"), g)
    np.testing.assert_array_equal(state.magnitude_sum, [0.0, 1.0])
    _, state = directions(ok.scale_by_classp(0.5), g)
    assert jnp.isnan(state.magnitude_sum[0])


def test_start_of_the_sum():
    (u,), _ = directions(ok.scale_by_classp(0.0, eps=0.0, initial_accumulator=3.0), jnp.ones(1))
    assert u == 0.25


@pytest.mark.parametrize("power", [2, 3])
def test_a_huge_entry_does_not_end_a_weight(power):
    tx = ok.scale_by_classp(0.0, power=power, gate="element", accumulate="power")
    (_, u), state = directions(tx, jnp.full(1, 1e30), jnp.ones(1))
    assert jnp.isfinite(state.magnitude_sum).all()
    assert u > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power": 0.5}, "power must be >= 1, got 0.5"),
        ({"eps": -1.0}, "eps must be >= 0, got -1"),
        ({"threshold": -1.0}, "threshold must be >= 0, got -1"),
        ({"learning_rate": -1.0}, "learning_rate must be >= 0, got -1"),
        ({"initial_accumulator": -1.0}, "initial_accumulator must be >= 0"),
        ({"gate": "leaf"}, "gate must be one of 'element', 'any', got 'leaf'"),
        ({"accumulate": "square"}, "accumulate must be one of 'abs', 'power', got 'square'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ok.classp(**arguments)


def test_another_shape_is_refused():
    tx = ok.scale_by_classp()
    state = tx.init({"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \(1,\)"):
        jax.eval_shape(tx.update, {"w": jnp.zeros(1)}, state)
