"""Flipped learning rules: which synapses, and what the norm constraint does."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.transforms import rule_flip_mask


class CurlDescentTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_flipped_rows_climb_and_the_norm_stays(self):
        params = {"kernel": jnp.array([[3.0], [4.0]])}
        tx = ok.curl_descent(1.0, flips={"kernel": 1})
        update = self.variant(tx.update)
        updates, _ = update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
        # (6, 0), brought back to norm 5
        np.testing.assert_allclose(params["kernel"] + updates["kernel"], [[5.0], [0.0]], atol=1e-6)


def test_the_signs_of_each_kind_of_leaf() -> None:
    params = {
        "dense": {"kernel": np.zeros((4, 2)), "bias": np.zeros(2)},
        "conv": {"kernel": np.zeros((3, 3, 4, 2))},
        "query": {"kernel": np.zeros((4, 2, 3))},
        "norm": {"scale": np.zeros((4, 4))},
    }
    pre = rule_flip_mask(params, 0.5)
    shapes = jax.tree.map(np.shape, pre)
    assert shapes == {
        "dense": {"kernel": (4, 1), "bias": None},
        "conv": {"kernel": (1, 1, 4, 1)},
        "query": {"kernel": (4, 1, 1)},
        "norm": {"scale": None},
    }
    np.testing.assert_array_equal(pre["conv"]["kernel"].ravel(), [-1, -1, 1, 1])
    post = rule_flip_mask(params, {"query/*": 2, "dense/kernel": 0}, side="post")
    np.testing.assert_array_equal(post["query"]["kernel"], [[[-1, -1, 1], [1, 1, 1]]])
    assert post["dense"]["kernel"] is None
    layers = {"kernel": np.zeros((2, 4, 3))}
    stacked = rule_flip_mask(layers, 1, matrix_axes={"kernel": ok.MatrixAxes((0,), (1,), (2,))})
    assert stacked["kernel"].shape == (1, 4, 1)


def test_a_seed_draws_units() -> None:
    params = {"one": np.zeros((64, 2)), "two": np.zeros((64, 2))}
    drawn = rule_flip_mask(params, 16, seed=3)
    assert all((x == -1).sum() == 16 for x in drawn.values())
    assert not np.array_equal(drawn["one"], drawn["two"])
    chex.assert_trees_all_equal(drawn, rule_flip_mask(params, 16, seed=3))
    assert not np.array_equal(drawn["one"], rule_flip_mask(params, 16, seed=4)["one"])
    # Pinned: a restart with another NumPy must flip the same units.
    few = rule_flip_mask({"kernel": np.zeros((8, 1))}, 3, seed=0)["kernel"]
    np.testing.assert_array_equal(np.flatnonzero(few.ravel() == -1), [2, 3, 5])


def test_an_inner_momentum_and_no_norm() -> None:
    params = {"kernel": jnp.ones((2, 1))}
    tx = ok.curl_descent(0.1, flips=1, preserve_norm=False, inner=optax.trace(0.5))
    state = tx.init(params)
    for expected in ([0.1, -0.1], [0.15, -0.15]):
        updates, state = tx.update({"kernel": jnp.ones((2, 1))}, state, params)
        np.testing.assert_allclose(updates["kernel"].ravel(), expected, rtol=1e-6)


def test_messages() -> None:
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match="flips: 'bias' matches none of the kernels"):
        ok.curl_descent(0.1, flips={"bias": 1}).init(params)
    with pytest.raises(ValueError, match="flips: 3 units of 'kernel', which has 2 on side 'pre'"):
        rule_flip_mask(params, 3)
    for wrong in (-1, 1.5, True, "half"):
        with pytest.raises(ValueError, match="flips must be a count"):
            rule_flip_mask(params, wrong)
    with pytest.raises(ValueError, match="side must be one of 'pre', 'post'"):
        ok.curl_descent(0.1, flips=1, side="both")
    with pytest.raises(ValueError, match="can be read in several ways"):
        rule_flip_mask({"kernel": jnp.ones((2, 2, 2))}, 1)
    tx = ok.flip_signs({"kernel": jnp.ones((3, 1)), "bias": None})
    with pytest.raises(ValueError, match=r"signs of leaf 'kernel' have shape \(3, 1\)"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="signs have another structure"):
        ok.flip_signs({"kernel": None}).update(params, optax.EmptyState(), params)
    with pytest.raises(ValueError, match="flip_signs needs the parameters"):
        ok.flip_signs(lambda p: p).update(params, optax.EmptyState())
