"""The search for a radius, the solvers, and products with approximate Hessians."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.gradients import (
    conjugate_gradient,
    fisher_product,
    gauss_newton_product,
    hessian_product,
)

W = {"a": jnp.array([1.5, -1.0]), "b": jnp.array(0.5)}


def quartic(w):
    return jnp.sum(w["a"] ** 4) / 4 + jnp.sum(w["a"] ** 2) + (w["b"] - w["a"][0]) ** 2


def minimise(tx, loss, w, steps):
    """Parameters at the end, losses, and states."""

    def step(carry, _):
        w, state = carry
        value, grads = jax.value_and_grad(loss)(w)
        updates, state = tx.update(grads, state, w, value=value, value_fn=loss)
        return (optax.apply_updates(w, updates), state), (value, state)

    run = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), None, length=steps))
    (w, _), (values, states) = run(w)
    return w, np.asarray(values), states[0]


def test_without_regularisation_it_is_newtons_step():
    w = jnp.array([3.0, -2.0])
    scale = jnp.array([1.0, 50.0])
    for solver in ("cg", "dense"):
        tx = ok.gradient_regularized_newton(gamma0=1e6, solver=solver)
        end, _, _ = minimise(tx, lambda w: jnp.sum(scale * w**2) / 2, w, 1)
        np.testing.assert_allclose(end, 0, atol=1e-3)


def test_the_search_never_climbs_and_gamma_stays_alive_at_the_minimum():
    end, values, state = minimise(ok.gradient_regularized_newton(gamma0=1e3), quartic, W, 40)
    assert (np.diff(values) <= 1e-6).all()
    assert values[-1] < 1e-9
    assert np.isfinite(state.gamma).all()
    assert state.gamma[-1] > 1e-3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(end))


def test_a_failed_try_halves_gamma_and_solves_again():
    w = jnp.array([1.0])

    def loss(w):  # the second derivative is wrong on purpose: the step is far too long
        return jnp.sum(50.0 * w**2)

    tx = ok.gradient_regularized_newton(gamma0=8.0, hessian=lambda w, v: 0 * v)
    value, grads = jax.value_and_grad(loss)(w)
    updates, state = tx.update(grads, tx.init(w), w, value=value, value_fn=loss)
    tries = int(state[0].solves)
    assert tries > 1
    np.testing.assert_allclose(state[0].gamma, 8.0 * 0.5 ** (tries - 1) * 2)
    np.testing.assert_allclose(-updates[0], 8.0 * 0.5 ** (tries - 1), rtol=1e-5)  # ||d|| = gamma


def test_negative_curvature_is_no_success():
    w = jnp.array([0.1])
    loss = lambda w: jnp.sum(w**4 / 4 - w**2 / 2)  # noqa: E731
    for solver in ("cg", "dense"):
        end, values, _ = minimise(
            ok.gradient_regularized_newton(gamma0=10.0, solver=solver), loss, w, 15
        )
        assert (np.diff(values) <= 1e-6).all()
        np.testing.assert_allclose(end, 1.0, atol=1e-3)


def test_zero_gradients_and_losses_without_a_value():
    tx, w = ok.gradient_regularized_newton(), jnp.ones(2)
    updates, state = tx.update(0 * w, tx.init(w), w, value=0.0, value_fn=lambda w: jnp.sum(0 * w))
    np.testing.assert_array_equal(updates, 0)
    assert float(state[0].gamma) == 1.0
    assert int(state[0].solves) == 0

    def broken(w):
        return jnp.sum(w) * jnp.nan

    updates, state = tx.update(w, tx.init(w), w, value=1.0, value_fn=broken)
    np.testing.assert_array_equal(updates, 0)


def test_normalized_gradients_have_the_length_of_gamma():
    tx, w = ok.normalized_gradient_search(gamma0=0.5, adaptive=False), jnp.array([3.0, 4.0])
    updates, state = tx.update(2 * w, tx.init(w), w, value_fn=lambda w: jnp.sum(w**2))
    np.testing.assert_allclose(updates, [-0.3, -0.4], rtol=1e-6)
    assert float(state[0].gamma) == 0.5


def test_products_are_those_of_the_matrices():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=5)
    w, v = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=3))

    def outputs(w):
        return jnp.tanh(jnp.asarray(x, w.dtype) @ w)

    def losses(w):
        return (outputs(w) - jnp.asarray(y, w.dtype)) ** 2

    def loss_of(z):
        return jnp.mean((z - jnp.asarray(y, z.dtype)) ** 2)

    jacobian = jax.jacobian(outputs)(w)
    np.testing.assert_allclose(
        gauss_newton_product(outputs, loss_of, w, v), 2 / 5 * jacobian.T @ jacobian @ v, rtol=1e-4
    )
    each = jax.jacobian(losses)(w)
    np.testing.assert_allclose(fisher_product(losses, w, v), each.T @ each @ v / 5, rtol=1e-4)
    mean = lambda w: jnp.mean(losses(w))  # noqa: E731
    np.testing.assert_allclose(
        hessian_product(mean, w, v), jax.hessian(mean)(w) @ v, rtol=1e-3, atol=1e-5
    )


def test_cg_says_what_it_met():
    found = conjugate_gradient(lambda v: jnp.array([1.0, -1.0]) * v, jnp.ones(2))
    assert not bool(found.positive)
    slow = conjugate_gradient(lambda v: jnp.arange(1.0, 9.0) * v, jnp.ones(8), maxiter=2)
    assert bool(slow.positive)
    assert not bool(slow.converged)


def test_messages():
    tx, w = ok.gradient_regularized_newton(hessian="gauss_newton"), jnp.ones(2)
    with pytest.raises(ValueError, match="value_fn=loss_fn"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="gauss_newton_product"):
        tx.update(w, tx.init(w), w, value=0.0, value_fn=jnp.sum)
    with pytest.raises(ValueError, match="hessian must be one of"):
        ok.gradient_regularized_newton(hessian="diagonal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="solver must be one of"):
        ok.gradient_regularized_newton(solver="lu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma0 must be > 0"):
        ok.gradient_regularized_newton(gamma0=0.0)
    with pytest.raises(ValueError, match=r"refine_factor\[1\] must be"):
        ok.gradient_regularized_newton(refine_factor=(2.0, 1.0))
    with pytest.raises(ValueError, match="v and the parameters are different trees"):
        hessian_product(quartic, W, {"a": W["a"]})
