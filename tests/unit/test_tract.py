"""TrAct: the transformation, the layers, and that they agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimkit as ok
from optimkit import nn

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
IMAGES = jnp.asarray(RNG.normal(size=(2, 5, 5, 2)), jnp.float32)
WINDOW = jnp.asarray(RNG.normal(size=(3, 3, 2, 3)), jnp.float32)


def precondition(g, lam=0.1, **kwargs):
    extra = {k: kwargs.pop(k) for k in list(kwargs) if k.startswith("first_layer")}
    tx = ok.tract_precondition(kwargs.pop("l", lam), path="kernel", **kwargs)
    tree = {"kernel": g, "bias": jnp.ones(3)}
    new, _ = tx.update(tree, tx.init(tree), tree, **extra)
    np.testing.assert_array_equal(new["bias"], 1)
    return new["kernel"]


@pytest.mark.parametrize("rows", [6, 2])  # n x n, and b x b
def test_it_is_a_regularised_least_squares_step(rows):
    x, z = X[:rows], jnp.asarray(RNG.normal(size=(rows, 3)), jnp.float32)
    expected = jnp.linalg.inv(x.T @ x / rows + 0.1 * jnp.eye(4)) @ x.T @ z
    got = precondition(x.T @ z, first_layer_inputs=x)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)
    layer = jax.grad(lambda k: jnp.vdot(nn.tract_dense(x, k), z))(KERNEL)
    np.testing.assert_allclose(layer, expected, rtol=2e-4, atol=1e-4)


def test_a_large_lambda_only_scales():
    np.testing.assert_allclose(
        precondition(KERNEL, 1e6, first_layer_inputs=X) * 1e6, KERNEL, rtol=1e-4
    )


def test_zero_inputs():
    np.testing.assert_allclose(
        precondition(KERNEL, first_layer_inputs=0 * X), KERNEL / 0.1, rtol=1e-5
    )


@pytest.mark.parametrize("method", ["solve", "cholesky"])
def test_equal_features_and_huge_ones_stay_finite(method):
    for size in (1.0, 255.0, 1e15):
        x = jnp.full((8, 4), size)
        new = precondition(KERNEL, method=method, first_layer_inputs=x)
        assert jnp.isfinite(new).all()


def test_layer_leaves_output_and_other_gradients_alone():
    bias = jnp.ones(3)

    def loss(layer, x, kernel, bias):
        return jnp.sum(jnp.sin(layer(x, kernel, bias)))

    plain = jax.grad(lambda *a: loss(lambda x, k, b: x @ k + b[None], *a), (0, 2))(X, KERNEL, bias)
    tract = jax.grad(lambda *a: loss(nn.tract_dense, *a), (0, 2))(X, KERNEL, bias)
    np.testing.assert_array_equal(nn.tract_dense(X, KERNEL, bias), X @ KERNEL + bias[None])
    for a, b in zip(plain, tract, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"strides": (2, 1), "padding": ((1, 0), (0, 2))}])
def test_convolution_layer_and_transformation_agree(options):
    def loss(kernel, layer):
        return jnp.sum(jnp.sin(layer(kernel)))

    def plain(kernel):
        return jax.lax.conv_general_dilated(
            IMAGES,
            kernel,
            options.get("strides", (1, 1)),
            options.get("padding", "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    g = jax.grad(loss)(WINDOW, plain)
    layer = jax.grad(loss)(WINDOW, lambda k: nn.tract_conv(IMAGES, k, **options))
    got = precondition(g, kind="conv", first_layer_inputs=IMAGES, **options)
    np.testing.assert_allclose(got, layer, rtol=1e-4, atol=1e-5)


def test_nnx_layers():
    linear = nn.TrActLinear(4, 3, rngs=nnx.Rngs(0))
    linear.kernel[...] = KERNEL
    got = nnx.grad(lambda m: jnp.sum(m(X)))(linear).kernel[...]
    expected = jax.grad(lambda k: jnp.sum(nn.tract_dense(X, k)))(KERNEL)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    conv = nnx.Conv(
        2, 3, (3, 3), conv_general_dilated=nn.tract_conv_general_dilated, rngs=nnx.Rngs(0)
    )
    conv.kernel[...] = WINDOW
    got = nnx.grad(lambda m: jnp.sum(m(IMAGES)))(conv).kernel[...]
    expected = jax.grad(lambda k: jnp.sum(nn.tract_conv(IMAGES, k)))(WINDOW)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_equal_linen_layers_share_a_compilation():
    assert nn.TrActDense(3) == nn.TrActDense(3)
    assert hash(nn.TrActConv(3, (2, 2))) == hash(nn.TrActConv(3, (2, 2)))
    assert nn.TrActDense(3) != nn.TrActDense(3, l=0.2)


def test_gram_is_averaged_over_devices_by_rows():
    grams = jnp.stack([nn.tract_gram(X[:2]), nn.tract_gram(X[2:])])
    rows = jnp.array([2.0, 4.0])

    def one(gram, rows):
        return precondition(KERNEL, axis_name="i", first_layer_gram=(gram, rows))

    both = jax.vmap(one, axis_name="i")(grams, rows)
    np.testing.assert_allclose(both[0], precondition(KERNEL, first_layer_inputs=X), rtol=1e-4)


def test_bytes_are_inputs_too():
    x = jnp.arange(8, dtype=jnp.uint8).reshape(2, 4)
    np.testing.assert_allclose(nn.tract_gram(x), np.asarray(x, float).T @ np.asarray(x, float) / 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs either first_layer_inputs or first_layer_gram"),
        ({"first_layer_inputs": X, "first_layer_gram": (X, 1)}, "needs either"),
        ({"first_layer_inputs": X[:, :3]}, "give 3 numbers a row, but the kernel 'kernel'"),
        ({"first_layer_gram": (jnp.eye(3), 1)}, r"first_layer_gram has shape \(3, 3\)"),
        ({"kind": "conv", "first_layer_inputs": X}, "a conv kernel has 3 axes or more"),
        ({"l": 0.0}, "l must be > 0, got 0"),
        ({"method": "qr"}, "method must be one of 'solve', 'cholesky'"),
        ({"kind": "linear"}, "kind must be one of 'dense', 'conv'"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        precondition(KERNEL, **kwargs)


def test_bad_convolutions():
    with pytest.raises(ValueError, match=r"kernel_size is \(2, 2\), but the kernel 'kernel'"):
        precondition(WINDOW, kind="conv", kernel_size=(2, 2), first_layer_inputs=IMAGES)
    with pytest.raises(ValueError, match="padding must name 2 axes"):
        nn.tract_conv(IMAGES, WINDOW, padding=(1, 1, 1))
    with pytest.raises(ValueError, match="padding must be 'SAME'"):
        nn.tract_conv(IMAGES, WINDOW, padding="CIRCULAR")
    with pytest.raises(ValueError, match="do not fit a conv kernel"):
        nn.tract_conv(IMAGES[..., :1], WINDOW)
    with pytest.raises(ValueError, match="no dilation, got rhs_dilation"):
        nn.TrActConv(3, (3, 3), kernel_dilation=2).init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="no groups"):
        nn.TrActConv(4, (3, 3), feature_group_count=2).init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="kernel_size is needed"):
        nn.tract_gram(IMAGES, kind="conv")
    with pytest.raises(ValueError, match="need shape"):
        nn.tract_gram(X[0], kind="conv", kernel_size=(2, 2))


def test_path_must_choose_one_kernel():
    tree = {"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL}}
    with pytest.raises(ValueError, match="path must choose one kernel"):
        ok.tract_precondition(path="*/kernel").init(tree)
    with pytest.raises(ValueError, match="path: 'c/kernel' matches none"):
        ok.tract_precondition(path="c/kernel").init(tree)
