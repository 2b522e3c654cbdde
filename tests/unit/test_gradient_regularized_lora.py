"""A gradient steered by a reference: what each rule must satisfy, and LoRA factors alone moving."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.gradients import sam_perturbed_params, sam_reference_grads
from optimkit.layout import lora_mask
from optimkit.numerics import tree_norm, tree_vdot

G = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[-3.0]])}
AGAINST = {"a": jnp.array([-1.0, 1.0]), "b": jnp.array([[2.0]])}
ALONG = jax.tree.map(jnp.negative, AGAINST)


def steered(reference, g=G, **kwargs):
    tx = ok.regularize_gradient(**kwargs)
    return tx.update(g, tx.init(g), reference_grads=reference)[0]


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_conflict_acts_on_conflicts_alone():
    assert_close(steered(ALONG), G)
    new = steered(AGAINST)
    np.testing.assert_allclose(tree_vdot(new, AGAINST), 0, atol=1e-5)
    halfway = jax.tree.map(lambda g, n: (g + n) / 2, G, new)
    assert_close(steered(AGAINST, strength=0.5), halfway)


def test_align_keeps_what_is_along_the_reference():
    # <G, AGAINST> = -5 and |AGAINST|^2 = 6, both over the whole tree.
    assert_close(steered(AGAINST, mode="align"), jax.tree.map(lambda r: -5 / 6 * r, AGAINST))
    assert_close(steered(AGAINST, mode="align", strength=0.0), G)


def test_blend_adds():
    assert_close(
        steered(AGAINST, mode="blend", strength=0.5),
        jax.tree.map(lambda g, r: g + 0.5 * r, G, AGAINST),
    )


@pytest.mark.parametrize("mode", ["conflict", "align"])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_size_of_the_reference_does_not_matter(mode, scale):
    scaled = jax.tree.map(lambda r: scale * r, AGAINST)
    assert_close(steered(scaled, mode=mode, eps=0.0), steered(AGAINST, mode=mode, eps=0.0))


def test_leaf_by_leaf():
    new = steered(AGAINST, per_leaf=True)
    np.testing.assert_array_equal(new["a"], G["a"])  # 1 > 0: no conflict in this leaf
    np.testing.assert_allclose(new["b"], 0, atol=1e-6)


@pytest.mark.parametrize("mode", ["conflict", "align", "blend"])
def test_norm_restored(mode):
    new = steered(AGAINST, mode=mode, norm="restore")
    np.testing.assert_allclose(tree_norm(new), tree_norm(G), rtol=1e-6)


@pytest.mark.parametrize("mode", ["conflict", "align", "blend"])
@pytest.mark.parametrize("value", [0.0, jnp.nan, jnp.inf])
def test_a_useless_reference_changes_nothing(mode, value):
    useless = {**AGAINST, "a": jnp.full(2, value)} if value else jax.tree.map(jnp.zeros_like, G)
    assert_close(steered(useless, mode=mode), G)


def test_sam_on_a_quadratic():
    a, w = jnp.array([1.0, 3.0]), jnp.array([2.0, -1.0])
    g = a * w
    expected = a * (w + 0.1 * g / jnp.linalg.norm(g))
    np.testing.assert_allclose(sam_reference_grads(lambda w: a * w, w, g, rho=0.1), expected)
    scaled = jnp.abs(w) * g
    moved = w + 0.1 * w**2 * g / jnp.linalg.norm(scaled)
    np.testing.assert_allclose(sam_perturbed_params(w, g, rho=0.1, adaptive=True), moved, rtol=1e-6)
    np.testing.assert_array_equal(sam_perturbed_params(w, 0 * g, eps=0.0), w)


PARAMS = {"kernel": jnp.array(3.0), "lora_a": jnp.array(1.0), "lora_b": jnp.array(-2.0)}


def loss(p):
    return (p["kernel"] + p["lora_a"] * p["lora_b"]) ** 2


def test_only_factors_move_climb_and_are_remembered():
    tx = ok.gradient_regularized_lora(optax.trace(0.9), rho=0.1, mode="blend")
    seen = []

    def grad_fn(p):
        seen.append(p)
        return jax.grad(loss)(p)

    grads, state = jax.grad(loss)(PARAMS), tx.init(PARAMS)
    updates, state = tx.update(grads, state, PARAMS, grad_fn=grad_fn)
    g = jnp.array([grads["lora_a"], grads["lora_b"]])
    way = 0.1 * g / jnp.linalg.norm(g)
    assert_close(seen[0], {"kernel": 3.0, "lora_a": 1 + way[0], "lora_b": -2 + way[1]})
    reference = jax.grad(loss)(seen[0])
    assert updates["kernel"] == 0
    np.testing.assert_allclose(updates["lora_a"], g[0] + reference["lora_a"], rtol=1e-5)
    assert len(jax.tree.leaves(state)) == 2
    assert lora_mask(PARAMS) == {"kernel": False, "lora_a": True, "lora_b": True}


def test_a_loss_serves_as_well():
    tx = ok.gradient_regularized_lora(optax.identity())
    grads, state = jax.grad(loss)(PARAMS), tx.init(PARAMS)
    assert_close(
        tx.update(grads, state, PARAMS, grad_fn=jax.grad(loss))[0],
        tx.update(grads, state, PARAMS, value_fn=loss)[0],
    )


def test_bad_input():
    tx = ok.gradient_regularized_lora(optax.identity())
    with pytest.raises(ValueError, match="no parameter is a LoRA factor"):
        tx.init({"kernel": jnp.ones(2)})
    with pytest.raises(ValueError, match="needs grad_fn or value_fn"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS), grad_fn=jax.grad(loss))
    with pytest.raises(ValueError, match="needs reference_grads"):
        ok.regularize_gradient().update(G, optax.EmptyState())
    with pytest.raises(ValueError, match="reference_grads leaf 'a'"):
        steered({**AGAINST, "a": jnp.ones(1)})
    with pytest.raises(ValueError, match="gradient of grad_fn and the parameters are different"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: p["kernel"])
    for arguments, message in (
        ({"mode": "project"}, "mode must be one of 'conflict', 'align', 'blend'"),
        ({"norm": "unit"}, "norm must be one of 'keep_projected', 'restore'"),
        ({"strength": -1.0}, "strength must be >= 0, got -1"),
        ({"eps": -1.0}, "eps must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ok.regularize_gradient(**arguments)
    with pytest.raises(ValueError, match="rho must be >= 0, got -1"):
        ok.gradient_regularized_lora(optax.identity(), rho=-1.0)
