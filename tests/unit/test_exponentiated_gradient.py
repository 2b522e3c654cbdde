"""Sign-preserving optimizers and samplers on numbers checked by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit import nn, transforms
from optimkit.transforms.exponentiate_updates import expm1

W = jnp.array([1.0, -1.0, 0.0])


def first_step(tx, grads, params=W):
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


class ExponentiatedGradientTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_decay_is_proportional_and_zero_stays(self):
        tx = ok.exponentiated_gradient(2.0, weight_decay=0.5)
        step = self.variant(lambda g: first_step(tx, g))
        np.testing.assert_allclose(step(jnp.zeros(3)), W * np.exp(-1), rtol=1e-6)
        descent = step(jnp.full(3, -0.5))  # toward larger values: decay holds the first one
        np.testing.assert_allclose(descent, [1.0, -np.exp(-2), 0.0], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_keep_signs(self):
        tx = ok.keep_signs(threshold=0.25)
        apply = self.variant(lambda u: tx.update(u, tx.init(W), W)[0] + W)
        np.testing.assert_allclose(apply(jnp.array([-1.0, 5.0, -3.0])), [0.25, -0.25, -3.0])
        np.testing.assert_allclose(apply(jnp.array([-0.9, 0.5, 3.0])), [0.1, -0.5, 3.0], rtol=1e-6)


def test_unsigned_is_the_ablation() -> None:
    tx = ok.exponentiated_gradient(1.0, weight_decay=0.5, signed=False)
    np.testing.assert_allclose(first_step(tx, jnp.zeros(3)), W * np.exp(-0.5), rtol=1e-6)
    np.testing.assert_allclose(first_step(tx, jnp.full(3, 0.5)), W * np.exp(-1), rtol=1e-6)


def test_the_first_step_is_undampened_and_momentum_zero_never_is() -> None:
    gradient, half = jnp.full(3, np.log(2)), jnp.array([0.5, -2.0, 0.0])
    for momentum, second in ((0.5, np.log(2)), (0.0, np.log(2))):
        tx = ok.exponentiated_gradient(1.0, momentum, dampening=0.5)
        state = tx.init(W)
        for expected in (np.log(2), second):  # 0.5 log 2 + 0.5 log 2
            updates, state = tx.update(gradient, state, W)
            np.testing.assert_allclose(W + updates, half, rtol=1e-5)
            assert expected == pytest.approx(np.log(2))


def test_adamw_eg_decays_by_a_factor() -> None:
    tx = ok.adamw_eg(0.1, weight_decay=5.0)
    expected = [0.5 * np.exp(-0.1), -0.5 * np.exp(0.1), 0.0]
    np.testing.assert_allclose(first_step(tx, jnp.ones(3)), expected, rtol=1e-5)
    # The authors' factor would be -1 here.
    over = first_step(ok.adamw_eg(0.1, weight_decay=20.0), jnp.zeros(3))
    assert 0 < float(over[0]) < 1e-6
    masked = ok.adamw_eg(0.1, weight_decay=5.0, mask=False)
    np.testing.assert_allclose(first_step(masked, jnp.zeros(3)), W)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "tx",
    [ok.exponentiated_gradient(1.0), ok.adamw_eg(9.0), ok.sign_constrained_sgd(1.0)],
    ids=["eg", "adamw_eg", "sign_constrained"],
)
def test_no_shock_changes_or_loses_a_sign(tx, dtype: str) -> None:
    """Weights stay finite and off zero, in their own dtype, however hard they are pushed."""
    params = jnp.asarray([0.5, -0.5, 2.0, -1e-3], dtype)
    signs = np.sign(np.asarray(params, np.float32))
    state = tx.init(params)
    for push in (1000.0, 1000.0):
        gradient = push * jnp.sign(params) * jnp.asarray([1, 1, -1, 1], dtype)
        updates, state = tx.update(gradient.astype(dtype), state, params)
        params = optax.apply_updates(params, updates)
        now = np.asarray(params, np.float32)
        assert np.all(np.isfinite(now))
        np.testing.assert_array_equal(np.sign(now), signs)


def test_messages() -> None:
    with pytest.raises(ValueError, match="dampening must be >= 0 and <= 1, got 2"):
        ok.exponentiated_gradient(1.0, dampening=2.0)
    with pytest.raises(ValueError, match="max_log_step must be > 0, got 0"):
        ok.exponentiated_gradient(1.0, max_log_step=0.0)
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        ok.adamw_eg(1.0, weight_decay=-1.0)
    with pytest.raises(ValueError, match="threshold must be >= 0, got -1"):
        ok.sign_constrained_sgd(1.0, threshold=-1.0)
    for tx in (ok.keep_signs(), ok.adamw_eg(1.0)):
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(W, tx.init(W))


# -- sampling ---------------------------------------------------------------------------------


def test_langevin_samples_a_lognormal() -> None:
    """log w of mean 0.5 and deviation 0.4, from the loss alone; 32 steps are a relaxation time."""
    mean, deviation, count = 0.5, 0.4, 4096

    def loss(w):
        y = jnp.log(w)
        return jnp.sum(jnp.square((y - mean) / deviation) / 2 + y)

    tx = ok.dale_langevin(0.01, 1.0, drift="langevin", seed=0)

    @jax.jit
    def sample(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (w + updates, state), None

        return jax.lax.scan(step, (w, tx.init(w)), None, length=200)[0][0]

    y = np.log(np.asarray(sample(jnp.ones(count))))
    assert abs(y.mean() - mean) < 4 * deviation / count**0.5
    # One step removes 0.01 / (2 * 0.16) = 1/32 of a deviation.
    assert y.var() == pytest.approx(deviation**2 / (1 - 1 / 64), rel=4 * (2 / count) ** 0.5)


def test_noise_follows_leaf_and_step_and_repeats_with_the_seed() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    zero = jax.tree.map(jnp.zeros_like, params)

    def two(seed):
        tx = ok.dale_langevin(0.1, 1.0, seed=seed)
        first, state = tx.update(zero, tx.init(params), params)
        return np.stack([first["a"], first["b"], tx.update(zero, state, params)[0]["a"]])

    draws = two(0)
    assert len(np.unique(draws)) == draws.size
    np.testing.assert_array_equal(draws, two(0))
    assert not np.any(draws == two(1))


def test_schedules_and_temperature() -> None:
    tx = ok.dale_langevin(lambda count: 0.5 / (count + 1), 1.0, anneal=lambda count: 0.0 * count,
                          temperature=2.0, seed=0)  # fmt: skip
    w, state = jnp.array([2.0, -2.0]), tx.init(jnp.zeros(2))
    for delta in (0.5, 0.25):  # exponent: delta (w * (-g / 2) + 1)
        updates, state = tx.update(jnp.array([1.0, 1.0]), state, w)
        expected = w * np.exp([0.0 * delta, 2.0 * delta])
        np.testing.assert_allclose(w + updates, expected, rtol=1e-5)


def test_sampling_messages() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        ok.dale_langevin(0.1, 1.0, temperature=0.0, seed=0)
    with pytest.raises(ValueError, match="drift must be one of 'reverse', 'langevin'"):
        ok.dale_langevin(0.1, 1.0, drift="both", seed=0)
    with pytest.raises(ValueError, match="seed must be an integer"):
        ok.dale_langevin(0.1, 1.0, seed=0.5)
    with pytest.raises(ValueError, match="delta must be >= 0"):
        transforms.dale_langevin_step(W, W, W, delta=-1.0, sigma=1.0)
    with pytest.raises(TypeError, match="x must be a real floating-point array, got dtype int32"):
        transforms.dale_langevin_step(jnp.ones(2, int), W, W, delta=1.0, sigma=1.0)


def test_the_step_stays_finite() -> None:
    huge = jnp.array([1e30, 1.0], jnp.float32)
    out = transforms.dale_langevin_step(huge, huge, 0 * huge, delta=1.0, sigma=1.0)
    assert np.all(np.isfinite(out))


def test_initial_weights_have_the_fan_in_and_no_zero() -> None:
    w = nn.lognormal_signed_init(2.0, "fan_out", 0.5)(jax.random.key(0), (3, 100, 64))
    magnitude = np.abs(np.asarray(w))
    assert magnitude.min() > 0
    assert w.std() == pytest.approx(2 / (3 * 64) ** 0.5, rel=0.05)
    assert magnitude.mean() / magnitude.std() == pytest.approx(0.5, rel=0.05)
    with pytest.raises(ValueError, match="axis -2 does not exist in a shape of rank 1"):
        nn.lognormal_signed_init()(jax.random.key(0), (3,))
    with pytest.raises(ValueError, match="gain must be > 0"):
        nn.lognormal_signed_init(0.0)


def test_expm1_is_exact_to_two_units() -> None:
    x = np.concatenate([np.linspace(-16, 88, 2001), np.geomspace(1e-30, 1, 301)])
    x = np.concatenate([x, -np.geomspace(1e-30, 1, 301)]).astype(np.float32)
    exact = np.expm1(x.astype(np.float64))
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    error = np.abs(np.asarray(expm1(jnp.asarray(x)), np.float64) - exact)
    assert np.max(error / unit) < 2
