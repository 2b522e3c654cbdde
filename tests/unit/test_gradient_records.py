"""Recorded gradient norms, and noise that multiplies the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimkit as ok

GRADS = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[12.0]])}


def run(tx, sequence):
    def step(state, grads):
        updates, state = tx.update(grads, state)
        return state, updates

    first = jax.tree.map(lambda g: g[0], sequence)
    return jax.jit(lambda: jax.lax.scan(step, tx.init(first), sequence))()


def times(factors):
    return jax.tree.map(lambda g: jnp.asarray(factors).reshape(-1, *[1] * g.ndim) * g[None], GRADS)


@pytest.mark.parametrize(("order", "norm"), [(2, 13.0), (1, 19.0)])
def test_norms_over_all_leaves_and_no_further_than_asked(order, norm):
    sequence = times([1.0, 0.0, 2.0, 5.0])
    state, passed = run(ok.record_gradient_norms(3, ord=order), sequence)
    np.testing.assert_allclose(state.norms, [norm, 0, 2 * norm], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, passed, sequence)


def test_a_recorded_run_gives_a_schedule():
    state, _ = run(ok.record_gradient_norms(4), times([2.0, 1.0, 1.0, 1.0]))
    rate = ok.refined_schedule(state.norms, filter_fraction=0.0)
    np.testing.assert_allclose([rate(c) for c in range(4)], [0.375, 1, 0.5, 0], rtol=1e-6)


def test_noise_multiplies_each_leaf_by_one_number_around_one():
    noisy = run(ok.multiplicative_gradient_noise(0.1, seed=3), times(jnp.ones(400)))[1]
    ratios = jax.tree.map(lambda n, g: n / g[None], noisy, GRADS)
    np.testing.assert_allclose(ratios["a"][:, 0], ratios["a"][:, 1], rtol=1e-6)
    drawn = np.stack([ratios["a"][:, 0], ratios["b"][:, 0, 0]])
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.2
    np.testing.assert_allclose(drawn.mean(axis=1), 1, atol=0.02)
    np.testing.assert_allclose(drawn.std(axis=1), 0.1, atol=0.015)


def test_noise_of_the_tree_keeps_its_direction_and_zero_noise_is_nothing():
    shared = run(ok.multiplicative_gradient_noise(0.5, seed=0, share="tree"), times([1.0, 1.0]))[1]
    ratios = shared["a"] / GRADS["a"][None]
    np.testing.assert_allclose(ratios[:, :1], shared["b"][:, :, 0] / 12, rtol=1e-6)
    assert ratios[0, 0] != ratios[1, 0]
    none = run(ok.multiplicative_gradient_noise(0.0, seed=0), times([1.0]))[1]
    jax.tree.map(np.testing.assert_array_equal, none, times([1.0]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ok.record_gradient_norms(0), "total_steps must be an integer >= 1, got 0"),
        (lambda: ok.record_gradient_norms(3, ord=3), "ord must be 1 or 2, got 3"),
        (lambda: ok.multiplicative_gradient_noise(-1.0, seed=0), "std must be >= 0, got -1"),
        (lambda: ok.multiplicative_gradient_noise(1.0, seed=-1), "seed must be an integer >= 0"),
        (
            lambda: ok.multiplicative_gradient_noise(1.0, seed=0, share="row"),
            "share must be one of 'leaf', 'tree', got 'row'",
        ),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
