"""Estimates of a gradient from values alone: their mean, their noise, and what they may touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.benchmark import estimators
from optimkit.benchmark.__main__ import main
from optimkit.gradients import (
    directional_derivative,
    forward_gradient,
    mezo,
    sample_direction,
    spsa,
)

KEY = jax.random.key(0)
W = {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.25])}


def loss(w):
    return jnp.sum(jnp.array([1.0, 2.0, 3.0]) * w["kernel"] ** 2) / 2 + jnp.sum(w["bias"])


TRUE = jax.grad(loss)(W)


@pytest.mark.parametrize("noise", ["normal", "rademacher", "sphere"])
def test_the_mean_is_the_gradient_and_the_noise_is_known(noise):
    fn = forward_gradient(loss, noise=noise)
    keys = jax.random.split(KEY, 4000)
    found = jax.jit(jax.vmap(lambda key: fn(W, key)[1]))(keys)
    rows = np.concatenate([found["kernel"], found["bias"]], axis=1)
    want = np.concatenate([TRUE["kernel"], TRUE["bias"]])
    error = np.abs(rows.mean(0) - want) / (rows.std(0) / 4000**0.5)
    assert error.max() < 4
    ratio = np.mean(np.sum(rows**2, axis=1)) / np.sum(want**2)
    expected = {"normal": 6, "rademacher": 4, "sphere": 4}[noise]  # D + 2, D, D
    np.testing.assert_allclose(ratio, expected, rtol=0.1)


def test_forward_and_two_sided_agree_with_the_slope_along_the_direction():
    z = sample_direction(KEY, W)
    slope = sum(jnp.sum(TRUE[k] * z[k]) for k in W)
    for method in ("jvp", "fd"):
        np.testing.assert_allclose(
            directional_derivative(loss, W, z, method, eps=0.1), slope, rtol=1e-5
        )
    for fn in (spsa(loss, eps=0.1), spsa(loss, eps=0.1, antithetic_memory="keep")):
        np.testing.assert_allclose(fn(W, KEY)[1]["kernel"], slope * z["kernel"], rtol=1e-4)
    np.testing.assert_allclose(
        forward_gradient(loss)(W, KEY)[1]["kernel"], slope * z["kernel"], rtol=1e-5
    )


def test_samples_are_averaged_and_both_losses_given():
    fn = spsa(loss, eps=0.1, num_samples=3, return_both=True)
    (plus, minus), g = jax.jit(fn)(W, KEY)
    single = [spsa(loss, eps=0.1)(W, jax.random.fold_in(KEY, i)) for i in range(3)]
    np.testing.assert_allclose(plus, np.mean([value for value, _ in single]), rtol=1e-6)
    mean = np.mean([g["kernel"] for _, g in single], axis=0)
    np.testing.assert_allclose(g["kernel"], mean, rtol=1e-5)
    assert minus.shape == ()


def test_the_one_sided_form_starts_from_the_parameters():
    z = {"kernel": jnp.array([1.0, 0.0, 0.0]), "bias": jnp.zeros(1)}
    _, g = spsa(loss, eps=0.5, two_sided=False)(W, KEY, direction=z)
    np.testing.assert_allclose(g["kernel"], [1.25, 0, 0])  # (1.5^2 - 1) / 2 / 0.5


def test_masked_and_integer_leaves_stay_and_aux_comes_along():
    params = {**W, "steps": jnp.array(3)}

    def with_aux(w, x):
        return loss(w) * x, w["steps"]

    for make in (spsa, forward_gradient):
        fn = make(with_aux, has_aux=True, mask=["kernel", "steps"])
        (_, aux), g = fn(params, KEY, 2.0)
        assert aux == 3
        assert g["steps"] == 0
        assert g["steps"].dtype == params["steps"].dtype
        assert g["bias"] == 0
        assert g["kernel"][0] != 0


def test_a_loss_that_is_no_number_changes_nothing():
    def broken(w):
        return loss(w) / 0.0

    value, g = spsa(broken)(W, KEY)
    assert not jnp.isfinite(value)
    assert g["kernel"].tolist() == [0, 0, 0]
    kept = mezo(0.1, in_place=False)(W, KEY, broken)
    jax.tree.map(np.testing.assert_array_equal, kept, W)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_mezo_is_descent_by_spsa_with_decay_but_of_biases(in_place, num_samples):
    step = mezo(0.1, eps=0.1, weight_decay=0.5, num_samples=num_samples, in_place=in_place)
    value, new = jax.jit(lambda w, key: step.loss_and_step(w, key, loss))(W, KEY)
    want, g = spsa(loss, eps=0.1, num_samples=num_samples)(W, KEY)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    decayed = W["kernel"] - 0.1 * (g["kernel"] + 0.5 * W["kernel"])
    np.testing.assert_allclose(new["kernel"], decayed, atol=1e-5)
    np.testing.assert_allclose(new["bias"], W["bias"] - 0.1 * g["bias"], atol=1e-5)


def test_values_are_averaged_over_devices_before_their_difference():
    def own(w, c):
        return c * loss(w)

    _, g = jax.vmap(spsa(own, axis_name="d"), in_axes=(None, None, 0), axis_name="d")(
        W, KEY, jnp.array([1.0, 3.0])
    )
    np.testing.assert_array_equal(g["kernel"][0], g["kernel"][1])
    np.testing.assert_allclose(
        g["kernel"][0], spsa(own)(W, KEY, 2.0)[1]["kernel"], rtol=1e-2, atol=1e-2
    )


def test_memory_is_that_of_inference():
    rows = {row.name: row for row in estimators.table(layers=6, width=128, batch=1024)}
    assert rows["mezo"].ratio < 1.3
    assert rows["spsa"].ratio < 1.3
    assert rows["back-propagation"].ratio > 2.5


def test_the_command_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["estimators", "--help"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: spsa(loss, eps=0.0), "eps must be > 0, got 0"),
        (lambda: spsa(loss, num_samples=0), "num_samples must be an integer >= 1, got 0"),
        (lambda: spsa(loss, noise="uniform"), "noise must be one of 'normal'"),
        (lambda: spsa(loss, antithetic_memory="no"), "antithetic_memory must be one of"),
        (lambda: forward_gradient(loss, noise="uniform"), "noise must be one of 'normal'"),
        (lambda: forward_gradient(loss)({"n": jnp.array(1)}, KEY), "no floating-point leaf"),
        (lambda: spsa(loss)(W, KEY, direction=W["bias"]), "direction and the parameters are"),
        (lambda: mezo(lambda count: 0.1), "learning_rate must be a number"),
        (lambda: mezo(0.1, decay_mask=["no"])(W, KEY, loss), "decay_mask: 'no' matches none"),
        (lambda: directional_derivative(loss, W, W, "bp"), "method must be one of 'fd', 'jvp'"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
