"""The Newton-Schulz kernel, and the engine that brings leaves of any layout to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.matrices.engine import leaf_axes, map_matrices, narrow
from optimkit.matrices.newton_schulz import (
    KELLER,
    NS_COEFFS,
    gram_flops,
    gram_segments,
    newton_schulz,
    ns_triples,
    plain_flops,
)
from optimkit.protocols import MatrixAxes

RANGES = {  # singular values after five steps, for s in [0.01, 1], computed in 64 bits
    "keller": (0.68, 1.13),
    "dion": (0.97, 1.04),
    "polar_express": (0.85, 1.15),
}


def with_spectrum(rows, cols, singular, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(rng.normal(size=(cols, cols)))
    return left[:, : len(singular)] * singular @ right[: len(singular)]


# -- Newton-Schulz ----------------------------------------------------------------------------


def test_one_step_on_a_number():
    # x / |x| = 1, so one step gives a + b + c
    got = newton_schulz(jnp.array([[-3.0]]), 1, KELLER, 0.0)
    np.testing.assert_allclose(got, [[-(3.4445 - 4.7750 + 2.0315)]], rtol=1e-6)


def test_eps_is_added_to_the_norm():
    # 3 / (3 + 1) = 0.75 under the cubic 1.5 x - 0.5 x^3
    got = newton_schulz(jnp.array([[3.0]]), 1, (1.5, -0.5, 0.0), 1.0)
    np.testing.assert_allclose(got, [[1.5 * 0.75 - 0.5 * 0.75**3]], rtol=1e-6)


@pytest.mark.parametrize("name", NS_COEFFS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_singular_values_come_close_to_one(name, dtype):
    spectrum = np.geomspace(0.02, 1.0, 12)
    spectrum = spectrum / np.linalg.norm(spectrum)
    x = jnp.asarray(with_spectrum(12, 20, spectrum), jnp.float32)
    y = newton_schulz(x, 5, name, dtype=dtype)
    assert y.dtype == x.dtype
    low, high = RANGES[name]
    slack = 0.0 if dtype == "float32" else 0.05
    singular = np.linalg.svd(np.asarray(y), compute_uv=False)
    assert low - slack <= singular.min() <= singular.max() <= high + slack


def test_bfloat16_keeps_the_direction():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 24)), jnp.float32)
    exact, rough = newton_schulz(x), newton_schulz(x, dtype="bfloat16")
    cosine = jnp.vdot(exact, rough) / jnp.linalg.norm(exact) / jnp.linalg.norm(rough)
    assert cosine > 0.999
    assert not np.array_equal(exact, rough)


def test_orientation_and_stacking_do_not_matter():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4, 7)), jnp.float32)
    y = newton_schulz(x)
    flipped = newton_schulz(jnp.swapaxes(x, -2, -1))
    np.testing.assert_array_equal(flipped, jnp.swapaxes(y, -2, -1))
    np.testing.assert_allclose(newton_schulz(x[1, 2]), y[1, 2], atol=1e-6)


@pytest.mark.parametrize("size", [1e30, 3e38, 1e15, 1e-20])
@pytest.mark.parametrize("name", NS_COEFFS)
def test_no_finite_matrix_overflows(size, name):
    x = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, size=(3, 5)), jnp.float32)
    y = newton_schulz(x * size, coeffs=name, eps=0.0 if size < 1 else 1e-7)
    assert np.all(np.isfinite(y))
    if name != "polar_express":  # which keeps an eps of its own
        np.testing.assert_allclose(y, newton_schulz(x, coeffs=name, eps=0.0), atol=2e-5)


def test_zero_and_subnormal_matrices_come_out_as_nothing():
    for size in (0.0, 1e-45, 1e-40, 1e-38):
        for eps in (0.0, 1e-7):
            y = newton_schulz(jnp.full((2, 3), size, jnp.float32), eps=eps)
            assert np.all(np.isfinite(y))
    assert not np.any(newton_schulz(jnp.zeros((2, 3)), eps=0.0))


def test_a_bad_entry_spoils_its_own_matrix_only():
    x = np.random.default_rng(4).normal(size=(3, 4, 4)).astype(np.float32)
    clean = newton_schulz(jnp.asarray(x))
    for bad in (np.nan, np.inf):
        x[1, 2, 0] = bad
        y = newton_schulz(jnp.asarray(x))
        assert np.all(np.isnan(y[1]))
        np.testing.assert_allclose(y[np.array([0, 2])], clean[np.array([0, 2])], atol=1e-6)


def test_coefficients_in_every_spelling():
    assert ns_triples("keller", 3) == (KELLER,) * 3
    assert ns_triples([KELLER, (1, 2, 3)], 2) == (KELLER, (1.0, 2.0, 3.0))
    assert ns_triples("dion", 2) == NS_COEFFS["dion"][:2]
    assert ns_triples(lambda rows, cols: (rows, cols, 0), 1, 4, 24) == ((4.0, 24.0, 0.0),)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(5, 3)), jnp.float32)
    by_size = newton_schulz(x, coeffs=lambda rows, cols: {(3, 5): "dion"}[rows, cols])
    np.testing.assert_array_equal(by_size, newton_schulz(x, coeffs="dion"))


@pytest.mark.parametrize(
    ("coeffs", "message"),
    [
        ("kellar", "ns_coeffs must be one of 'keller'"),
        ((1.0, 2.0), "three finite numbers"),
        ((1.0, 2.0, float("nan")), "three finite numbers"),
        ([(1.0, 2.0, 3.0)] * 4, "triples for 4 steps, ns_steps is 5"),
        (None, "three finite numbers"),
    ],
)
def test_bad_coefficients(coeffs, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(jnp.ones((2, 2)), coeffs=coeffs)


@pytest.mark.parametrize("name", NS_COEFFS)
@pytest.mark.parametrize("least", [1.0, 1e-5])
def test_the_gram_form_is_the_same_iteration(name, least):
    x = jnp.asarray(with_spectrum(8, 24, np.geomspace(least, 1.0, 8)), jnp.float32)
    plain, gram = (newton_schulz(x, coeffs=name, form=form) for form in ("plain", "gram"))
    np.testing.assert_allclose(gram, plain, atol=1e-4)
    np.testing.assert_array_equal(newton_schulz(x, coeffs=name), gram)  # 8 x 24: gram is cheaper
    square = x[:, :8]
    plain = newton_schulz(square, coeffs=name, form="plain")
    np.testing.assert_array_equal(newton_schulz(square, coeffs=name), plain)


def test_when_the_gram_form_pays():
    # rounding of 1.2e-7 grows by 3.44^2 = 11.9 a step and may reach 1e-4 after the second
    assert list(map(len, gram_segments([KELLER] * 5, jnp.float32))) == [3, 2]
    assert len(gram_segments([KELLER] * 5, jnp.float64)) == 1
    # two segments: 4 m^2 n each; 2 m^3 a step and 6 m^3 between steps
    assert gram_flops(2, 8, [KELLER] * 5, jnp.float32) == 2 * 4 * 4 * 8 + (10 + 6 * 3) * 8
    assert plain_flops(2, 8, 5) == 5 * (4 * 4 * 8 + 2 * 8)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(4, 32)), jnp.float32)
    rough = newton_schulz(x, dtype="bfloat16", form="plain")
    np.testing.assert_array_equal(newton_schulz(x, dtype="bfloat16"), rough)


def test_bad_shapes_and_steps():
    with pytest.raises(ValueError, match=r"\(\.\.\., m, n\), got \(3,\)"):
        newton_schulz(jnp.ones(3))
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        newton_schulz(jnp.ones((2, 2)), 0)
    with pytest.raises(ValueError, match="form must be one of 'auto', 'plain', 'gram', got 'qr'"):
        newton_schulz(jnp.ones((2, 2)), form="qr")
    assert newton_schulz(jnp.ones((0, 3))).shape == (0, 3)


# -- the engine -------------------------------------------------------------------------------


def layouts():
    """Leaves of every layout whose matrices are 2 x 6 in one orientation or the other."""
    rng = np.random.default_rng(6)
    shapes = {
        "dense/kernel": ((6, 2), None),
        "out/kernel": ((2, 3, 2), MatrixAxes((), (0, 1), (2,))),
        "query/kernel": ((2, 3, 2), MatrixAxes((), (0,), (1, 2))),
        "conv/kernel": ((1, 3, 2, 2), MatrixAxes((), (0, 1, 2), (3,))),
        "stack/kernel": ((2, 4, 6), MatrixAxes((1,), (0,), (2,))),
    }
    tree = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, (s, _) in shapes.items()}
    override = {name: axes for name, (_, axes) in shapes.items() if axes is not None}
    return tree, leaf_axes(tree, override)


def test_one_bucket_for_every_layout_of_a_size():
    tree, axes = layouts()
    seen = []

    def kernel(stack):
        seen.append(stack.shape)
        return stack

    got = map_matrices(kernel, tree, axes)
    assert seen == [(4 + 4, 2, 6)]  # four leaves of one matrix, one of four
    for name, leaf in tree.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    seen.clear()
    map_matrices(kernel, tree, axes, bucket=False)
    assert sorted(seen) == [(1, 2, 6)] * 4 + [(4, 2, 6)]


def test_matrices_are_read_as_their_axes_say():
    tree, axes = layouts()
    got = map_matrices(newton_schulz, tree, axes)
    alone = map_matrices(newton_schulz, tree, axes, bucket=False)
    conv, out, query, stack = (tree[f"{k}/kernel"] for k in ("conv", "out", "query", "stack"))
    expected = {
        "conv/kernel": newton_schulz(conv.reshape(6, 2)).reshape(conv.shape),
        "dense/kernel": newton_schulz(tree["dense/kernel"]),
        "out/kernel": newton_schulz(out.reshape(6, 2)).reshape(out.shape),
        "query/kernel": newton_schulz(query.reshape(2, 6)).reshape(query.shape),
        "stack/kernel": jnp.stack([newton_schulz(stack[:, i]) for i in range(4)], axis=1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(alone[name], value, atol=1e-6, err_msg=name)


def test_chunks_are_bounded_and_change_nothing():
    tree, axes = layouts()
    whole = map_matrices(newton_schulz, tree, axes)
    seen = []

    def kernel(stack):
        seen.append(stack.shape)
        return newton_schulz(stack)

    got = map_matrices(kernel, tree, axes, chunk=40)  # three matrices of 12 entries
    assert seen == [(3, 2, 6), (3, 2, 6), (2, 2, 6)]
    for name, leaf in whole.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-6, err_msg=name)
    seen.clear()
    map_matrices(kernel, tree, axes, chunk=1)
    assert seen == [(1, 2, 6)] * 8


def test_chunks_share_their_memory():
    tree = {f"layer_{i}": {"kernel": jnp.ones((32, 48))} for i in range(16)}

    def temporary(chunk):
        def run(tree):
            return map_matrices(newton_schulz, tree, leaf_axes(tree), chunk=chunk)

        return jax.jit(run).lower(tree).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2 * 32 * 48) < temporary(16 * 32 * 48) / 3


@pytest.mark.parametrize("chunk", [None, 12])
def test_a_bad_matrix_spoils_no_other_leaf(chunk):
    tree, axes = layouts()
    run = jax.jit(lambda tree: map_matrices(newton_schulz, tree, axes, chunk=chunk))
    clean = run(tree)
    for bad in (np.nan, np.inf):
        got = run({**tree, "stack/kernel": tree["stack/kernel"].at[0, 1, 0].set(bad)})
        for name, leaf in clean.items():
            if name == "stack/kernel":  # four matrices on axis 1
                assert np.all(np.isnan(got[name][:, 1]))
                rest = np.array([0, 2, 3])
                np.testing.assert_allclose(got[name][:, rest], leaf[:, rest], atol=1e-6)
            else:
                np.testing.assert_allclose(got[name], leaf, atol=1e-6, err_msg=name)


def test_sizes_and_dtypes_make_buckets_and_leaves_keep_theirs():
    tree = {
        "a": {"kernel": jnp.ones((2, 3), jnp.bfloat16)},
        "b": {"kernel": jnp.ones((3, 2), jnp.float32)},
        "c": {"kernel": jnp.ones((3, 3), jnp.float32)},
        "d": {"bias": jnp.ones(3), "kernel": jnp.ones((0, 3)), "none": None, "scale": 2.0},
    }
    seen = []

    def kernel(stack):
        seen.append((stack.shape, stack.dtype.name))
        return 2 * stack

    got = map_matrices(kernel, tree, leaf_axes(tree))
    assert seen == [((1, 2, 3), "bfloat16"), ((1, 2, 3), "float32"), ((1, 3, 3), "float32")]
    assert got["a"]["kernel"].dtype == jnp.bfloat16
    assert got["d"]["scale"] == 2.0
    np.testing.assert_array_equal(got["d"]["bias"], tree["d"]["bias"])
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    seen.clear()
    got = map_matrices(kernel, tree, leaf_axes(tree), dtype=jnp.bfloat16)
    assert seen == [((2, 2, 3), "bfloat16"), ((1, 3, 3), "bfloat16")]
    assert got["b"]["kernel"].dtype == jnp.float32
    assert map_matrices(kernel, {}, []) == {}


def test_narrowing_keeps_finite_what_is_finite():
    x = jnp.array([1e30, -1e30, jnp.inf, 1.0], jnp.float32)
    np.testing.assert_array_equal(narrow(x, jnp.float16), [65504.0, -65504.0, jnp.inf, 1.0])
    assert narrow(x, jnp.float32) is x or np.array_equal(narrow(x, jnp.float32), x)
