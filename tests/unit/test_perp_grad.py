"""perpGrad and StableMax on numbers checked by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit import nn


class PerpGradTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_momentum_and_decay_come_after_the_projection(self):
        tx = ok.perp_sgd(0.1, 0.5, weight_decay=0.5)
        w = jnp.array([2.0, 0.0])
        # (4, 3) becomes (0, 3), has norm 5 again, and then gets 0.5 w.
        updates, state = self.variant(tx.update)(jnp.array([4.0, 3.0]), tx.init(w), w)
        np.testing.assert_allclose(updates, [-0.1, -0.5], rtol=1e-6)
        updates, _ = self.variant(tx.update)(jnp.array([7.0, 0.0]), state, w)
        # Parallel: nothing is left of the gradient, but decay and half the trace are.
        np.testing.assert_allclose(updates, [-0.15, -0.25], rtol=1e-6)


def test_without_rescaling_it_is_the_papers_formula() -> None:
    w, g = jnp.array([2.0, 0.0]), jnp.array([4.0, 3.0])
    tx = ok.perp_sgd(1.0, rescale=False)
    np.testing.assert_allclose(tx.update(g, tx.init(w), w)[0], [0.0, -3.0], rtol=1e-6)


def test_zero_weights_and_single_entries_are_adamw() -> None:
    params = {"bias": jnp.zeros(2), "temperature": jnp.ones(1)}
    grads = {"bias": jnp.array([1.0, -2.0]), "temperature": jnp.array([3.0])}
    ours, theirs = ok.perp_adamw(0.1, weight_decay=0.1), optax.adamw(0.1, weight_decay=0.1)
    got, _ = ours.update(grads, ours.init(params), params)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize("make", [ok.perp_sgd, ok.perp_adamw])
def test_messages(make) -> None:
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        make(0.1, weight_decay=-1.0)
    with pytest.raises(ValueError, match="learning_rate must be >= 0, got -1"):
        make(-1.0)
    tx = make(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


# -- StableMax --------------------------------------------------------------------------------


def test_probabilities() -> None:
    x = jnp.array([[3.0, -1.0], [0.0, 1.0]])  # s = 4, 1/2; 1, 2
    np.testing.assert_allclose(nn.stablemax(x), [[8 / 9, 1 / 9], [1 / 3, 2 / 3]], rtol=1e-6)
    down = nn.stablemax(x, axis=0)
    np.testing.assert_allclose(down, [[4 / 5, 1 / 5], [1 / 5, 4 / 5]], rtol=1e-6)
    np.testing.assert_allclose(nn.log_stablemax(x), np.log(nn.stablemax(x)), rtol=1e-6)
    assert nn.stablemax(x.astype(jnp.float16)).dtype == jnp.float16


def test_the_gradient_is_exact_where_branches_meet() -> None:
    """At 0 and at exactly 1, and beside a huge logit; p_j s'_j / s_j, less that of the label."""
    logits = jnp.array([[0.0, 0.0], [1.0, 1.0], [1e30, 0.0], [-jnp.inf, 0.0]])
    labels = jnp.array([0, 0, 0, 1])

    def loss(x):
        return nn.stablemax_cross_entropy(x, labels, reduction="sum")

    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, 2 * np.log(2), rtol=1e-6)
    expected = [[-0.5, 0.5], [-0.25, 0.25], [0.0, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


def test_a_large_margin_leaves_a_loss_where_softmax_has_none() -> None:
    logits, labels = jnp.array([[200.0, 0.0]]), jnp.array([0])
    assert float(optax.softmax_cross_entropy_with_integer_labels(logits, labels)[0]) == 0.0
    np.testing.assert_allclose(
        nn.stablemax_cross_entropy(logits, labels), np.log(202 / 201), rtol=1e-4
    )


def test_reductions() -> None:
    logits, labels = jnp.array([[[1.0, 0.0], [0.0, 3.0]]]), jnp.array([[0, 1]])
    each = nn.stablemax_cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(each, -np.log([[2 / 3, 4 / 5]]), rtol=1e-6)
    for reduction, value in (("mean", each.mean()), ("sum", each.sum())):
        got = nn.stablemax_cross_entropy(logits, labels, reduction=reduction)
        np.testing.assert_allclose(got, value, rtol=1e-6)


def test_loss_messages() -> None:
    with pytest.raises(ValueError, match=r"labels have shape \(3,\).*need \(2,\)"):
        nn.stablemax_cross_entropy(jnp.ones((2, 3)), jnp.zeros(3, int))
    with pytest.raises(TypeError, match="labels must be integers, got dtype float32"):
        nn.stablemax_cross_entropy(jnp.ones((2, 3)), jnp.zeros(2))
    with pytest.raises(ValueError, match="reduction must be one of"):
        nn.stablemax_cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), reduction="max")
    with pytest.raises(TypeError, match="logits must be real"):
        nn.stablemax(jnp.ones(2, jnp.complex64))
