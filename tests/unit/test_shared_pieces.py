"""The small pieces that several methods share, on numbers that a reader can check by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest

import optimkit as ok
from optimkit.transforms.suppress_outliers import magnitude_quantile


def apply(tx, updates, params=None):
    """One update from a fresh state."""
    return tx.update(updates, tx.init(updates if params is None else params), params)[0]


def run(tx, sequence):
    """Updates after each of a sequence, and the last state."""
    state, out = tx.init(jnp.asarray(sequence[0])), []
    for update in sequence:
        new, state = tx.update(jnp.asarray(update), state)
        out.append(new)
    return out, state


class UpdateMathTest(chex.TestCase):
    """Each update with and without jit, and on device."""

    @chex.all_variants(with_pmap=False)
    def test_limit_norm_growth(self):
        tx = ok.limit_norm_growth(1.5, 0.5)
        state = self.variant(tx.init)({"w": jnp.zeros(2)})
        update = self.variant(tx.update)
        first, state = update({"w": jnp.array([3.0, 4.0])}, state)
        np.testing.assert_allclose(first["w"], [3.0, 4.0], rtol=1e-6)
        # norm 50, at most 1.5 * (5 + 0.5) = 8.25
        second, state = update({"w": jnp.array([30.0, 40.0])}, state)
        np.testing.assert_allclose(second["w"], [4.95, 6.6], rtol=1e-6)
        np.testing.assert_allclose(state.norm["w"], 8.25, rtol=1e-6)
        third, state = update({"w": jnp.array([0.3, 0.4])}, state)
        np.testing.assert_allclose(third["w"], [0.3, 0.4], rtol=1e-6)
        np.testing.assert_allclose(state.norm["w"], 0.5, rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_normalize_columns(self):
        kernel = jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]])
        out = self.variant(lambda u: apply(ok.normalize_columns(), u))({"kernel": kernel})
        # root mean squares 5 / sqrt(2), 0, 1
        expected = [[0.6 * 2**0.5, 0.0, 1.0], [0.8 * 2**0.5, 0.0, -1.0]]
        np.testing.assert_allclose(out["kernel"], expected, rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_suppress_outliers(self):
        # sorted magnitudes 1 2 2 3 100: three quarters of the way is 3
        u = jnp.array([1.0, -2.0, 3.0, -100.0, 2.0])
        out = self.variant(lambda u: apply(ok.suppress_outliers(0.75, eps=0.5), u))(u)
        np.testing.assert_allclose(out, [1.0, -2.0, 3.0, -3.5, 2.0], rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_gate_small_gradients(self):
        g = jnp.array([0.5, -0.6, 0.0, 2.0])
        out = self.variant(lambda g: apply(ok.gate_small_gradients(0.25), g))(g)
        np.testing.assert_array_equal(out, np.float32([0.0, -0.6, 0.0, 2.0]))

    @chex.all_variants(with_pmap=False)
    def test_project_to_norm(self):
        tx = ok.project_to_norm()
        params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.array([2.0])}
        updates = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.array([7.0])}
        out, state = self.variant(tx.update)(updates, self.variant(tx.init)(params), params)
        # The kernel doubled, and is halved again; the bias moves freely.
        np.testing.assert_allclose(out["kernel"], np.zeros((2, 2)), atol=1e-6)
        np.testing.assert_array_equal(out["bias"], [7.0])
        np.testing.assert_allclose(np.ravel(state.target_norm["kernel"]), 5.0, rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_orthogonal_to_params(self):
        w, g = jnp.array([2.0, 0.0, 0.0]), jnp.array([12.0, 3.0, 4.0])
        for rescale, expected in ((False, [0.0, 3.0, 4.0]), (True, [0.0, 7.8, 10.4])):
            tx = ok.orthogonal_to_params(rescale=rescale)  # |g| = 13, what is left has norm 5
            out = self.variant(lambda g, w, tx=tx: apply(tx, g, w))(g, w)
            np.testing.assert_allclose(out, expected, atol=1e-5)

    @chex.all_variants(with_pmap=False)
    def test_exponentiate_updates(self):
        w, u = jnp.array([1.0, -1.0, 0.0, 3.0]), jnp.log(jnp.array([2.0, 2.0, 2.0, 0.5]))
        out = self.variant(lambda u, w: apply(ok.exponentiate_updates(), u, w))(u, w)
        np.testing.assert_allclose(w + out, [2.0, -0.5, 0.0, 1.5], atol=1e-6)


# -- limit_norm_growth ------------------------------------------------------------------------


def test_a_zero_update_holds_the_limiter_down_unless_it_resets() -> None:
    sequence = [[0.0], [1.0], [1.0]]
    stuck, state = run(ok.limit_norm_growth(2.0, 1e-3), sequence)
    # 2 * (0 + 0.001), then 2 * (0.002 + 0.001)
    np.testing.assert_allclose(np.ravel(stuck), [0.0, 0.002, 0.006], rtol=1e-6)
    np.testing.assert_allclose(state.norm, 0.006, rtol=1e-6)
    free, _ = run(ok.limit_norm_growth(2.0, 1e-3, reset_on_zero=True), sequence)
    np.testing.assert_array_equal(np.ravel(free), [0.0, 1.0, 1.0])


def test_the_limiter_forgets_an_infinite_update() -> None:
    out, state = run(ok.limit_norm_growth(2.0, 0.0), [[np.nan], [1.0], [np.inf], [8.0]])
    np.testing.assert_array_equal(np.ravel(out), [0.0, 1.0, 0.0, 2.0])
    assert float(state.norm) == 2.0


def test_one_norm_for_the_whole_tree() -> None:
    tx = ok.limit_norm_growth(2.0, 0.0, per_leaf=False)
    updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = tx.update(updates, tx.init(updates))
    assert float(state.norm) == 5.0
    # norm 50 -> 10: the quiet leaf shrinks with the loud one
    out, _ = tx.update({"a": jnp.array([30.0]), "b": jnp.array([40.0])}, state)
    np.testing.assert_allclose([out["a"][0], out["b"][0]], [6.0, 8.0], rtol=1e-6)


def test_growth_without_a_limit() -> None:
    out, _ = run(ok.limit_norm_growth(np.inf), [[1.0], [1e6]])
    np.testing.assert_array_equal(np.ravel(out), np.float32([1.0, 1e6]))


# -- normalize_columns ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "ones"),
    [
        ("dense/kernel", (4, 3), (0,)),
        ("conv/kernel", (2, 2, 2, 3), (0, 1, 2)),
        ("query/kernel", (4, 2, 3), (0,)),  # one norm a head and feature
        ("out/kernel", (2, 3, 4), (0, 1)),
        ("embed/embedding", (5, 3), (0,)),  # one norm a feature, over the vocabulary
    ],
)
def test_norms_over_the_inputs_are_one(name: str, shape: tuple, ones: tuple) -> None:
    top, last = name.split("/")
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    out = apply(ok.normalize_columns(norm="l2"), {top: {last: leaf}})[top][last]
    np.testing.assert_allclose(np.sqrt(np.sum(np.square(out), axis=ones)), 1, rtol=1e-5)


def test_each_layer_of_a_stack_and_a_tied_table_by_override() -> None:
    stack = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
    override = {"layers": ok.MatrixAxes((0,), (1,), (2,))}
    out = apply(ok.normalize_columns(norm="l2", matrix_axes=override), {"layers": stack})
    np.testing.assert_allclose(out["layers"], [np.eye(2), np.eye(2)], rtol=1e-6)

    table = {"embedding": jnp.array([[3.0, 4.0], [6.0, 8.0]])}
    by_token = {"embedding": ok.MatrixAxes((), (1,), (0,))}
    for given in (by_token, lambda name, _: by_token.get(name)):
        out = apply(ok.normalize_columns(norm="l2", matrix_axes=given), table)
        np.testing.assert_allclose(out["embedding"], [[0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


def test_axes_by_number_spare_vectors() -> None:
    tree = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([3.0, 4.0])}
    rows = apply(ok.normalize_columns(-1, "l2"), tree)
    np.testing.assert_allclose(rows["kernel"], [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(rows["bias"], [3.0, 4.0])
    columns = apply(ok.normalize_columns(axis=0, norm="l2"), tree)
    np.testing.assert_allclose(columns["kernel"], [[1.0, 1.0]], rtol=1e-6)
    with pytest.raises(ValueError, match="axes 2 do not all exist in leaf 'kernel'"):
        apply(ok.normalize_columns(2), tree)
    with pytest.raises(ValueError, match="axes must be one of 'inputs'"):
        ok.normalize_columns("rows")


def test_the_floor_is_not_added() -> None:
    tx = ok.normalize_columns(norm="l2", eps=2.0)
    out = apply(tx, {"kernel": jnp.array([[1.0, 4.0]])})
    np.testing.assert_allclose(out["kernel"], [[0.5, 1.0]], rtol=1e-6)


# -- suppress_outliers ------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("traced", [False, True])
def test_the_quantile_without_sorting(quantile: float, traced: bool) -> None:
    rng = np.random.default_rng(1)
    x = np.round(rng.normal(size=(3, 4, 5)), 1).astype(np.float32)  # rounded: with ties
    q = jnp.float32(quantile) if traced else quantile
    got = magnitude_quantile(jnp.asarray(x), q, (0, 2))
    expected = np.quantile(np.abs(x), quantile, axis=(0, 2), keepdims=True)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_the_quantile_in_64_bits(x64) -> None:
    x = np.random.default_rng(2).normal(size=33)
    got = magnitude_quantile(jnp.asarray(x), 0.9, (0,))
    np.testing.assert_allclose(got, [np.quantile(np.abs(x), 0.9)], rtol=1e-15)


def test_each_layer_has_its_own_quantile_and_a_fixed_threshold_needs_none() -> None:
    stack = jnp.array([[[1.0, 1.0], [1.0, 9.0]], [[10.0, 10.0], [10.0, 90.0]]])
    override = {"layers": ok.MatrixAxes((0,), (1,), (2,))}
    out = apply(ok.suppress_outliers(0.5, matrix_axes=override), {"layers": stack})["layers"]
    np.testing.assert_allclose(out, [np.ones((2, 2)), np.full((2, 2), 10.0)], rtol=1e-6)
    with pytest.raises(ValueError, match="several ways"):
        apply(ok.suppress_outliers(0.5), {"layers": stack})
    fixed = apply(ok.suppress_outliers(threshold=5.0), {"layers": -stack})["layers"]
    np.testing.assert_array_equal(fixed, np.maximum(-stack, -5.0))


def test_outliers_that_are_not_finite() -> None:
    out = apply(ok.suppress_outliers(0.5, eps=0.0), jnp.array([1.0, 2.0, -np.inf]))
    np.testing.assert_array_equal(out, [1.0, 2.0, -2.0])
    out = apply(ok.suppress_outliers(0.5, eps=0.0), jnp.array([1.0, 2.0, np.nan]))
    np.testing.assert_array_equal(out, [1.0, 2.0, np.nan])


# -- gate_small_gradients ---------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, True), (0.99, True), (1.0, False)])
def test_the_published_gate_compares_a_truth_value(threshold: float, kept: bool) -> None:
    tree = {"a": jnp.array([0.0, 1e-30]), "b": jnp.zeros(2)}
    out = apply(ok.gate_small_gradients(threshold, "any"), tree)
    np.testing.assert_array_equal(out["a"], np.where(kept, tree["a"], 0))
    np.testing.assert_array_equal(out["b"], [0.0, 0.0])


def test_nan_does_not_pass_the_gate_of_an_element() -> None:
    g = jnp.array([np.nan, 2.0])
    np.testing.assert_array_equal(apply(ok.gate_small_gradients(0.5), g), [0.0, 2.0])
    np.testing.assert_array_equal(apply(ok.gate_small_gradients(0.5, "any"), g), [np.nan, 2.0])


# -- project_to_norm --------------------------------------------------------------------------


def test_projection_at_every_third_update() -> None:
    tx = ok.project_to_norm(every=3)
    w = {"kernel": jnp.ones((1, 1))}
    state, seen = tx.init(w), []
    for _ in range(6):
        u, state = tx.update({"kernel": jnp.ones((1, 1))}, state, w)
        w = optax.apply_updates(w, u)
        seen.append(float(w["kernel"][0, 0]))
    assert seen == [2.0, 3.0, 1.0, 2.0, 3.0, 1.0]


def test_one_norm_a_channel_or_a_layer() -> None:
    w = {"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])}
    out = apply(ok.project_to_norm(axis=-1), {"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])}, w)
    np.testing.assert_allclose(out["kernel"], np.zeros((2, 2)), atol=1e-6)
    state = ok.project_to_norm(axis=-1).init(w)
    np.testing.assert_allclose(state.target_norm["kernel"], [[5.0, 1.0]], rtol=1e-6)
    layers = {"stack": jnp.stack([jnp.full((2, 2), 1.0), jnp.full((2, 2), 2.0)])}
    axes = {"stack": ok.MatrixAxes((0,), (1,), (2,))}
    state = ok.project_to_norm(matrix_axes=axes).init(layers)
    np.testing.assert_allclose(np.ravel(state.target_norm["stack"]), [2.0, 4.0], rtol=1e-6)


def test_leaves_chosen_by_default_and_by_mask() -> None:
    w = {name: {"kernel": jnp.ones((2, 2))} for name in ("dense", "head")}
    u = jax.tree.map(jnp.ones_like, w)

    def moves(**arguments: object) -> list[str]:
        out = apply(ok.project_to_norm(**arguments), u, w)
        return [name for name in w if np.any(np.asarray(out[name]["kernel"]) > 0.5)]

    only_head = {"dense": {"kernel": False}, "head": {"kernel": True}}
    assert moves() == ["head"]
    assert moves(mask=only_head) == ["dense"]
    assert moves(mask=lambda params: jax.tree.map(lambda _: True, params)) == []
    assert moves(mask=["head/*"]) == ["dense"]
    with pytest.raises(ValueError, match="matches none"):
        moves(mask=["tail/*"])


def test_a_kernel_that_starts_or_ends_at_zero_is_not_projected() -> None:
    zero, one = {"kernel": jnp.zeros((2, 1))}, {"kernel": jnp.ones((2, 1))}
    np.testing.assert_array_equal(apply(ok.project_to_norm(), one, zero)["kernel"], one["kernel"])
    to_zero = jax.tree.map(jnp.negative, one)
    out = apply(ok.project_to_norm(), to_zero, one)
    np.testing.assert_array_equal(out["kernel"], to_zero["kernel"])


# -- orthogonal_to_params ---------------------------------------------------------------------


def test_what_has_no_direction_passes() -> None:
    tx = ok.orthogonal_to_params()
    g = {"one": jnp.array([3.0]), "fresh": jnp.array([1.0, 2.0]), "done": jnp.zeros(2)}
    w = {"one": jnp.array([2.0]), "fresh": jnp.zeros(2), "done": jnp.ones(2)}
    chex.assert_trees_all_equal(apply(tx, g, w), g)


def test_a_parallel_gradient_becomes_zero_instead_of_noise() -> None:
    w = jnp.array([1.0, 2.0, 3.0]) / 7
    np.testing.assert_array_equal(apply(ok.orthogonal_to_params(), 5 * w, w), np.zeros(3))


def test_eps_stands_beside_the_square_of_the_norm() -> None:
    # <w, g> / (<w, w> + 4) = 8 / 8
    tx = ok.orthogonal_to_params(rescale=False, eps=4.0)
    out = apply(tx, jnp.array([4.0, 1.0]), jnp.array([2.0, 0.0]))
    np.testing.assert_allclose(out, [2.0, 1.0], rtol=1e-6)


def test_the_whole_tree_as_one_vector() -> None:
    g = {"a": jnp.array([3.0]), "b": jnp.array([1.0])}
    w = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
    # <w, g> / <w, w> = 2
    out = apply(ok.orthogonal_to_params(rescale=False, scope="global"), g, w)
    np.testing.assert_allclose([out["a"][0], out["b"][0]], [1.0, -1.0], rtol=1e-6)
    out = apply(ok.orthogonal_to_params(scope="global"), g, w)  # of norm sqrt(10), not sqrt(2)
    np.testing.assert_allclose([out["a"][0], out["b"][0]], [5**0.5, -(5**0.5)], rtol=1e-6)
    chosen = {"a": True, "b": False}
    out = apply(ok.orthogonal_to_params(rescale=False, scope="global", mask=chosen), g, w)
    np.testing.assert_allclose([out["a"][0], out["b"][0]], [0.0, 1.0], atol=1e-6)


# -- exponentiate_updates ---------------------------------------------------------------------


def test_without_signs_a_negative_weight_climbs() -> None:
    out = apply(ok.exponentiate_updates(signed=False), jnp.log(jnp.array([2.0])), jnp.array([-1.0]))
    np.testing.assert_allclose(out, [-1.0], rtol=1e-6)  # -1 -> -2


def test_the_step_in_log_space_is_limited() -> None:
    tx = ok.exponentiate_updates(max_log_step=float(np.log(2.0)))
    w = jnp.array([1.0, 1.0])
    np.testing.assert_allclose(w + apply(tx, jnp.array([9.0, -9.0]), w), [2.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_step_kills_a_weight_or_makes_it_infinite(dtype: str) -> None:
    w = jnp.array([1.0, -1.7, 0.3, -0.01], dtype)
    for size in (6e4, -6e4):
        after = w + apply(ok.exponentiate_updates(), jnp.full(4, size, dtype), w)
        assert np.all(np.isfinite(np.float32(after)))
        np.testing.assert_array_equal(np.sign(np.float32(after)), np.sign(np.float32(w)))


def test_any_optimizer_keeps_signs() -> None:
    tx = optax.chain(optax.adam(0.5), ok.exponentiate_updates())
    w = jnp.array([0.1, -0.1, 0.0])
    state = tx.init(w)
    for step in range(20):
        grads = jnp.array([1.0, -1.0, 1.0]) * (1 if step < 10 else -1)
        u, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, u)
    np.testing.assert_array_equal(np.sign(w), [1.0, -1.0, 0.0])


if __name__ == "__main__":
    absltest.main()
