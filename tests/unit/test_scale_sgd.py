"""SCALE: momentum for the output layer, columns of norm one, Adam for vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.layout import named_leaves
from optimkit.transforms.last_layer_momentum import last_layer_tree

PARAMS = {
    "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "embed": {"embedding": jnp.ones((3, 2))},
    "lm_head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "multi_head_attention": {"kernel": jnp.ones((2, 2))},
}


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def chosen(last_layer):
    return {name for name, use in named_leaves(last_layer_tree(PARAMS, last_layer)) if use}


def test_the_last_layer_by_word_path_function_and_tree():
    head = {"lm_head/kernel", "lm_head/bias"}
    assert chosen("head") == chosen("lm_head") == chosen(["lm_head/*"]) == head
    assert chosen("logits") == chosen(None) == chosen([]) == set()
    assert chosen("embed") == {"embed/embedding"}
    assert chosen(lambda path, leaf: path.startswith("dense") and leaf.ndim > 1) == {"dense/kernel"}
    assert chosen(jax.tree.map(lambda p: p.shape == (3,), PARAMS)) == {"lm_head/bias"}


def test_momentum_and_its_memory():
    tx = ok.last_layer_momentum(0.5, last_layer="head")
    state = tx.init(PARAMS)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(2, 3), (3,)}
    grads = [random_like(PARAMS, seed) for seed in (0, 1)]
    for g in grads:
        updates, state = tx.update(g, state)
    mean = jax.tree.map(lambda a, b: 0.25 * a + 0.5 * b, *(g["lm_head"] for g in grads))
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(updates["lm_head"][name], mean[name], rtol=1e-6)
    np.testing.assert_array_equal(updates["dense"]["kernel"], grads[1]["dense"]["kernel"])


def test_state_is_the_head_and_vectors():
    params = PARAMS
    state = ok.scale_sgd(0.1).init(params)
    arrays = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    vectors = [(2,), (2,), (3,), (3,)]  # two moments each
    assert arrays == sorted([(2, 3), *vectors])


@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_first_step(norm):
    tx = ok.scale_sgd(0.1, weight_decay=0.5, vector_learning_rate=0.01, norm=norm)
    grads = random_like(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    mean = np.mean if norm == "rms" else np.sum
    for name in ("dense", "embed", "lm_head"):  # columns of all of them are the last axis
        key = "embedding" if name == "embed" else "kernel"
        g = np.asarray(grads[name][key])
        expected = -0.1 * (g / np.sqrt(mean(np.square(g), axis=0)) + 0.5)
        np.testing.assert_allclose(updates[name][key], expected, rtol=1e-4)
    expected = -0.01 * (np.sign(grads["dense"]["bias"]) + 0.5)
    np.testing.assert_allclose(updates["dense"]["bias"], expected, rtol=1e-4)


def test_a_tied_table_has_one_norm_a_token():
    axes = {"embed/*": ok.MatrixAxes((), (1,), (0,))}
    tx = ok.scale_sgd(0.1, last_layer=["embed/*"], matrix_axes=axes)
    params = {"embed": PARAMS["embed"]}
    grads = random_like(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        np.mean(np.square(updates["embed"]["embedding"]), axis=1), 0.01, rtol=1e-4
    )


def test_rates_by_schedule():
    tx = ok.scale_sgd(lambda count: 0.1 * (count + 1), vector_learning_rate=lambda count: 1.0)
    state = tx.init(PARAMS)
    grads = random_like(PARAMS)
    sizes = []
    for _ in range(2):
        updates, state = tx.update(grads, state, PARAMS)
        sizes.append(float(jnp.linalg.norm(updates["dense"]["kernel"])))
        np.testing.assert_allclose(np.abs(updates["dense"]["bias"]), 1.0, rtol=1e-4)
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=1e-5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1, got 1"),
        ({"b1": -0.1}, "b1 must be >= 0 and < 1, got -0.1"),
        ({"norm_eps": -1.0}, "norm_eps must be >= 0, got -1"),
        ({"norm": "linf"}, "norm must be one of 'rms', 'l2', got 'linf'"),
        ({"vector_learning_rate": -1.0}, "vector_learning_rate must be >= 0, got -1"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        ok.scale_sgd(0.1, **keywords)


def test_bad_trees():
    with pytest.raises(ValueError, match="last_layer: no component of a path is 'output'"):
        ok.scale_sgd(0.1, last_layer="output").init(PARAMS)
    with pytest.raises(ValueError, match="last_layer: 'head/kernel' matches none of the leaves"):
        ok.scale_sgd(0.1, last_layer=["head/kernel"]).init(PARAMS)
    with pytest.raises(ValueError, match="last_layer: the tree of bools has another structure"):
        ok.scale_sgd(0.1, last_layer={"head": True}).init(PARAMS)
    with pytest.raises(ValueError, match=r"'blocks/kernel'.*several ways.*matrix_axes="):
        ok.scale_sgd(0.1).init({"blocks": {"kernel": jnp.ones((2, 3, 4))}})
    tx = ok.last_layer_momentum(last_layer="head")
    with pytest.raises(ValueError, match=r"missing leaves \['dense/bias'\]"):
        tx.update({**PARAMS, "dense": {"kernel": jnp.ones((2, 2))}}, tx.init(PARAMS))


def test_masked_leaves_stay_masked():
    tx = optax.masked(ok.last_layer_momentum(last_layer="head"), lambda p: jax.tree.map(
        lambda x: x.ndim > 1, p
    ))  # fmt: skip
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    np.testing.assert_array_equal(updates["lm_head"]["bias"], PARAMS["lm_head"]["bias"])
    np.testing.assert_allclose(updates["lm_head"]["kernel"], 0.1 * PARAMS["lm_head"]["kernel"])
