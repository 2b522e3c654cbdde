"""Lanczos and what is read off it, on matrices whose spectrum is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit import diagnostics
from optimkit.gradients import lanczos, slq_density

KEY = jax.random.key(0)
SPECTRUM = jnp.concatenate([jnp.linspace(0.0, 1.0, 28), jnp.array([-2.0, 5.0])])


def loss(w, scale):
    return jnp.sum(scale * w["x"] ** 2) / 2


W = {"x": jnp.ones(30)}


def test_extremes_trace_and_density():
    found = jax.jit(lambda w: diagnostics.hessian_extremes(loss, w, SPECTRUM, KEY, 12))(W)
    np.testing.assert_allclose(found["lambda_max"], 5.0, rtol=1e-5)
    np.testing.assert_allclose(found["lambda_min"], -2.0, rtol=1e-4)
    np.testing.assert_allclose(found["weights"].sum(), 1.0, rtol=1e-5)
    trace = diagnostics.hessian_trace(loss, W, SPECTRUM, KEY, num_samples=2)
    np.testing.assert_allclose(trace, SPECTRUM.sum(), rtol=1e-5)  # no error on a diagonal


def test_a_space_that_is_used_up_adds_no_values():
    scale = jnp.array([2.0, 2.0, 3.0])
    found = lanczos(lambda v: scale * v, jnp.ones(3), 6)
    nodes, weights = slq_density(found.alphas, found.betas)
    np.testing.assert_allclose([nodes[0], nodes[-1]], [2.0, 3.0], rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(weights * nodes), 7 / 3, rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_stability_line():
    found = diagnostics.stability_metrics(
        loss, W, SPECTRUM, KEY, 0.2, momentum=0.5, num_iters=10, num_samples=1
    )
    np.testing.assert_allclose(found["gd_threshold"], 15.0)
    np.testing.assert_allclose(found["eta_lambda_over_2"], 0.5, rtol=1e-4)
    np.testing.assert_allclose(found["eta_trace_over_2"], SPECTRUM.sum() / 10, rtol=1e-5)
    np.testing.assert_allclose(found["fro"], jnp.linalg.norm(SPECTRUM), rtol=1e-5)


def test_noise_of_batches():
    rng = np.random.default_rng(0)
    # Hessians diag(x_i): the variance of the 30 diagonal entries is 4, and 0 beside them.
    first, second = (jnp.asarray(rng.normal(0, 2, (64, 30)), jnp.float32) for _ in range(2))

    def mean_loss(w, x):
        return jnp.mean(x @ w["x"] ** 2) / 2

    total = diagnostics.hessian_noise(mean_loss, W, (first, second), (64, 64), KEY, 20)
    np.testing.assert_allclose(total, 4.0, rtol=0.5)  # P sigma^2 = 30 * 30 * (4 / 30) / 30
    whole = diagnostics.noisy_extreme(1.0, 64, 64, 1.0, 100)
    np.testing.assert_allclose(whole, 1.0)  # the whole data has no noise
    rates = [float(diagnostics.max_learning_rate_sgd(1.0, b, 1e9, 1.0, 1e4)) for b in (1, 4, 1e6)]
    np.testing.assert_allclose(rates, [0.01, 0.02, 2 / 1.01], rtol=1e-3)
    np.testing.assert_allclose(diagnostics.scale_learning_rate(0.1, 8, 32, "sqrt"), 0.2)


def train(tx, scale, steps, **extra):
    params, state = W, tx.init(W)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, scale)
        updates, state = tx.update(grads, state, params, value_fn=lambda w: loss(w, scale), **extra)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_the_learned_rate_is_polyaks():
    scale = jnp.linspace(1.0, 9.0, 30)
    tx = ok.lanczos_learning_rate(optax.sgd, every=10, num_iters=30, max_lr=10.0)
    end, state = train(tx, scale, 2)
    low, high = 5.0**0.5, 3.0  # the median stands for the small end
    np.testing.assert_allclose(state.learning_rate, (2 / (high + low)) ** 2, rtol=1e-2)
    np.testing.assert_allclose(state.momentum, ((high - low) / (high + low)) ** 2, rtol=3e-2)
    assert float(loss(end, scale)) < float(loss(W, scale))


def test_a_saddle_changes_nothing():
    tx = ok.lanczos_learning_rate(optax.sgd, rule="one_over_max", max_lr=0.125, num_iters=3)
    _, state = train(tx, -jnp.ones(30), 1)
    assert float(state.learning_rate) == 0.125
    assert float(state.lambda_max) == 0


def test_messages():
    tx = ok.lanczos_learning_rate(optax.sgd)
    with pytest.raises(ValueError, match=r"hvp_fn=.* or update\(..., value_fn=loss\)"):
        tx.update(W, tx.init(W), W)
    with pytest.raises(ValueError, match="rule must be one of"):
        ok.lanczos_learning_rate(optax.sgd, rule="newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every must be an integer >= 1"):
        ok.lanczos_learning_rate(optax.sgd, every=0)
    with pytest.raises(ValueError, match="num_samples must be an integer >= 1"):
        diagnostics.hessian_trace(loss, W, SPECTRUM, KEY, 0)
    with pytest.raises(ValueError, match="learning_rate must be > 0"):
        diagnostics.stability_metrics(loss, W, SPECTRUM, KEY, 0.0)
