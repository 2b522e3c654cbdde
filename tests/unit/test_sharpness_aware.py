"""SAM's two gradients, devices that move apart or together, and IGNITE's multiplier."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.gradients import (
    finite_difference_hvp,
    ignite_gradient,
    ignite_multiplier,
    sam_gradient,
    sam_gradient_parts,
)

A = jnp.array([1.0, 4.0])
W = {"a": jnp.array([3.0, 1.0]), "b": jnp.array(0.5)}


def loss(w):
    return jnp.sum(A * w["a"] ** 2) / 2 + w["b"] ** 2


def test_the_mask_keeps_leaves_where_they_are_and_out_of_the_norm():
    value, g = sam_gradient(loss, rho=0.5, mask=["a"])(W)
    assert value == loss(W)
    np.testing.assert_allclose(g["a"], [3.3, 5.6], rtol=1e-6)
    np.testing.assert_allclose(g["b"], 1.0)


def test_no_way_is_the_plain_gradient_bit_for_bit_and_a_zero_gradient_moves_nothing():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), W)
    for params in (W, low):
        want = jax.value_and_grad(loss)(params)
        jax.tree.map(np.testing.assert_array_equal, sam_gradient(loss, rho=0.0)(params), want)
    zero = jax.tree.map(jnp.zeros_like, W)
    jax.tree.map(np.testing.assert_array_equal, sam_gradient(loss)(zero)[1], zero)


def test_a_small_way_is_not_rounded_off_in_bfloat16():
    low = {"a": jnp.full(2, 256.0, jnp.bfloat16)}

    def steep(w):
        return jnp.sum(jnp.exp((w["a"].astype(jnp.float32) - 256) * 100))

    g, g_sam = sam_gradient_parts(steep, rho=0.01)(low)[1:]
    assert g_sam["a"].dtype == jnp.bfloat16
    assert g_sam["a"][0] > 1.5 * g["a"][0]


def test_aux_is_that_of_the_pass_asked_for():
    def with_aux(w):
        return loss(w), w["b"]

    first, second = (sam_gradient(with_aux, has_aux=True, aux_from=x) for x in ("first", "second"))
    assert first(W)[0][1] == 0.5 < second(W)[0][1]


@pytest.mark.parametrize("together", [True, False])
def test_devices_climb_by_the_mean_gradient_or_each_by_its_own(together):
    def own(w, c):
        return c * jnp.sum(w**2) / 2 + w[1]

    fn = sam_gradient(own, rho=0.5, axis_name="d", sync_perturbation=together)
    w, c = jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])
    value, g = jax.vmap(fn, in_axes=(None, 0), axis_name="d")(w, c)

    def gradient(w, c):
        return c * w + jnp.array([0.0, 1.0])

    def climbed(g):
        return w + 0.5 * g / jnp.linalg.norm(g)

    mean = (gradient(w, 1.0) + gradient(w, 3.0)) / 2
    at = [climbed(mean if together else gradient(w, k)) for k in (1.0, 3.0)]
    want = (gradient(at[0], 1.0) + gradient(at[1], 3.0)) / 2
    np.testing.assert_allclose(g[0], want, rtol=1e-6)
    np.testing.assert_allclose(value, jnp.full(2, 2 * 5 / 2 + 2.0))


def test_the_wrapper_takes_a_loss_in_place_of_a_gradient():
    tx = ok.sam(optax.sgd(1.0), rho=0.5)
    g = jax.grad(loss)(W)
    given, made = (
        tx.update(g, tx.init(W), W, **extra)[0]
        for extra in ({"grad_fn": jax.grad(loss)}, {"value_fn": loss})
    )
    jax.tree.map(np.testing.assert_array_equal, given, made)
    with pytest.raises(ValueError, match="sam needs grad_fn or value_fn"):
        tx.update(g, tx.init(W), W)


def test_the_penalty_is_that_of_the_gradient_norm():
    product, norm = finite_difference_hvp(loss, W, jax.grad(loss)(W), r=0.25)
    steepness = jax.grad(lambda w: optax.tree.norm(jax.grad(loss)(w)))(W)
    np.testing.assert_allclose(product["a"], steepness["a"], rtol=1e-4)
    np.testing.assert_allclose(norm, optax.tree.norm(jax.grad(loss)(W)), rtol=1e-6)


def test_a_flat_output_adds_nothing():
    fn = ignite_gradient(loss, lambda w: 0.0 * w["b"], rho=0.1, r=0.1)
    value, g, norm = fn(W, 0.5)
    assert (value, norm) == (loss(W), 0)
    jax.tree.map(np.testing.assert_array_equal, g, jax.grad(loss)(W))


def test_the_multiplier_may_be_held_at_zero():
    free, held = (
        ignite_multiplier(0.0, learning_rate=1.0, threshold=2.0, rho=0.5, nonnegative=n)
        for n in (False, True)
    )
    assert free.update(free.init(), 2.0) == -1
    assert held.update(held.init(), 2.0) == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sam_gradient(loss, rho=-1.0), "rho must be >= 0, got -1"),
        (lambda: sam_gradient(loss, aux_from="both"), "aux_from must be one of 'first', 'second'"),
        (lambda: sam_gradient(loss, mask={"a": True})(W), "mask: the tree of bools has another"),
        (lambda: ok.sam(optax.sgd(1.0), rho=-1.0), "rho must be >= 0, got -1"),
        (lambda: ignite_gradient(loss, loss, rho=0.1, r=0.0), "r must be > 0, got 0"),
        (lambda: ignite_multiplier(0.1, rho=-1.0), "rho must be >= 0, got -1"),
        (lambda: finite_difference_hvp(loss, W, W["a"], 0.1), "direction and the parameters are"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
