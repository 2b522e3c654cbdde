"""AuON and Hybrid-AuON: the scale by norm and cosh, and who takes which step."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import optimkit as ok
from optimkit.matrices import newton_schulz

PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2), "embed": jnp.ones((3, 2))}


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def cosh_rms(x, gamma=1.0):
    return np.sqrt(np.mean(np.square(np.cosh(gamma * np.asarray(x, np.float64)))))


class CoshRmsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1.0, 1.5, 0.0)
    def test_norm_and_cosh(self, gamma):
        updates = {"kernel": jnp.array([[3.0, 0.0], [0.0, -4.0]]), "scalar": jnp.array(-2.0)}
        tx = ok.scale_by_cosh_rms(gamma)
        got, _ = self.variant(tx.update)(updates, tx.init(updates))
        x = np.array([[0.6, 0.0], [0.0, -0.8]])
        np.testing.assert_allclose(got["kernel"], x / cosh_rms(x, gamma), rtol=1e-5)
        np.testing.assert_allclose(got["scalar"], -1 / np.cosh(gamma), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_without_the_norm(self):
        updates = {"kernel": jnp.array([[3.0, 0.0], [0.0, -4.0]])}
        tx = ok.scale_by_cosh_rms(normalize=False)
        got, _ = self.variant(tx.update)(updates, tx.init(updates))
        expected = updates["kernel"] / cosh_rms([0.6, 0.0, 0.0, 0.8])
        np.testing.assert_allclose(got["kernel"], expected, rtol=1e-5)


def test_a_stack_is_scaled_layer_by_layer():
    layers = random_like({"kernel": jnp.ones((3, 2, 4))})
    axes = {"kernel": ok.MatrixAxes((0,), (1,), (2,))}
    tx = ok.scale_by_cosh_rms(1.5, matrix_axes=axes)
    got, _ = tx.update(layers, tx.init(layers))
    single = ok.scale_by_cosh_rms(1.5)
    for index in range(3):
        layer = {"kernel": layers["kernel"][index]}
        expected, _ = single.update(layer, single.init(layer))
        np.testing.assert_allclose(got["kernel"][index], expected["kernel"], rtol=1e-5)


def test_the_brake_acts_on_spikes_alone():
    # r is the norm of a step without a brake over that of this one.
    def brake(u):
        tx = ok.scale_by_cosh_rms()
        return 1 / float(jnp.linalg.norm(tx.update(u, tx.init(u))[0]))

    even = random_like(jnp.ones((32, 32)))
    assert brake(even) == pytest.approx(1 + 0.5 / 1024, abs=1e-4)
    assert brake(even.at[0, 0].set(1e6)) == pytest.approx(1.0007, abs=1e-4)
    assert brake(jnp.array([[1e6, 1.0]])) == pytest.approx(1.3, abs=0.01)


def test_a_huge_gamma_gives_zero_and_no_nan():
    tx = ok.scale_by_cosh_rms(1e3)
    got, _ = tx.update(jnp.array([1.0, -1.0]), tx.init(jnp.ones(2)))
    np.testing.assert_array_equal(got, [0.0, 0.0])


def step(tx, grads, params=PARAMS):
    return tx.update(grads, tx.init(params), params)[0]


def test_first_step_of_the_paper():
    grads = random_like(PARAMS)
    updates = step(ok.auon(0.1, weight_decay=0.2), grads)
    for name, scale in (("kernel", np.sqrt(3 / 2)), ("bias", 1.0)):
        x = np.asarray(grads[name]) / np.linalg.norm(grads[name])
        expected = -0.1 * (scale * x / cosh_rms(x) + 0.2)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4)


def test_the_size_of_the_gradient_counts_in_the_package_alone():
    grads = random_like(PARAMS)
    for normalize in (True, False):
        tx = ok.auon(0.1, normalize=normalize)
        small, large = (step(tx, jax.tree.map(lambda g, c=c: c * g, grads)) for c in (1.0, 100.0))
        ratio = float(large["kernel"][0, 0] / small["kernel"][0, 0])
        assert ratio == pytest.approx(1 if normalize else 100, rel=1e-4)


def test_hybrid_scales_what_newton_schulz_gives():
    grads = random_like(PARAMS)
    updates = step(ok.hybrid_auon(0.1, nesterov=False, ns_steps=2, gamma=1.5), grads)
    u = np.asarray(newton_schulz(0.05 * grads["kernel"], 2))
    expected = -0.1 * u / cosh_rms(u / np.linalg.norm(u), 1.5)
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-6)
    u = 0.05 * np.asarray(grads["bias"])  # skips Newton-Schulz, and keeps its size
    expected = -0.1 * u / cosh_rms(u / np.linalg.norm(u), 1.5)
    np.testing.assert_allclose(updates["bias"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "adams"),
    [
        ({}, set()),
        ({"adam_learning_rate": 0.01}, {"bias", "embed"}),
        ({"matrix_leaves": ["embed"]}, {"bias", "kernel"}),
    ],
)
def test_who_takes_adam(keywords, adams):
    # Adam's first step has every entry of one size.
    grads = random_like(PARAMS)
    for factory in (ok.auon, ok.hybrid_auon):
        updates = step(factory(0.1, **keywords), grads)
        sizes = {name: np.abs(np.asarray(u)) for name, u in updates.items()}
        assert {name for name, u in sizes.items() if np.ptp(u) < 1e-6} == adams
        for name in adams:
            rate = keywords.get("adam_learning_rate", 0.1)
            np.testing.assert_allclose(sizes[name], rate, rtol=1e-4)


@pytest.mark.parametrize("factory", [ok.auon, ok.hybrid_auon])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"scaling": "adam"}, "scaling must be one of .* got 'adam'"),
        ({"gamma": -1.0}, "gamma must be >= 0, got -1"),
        ({"norm_eps": -1.0}, "norm_eps must be >= 0, got -1"),
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1, got 1"),
        ({"adam_b1": 1.0}, "adam_b1 must be >= 0 and < 1, got 1"),
    ],
)
def test_bad_arguments(factory, keywords, message):
    with pytest.raises(ValueError, match=message):
        factory(0.1, **keywords)


def test_bad_trees():
    with pytest.raises(ValueError, match=r"leaf 'bias' of shape \(2,\).*no matrix"):
        ok.auon(0.1, matrix_leaves=["bias"]).init(PARAMS)
    with pytest.raises(ValueError, match=r"'blocks'.*several ways.*matrix_axes="):
        ok.auon(0.1).init({"blocks": jnp.ones((2, 3, 4))})
    with pytest.raises(ValueError, match="triples for 3 steps, ns_steps is 5"):
        ok.hybrid_auon(0.1, ns_steps=5, ns_coeffs=[(1.0, 2.0, 3.0)] * 3)
