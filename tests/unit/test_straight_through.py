"""Units without a derivative: what they give instead, at extremes too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.gradients import (
    OptimalBaseline,
    noisy_rectifier,
    reinforce_neuron_grad,
    straight_through,
    straight_through_bernoulli,
    straight_through_threshold,
    sts_neuron,
)

KEY = jax.random.key(0)
ENDS = jnp.array([-1e4, -200.0, 0.0, 200.0, 1e4], jnp.float32)


def test_any_function_passes_the_cotangent_in_both_modes():
    fn = straight_through(lambda a: a > 0.5)
    a = jnp.array([0.25, 1.0], jnp.bfloat16)
    value, tangent = jax.jvp(fn, (a,), (jnp.array([3.0, 4.0], jnp.bfloat16),))
    assert value.dtype == a.dtype
    assert (value.tolist(), tangent.tolist()) == ([0, 1], [3, 4])
    assert jax.jit(jax.grad(lambda a: fn(a).sum()))(a).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "unit",
    [
        lambda a: straight_through_bernoulli(KEY, a, slope="sigmoid"),
        lambda a: straight_through_threshold(a, slope="clip"),
        lambda a: sts_neuron(KEY, a),
        lambda a: noisy_rectifier(KEY, a, noise="normal", scale=0.5),
    ],
)
def test_values_and_slopes_stay_finite_far_out(unit, dtype):
    a = ENDS.astype(dtype)
    value, pull = jax.vjp(unit, a)
    assert value.dtype == dtype
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(pull(jnp.ones_like(value))[0]))


def test_the_mean_of_the_stochastic_times_smooth_unit_is_the_sigmoid():
    a = jnp.linspace(-2, 2, 5)
    keys = jax.random.split(KEY, 20_000)
    total = jax.jit(jax.vmap(jax.value_and_grad(lambda a, key: sts_neuron(key, a)), (None, 0)))
    p = jax.nn.sigmoid(a)
    for i in range(5):
        value, slope = total(a[i], keys)
        np.testing.assert_allclose(value.mean(), p[i], atol=0.015)
        np.testing.assert_allclose(slope.mean(), p[i] * (1 - p[i]) / 2, atol=0.01)


def test_a_baseline_leaves_the_mean_and_takes_the_noise():
    a = jnp.array([0.5, -1.0])
    p = jax.nn.sigmoid(a)
    b = jax.random.bernoulli(KEY, p[None], (4000, 2)).astype(jnp.float32)
    loss = jnp.sum((b - 0.3) ** 2, axis=1) + 10
    exact = p * (1 - p) * (0.49 - 0.09)
    running = OptimalBaseline.init(a).update(b - p[None], loss, decay=0.0)
    for baseline, close in ((None, 0.4), ("mean", 0.02), ("optimal", 0.02), (running.value, 0.02)):
        found = reinforce_neuron_grad(a, b, loss, baseline=baseline)
        np.testing.assert_allclose(found, exact, atol=close)
    turned = reinforce_neuron_grad(a, b.T, loss, axis=1)
    np.testing.assert_allclose(turned, reinforce_neuron_grad(a, b, loss), rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: straight_through(jnp.sum)(ENDS), ValueError, "hard_fn gave shape"),
        (lambda: straight_through(jnp.sign)(jnp.arange(3)), TypeError, "real floating-point"),
        (lambda: straight_through_threshold(ENDS, slope="x"), ValueError, "slope must be one of"),
        (lambda: sts_neuron(KEY, ENDS, uniform=ENDS[:2]), ValueError, "uniform has shape"),
        (lambda: noisy_rectifier(KEY, ENDS, noise="x"), ValueError, "noise must be one of"),
        (lambda: noisy_rectifier(KEY, ENDS, scale=-1.0), ValueError, "scale must be >= 0"),
        (lambda: reinforce_neuron_grad(ENDS, ENDS[None], ENDS), ValueError, "loss must have"),
        (lambda: reinforce_neuron_grad(ENDS[:2], ENDS[None], ENDS[:1]), ValueError, "a must have"),
        (lambda: reinforce_neuron_grad(ENDS, ENDS[None][:0], ENDS[:0]), ValueError, "no sample"),
        (lambda: OptimalBaseline.init(ENDS).update(ENDS, ENDS), ValueError, "b_minus_p must have"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()
