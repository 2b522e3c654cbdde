"""Kernels on stacks of matrices: statistics, bases, leading vectors, cutting fused kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.matrices import statistics, subspace
from optimkit.matrices.parts import cut_outputs
from optimkit.protocols import MatrixAxes


def stack(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_orthonormal(q, atol=1e-5):
    gram = np.swapaxes(q, -2, -1) @ np.asarray(q)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=atol)


# -- norms ------------------------------------------------------------------------------------


def test_norms_keep_their_place():
    x = jnp.array([[[3.0, 0.0], [4.0, 1.0]]])
    np.testing.assert_allclose(statistics.column_norms(x), [[[5.0, 1.0]]])
    np.testing.assert_allclose(statistics.row_norms(x), [[[3.0], [17**0.5]]], rtol=1e-6)
    np.testing.assert_allclose(statistics.frobenius_norm(1e30 * x), [[[1e30 * 26**0.5]]], rtol=1e-6)


# -- bases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", subspace.BASES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_orthonormal_columns(method, size):
    x = stack(2, 7, 3)
    q = subspace.orthonormal_columns(size * x, method)
    assert_orthonormal(q)
    np.testing.assert_allclose(q @ (np.swapaxes(q, 1, 2) @ x), x, atol=1e-5)  # the same range


def test_cholesky_holds_for_nearly_dependent_columns():
    x = stack(9, 2)
    x = jnp.stack([x[:, 0], x[:, 0] + 1e-4 * x[:, 1]], axis=1)
    assert_orthonormal(subspace.orthonormal_columns(x, "cholesky"))


@pytest.mark.parametrize("method", subspace.BASES)
def test_zero_and_bad_matrices_stay_apart(method):
    x = stack(3, 5, 2)
    clean = subspace.orthonormal_columns(x, method)
    got = subspace.orthonormal_columns(x.at[0].set(0).at[1, 2, 0].set(jnp.nan), method)
    assert np.all(np.isfinite(got[0]))
    assert np.all(np.isnan(got[1]))
    np.testing.assert_allclose(got[2], clean[2], atol=1e-6)


# -- leading vectors --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 9, 6)])
@pytest.mark.parametrize("settings", [{}, {"key": 0}, {"key": 0, "basis": "cholesky"}])
def test_all_methods_find_the_same_vectors(shape, settings):
    x = stack(*shape)
    if "key" in settings:
        settings = {**settings, "method": "subspace", "key": jax.random.key(0), "power_steps": 2}
    else:
        settings = {"method": "gram"}
    u, s, _ = np.linalg.svd(np.asarray(x))
    vectors, values = subspace.leading_vectors(x, 3, **settings)
    np.testing.assert_allclose(values, s[:, :3], rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(vectors * u[:, :, :3], axis=1)), 1, atol=1e-4)
    exact, _ = subspace.leading_vectors(x, 3)
    np.testing.assert_allclose(vectors, exact, atol=2e-2)  # signs too
    assert_orthonormal(vectors)


def test_a_warm_start_goes_on_from_a_basis():
    x = stack(8, 8) * jnp.array([[8.0, 4.0, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2]])
    exact, _ = subspace.leading_vectors(x, 2)
    start = subspace.orthonormal_columns(exact + 0.1 * stack(8, 2, seed=1))
    near, _ = subspace.leading_vectors(x, 2, "subspace", start=start)
    np.testing.assert_allclose(near, exact, atol=1e-4)


def test_rank_is_clamped_and_bad_matrices_stay_apart():
    x = stack(3, 4, 2)
    for method in ("svd", "gram"):
        vectors, values = subspace.leading_vectors(x.at[1, 0, 0].set(jnp.inf), 5, method)
        assert (vectors.shape, values.shape) == ((3, 4, 2), (3, 2))
        assert np.all(np.isnan(vectors[1]))
        assert_orthonormal(vectors[jnp.array([0, 2])])
    vectors, values = subspace.leading_vectors(jnp.zeros((2, 3, 3)), 2, "gram")
    assert_orthonormal(vectors)
    assert not np.any(values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: subspace.leading_vectors(x, 0), "rank must be an integer >= 1, got 0"),
        (lambda x: subspace.leading_vectors(x, 1, "lu"), "method must be one of 'svd', 'gram'"),
        (lambda x: subspace.leading_vectors(x[0], 1), r"shape \(\.\.\., m, n\), none empty, got"),
        (lambda x: subspace.range_finder(x, 1), "exactly one of key and start"),
        (lambda x: subspace.range_finder(x, 1, start=x, power_steps=0), "power_steps must be"),
        (lambda x: subspace.orthonormal_columns(x), "rows >= columns, got shape"),
        (lambda x: subspace.orthonormal_columns(x.T, "lu"), "method must be one of 'qr'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 3)))


# -- fused kernels ----------------------------------------------------------------------------


def test_a_fused_kernel_is_cut_along_its_outputs():
    tree = {"bias": jnp.ones(3), "qkv": {"kernel": stack(4, 6)}, "layers": stack(2, 4, 6)}
    layers = MatrixAxes((0,), (1,), (2,))
    axes = [None, layers, MatrixAxes((), (0,), (1,))]  # in the order of the leaves
    parts, seen, join = cut_outputs(tree, axes, {"qkv/*": (3, 2, 1), "layers": (4, 2)})
    assert [part.shape for part in parts] == [(3,), (2, 4, 4), (2, 4, 2), (4, 3), (4, 2), (4, 1)]
    assert seen == [None, layers, layers, *[axes[2]] * 3]
    back = join(parts)
    for whole, again in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(whole, again)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"kv/*": (1, 1)}, r"split_outputs: 'kv/\*' matches none of the leaves \['qkv/bias'"),
        ({"qkv/kernel": (4, 4)}, r"sizes \(4, 4\) must be positive and add up to its 6 outputs"),
        ({"qkv/kernel": (7, -1)}, "must be positive"),
        ({"qkv/bias": (2, 1)}, r"'qkv/bias' of shape \(3,\), which is not seen as matrices"),
    ],
)
def test_bad_splits(split, message):
    tree = {"qkv": {"bias": jnp.ones(3), "kernel": jnp.ones((4, 6))}}
    with pytest.raises(ValueError, match=message):
        cut_outputs(tree, [None, MatrixAxes((), (0,), (1,))], split)
