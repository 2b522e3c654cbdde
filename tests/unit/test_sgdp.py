"""SGDP on numbers checked by hand, and the claim on the toy problem it was made for."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok

W = jnp.array([[1.0], [0.0]])
TANGENTIAL = jnp.array([[0.01], [1.0]])
"""Its cosine with W is 0.01, below 0.1 / sqrt(2)."""
RADIAL = jnp.array([[1.0], [1.0]])


def one_tree(x):
    return {"kernel": x}


class SgdpTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_first_step_is_dampened_and_projected(self):
        tx = ok.sgdp(0.1, 0.5, dampening=0.25)
        params = one_tree(W)
        updates, state = self.variant(tx.update)(one_tree(TANGENTIAL), tx.init(params), params)
        # b = 0.75 g, without its part along W: (0, 0.75)
        np.testing.assert_allclose(updates["kernel"], [[0.0], [-0.075]], atol=1e-7)
        np.testing.assert_allclose(state[0].trace["kernel"], [[0.0], [0.75]], atol=1e-7)

    @chex.variants(with_jit=True, without_jit=True)
    def test_nesterov_and_the_papers_form_keep_the_radial_part_in_the_buffer(self):
        params = one_tree(W)
        for arguments in ({"nesterov": True}, {"project_buffer": False}):
            tx = ok.sgdp(0.1, 0.5, **arguments)
            updates, state = self.variant(tx.update)(one_tree(TANGENTIAL), tx.init(params), params)
            step = -0.15 if arguments.get("nesterov") else -0.1
            np.testing.assert_allclose(updates["kernel"], [[0.0], [step]], atol=1e-7)
            np.testing.assert_allclose(state[0].trace["kernel"], TANGENTIAL)


def test_decay_is_stretched_by_momentum_and_reduced_where_projected() -> None:
    params = one_tree(W)
    tx = ok.sgdp(0.1, 0.9, weight_decay=0.01, wd_ratio=0.25)
    for gradient, ratio, along in ((TANGENTIAL, 0.25, 0.0), (RADIAL, 1.0, 1.0)):
        updates, _ = tx.update(one_tree(gradient), tx.init(params), params)
        expected = -0.1 * (along + 0.01 / (1 - 0.9) * ratio)
        np.testing.assert_allclose(updates["kernel"][0, 0], expected, rtol=1e-5)


def test_vectors_and_unprojected_matrices_are_sgd() -> None:
    params = {"kernel": W, "bias": jnp.array([1.0, 0.0])}
    ours = ok.sgdp(0.1, 0.9, nesterov=True)
    theirs = optax.sgd(0.1, 0.9, nesterov=True)
    grads = {"kernel": RADIAL, "bias": jnp.array([0.0, 1.0])}
    state, their_state = ours.init(params), theirs.init(params)
    for _ in range(3):
        updates, state = ours.update(grads, state, params)
        expected, their_state = theirs.update(grads, their_state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_on_a_scale_invariant_loss_the_norm_hardly_grows() -> None:
    """1 - cos(w, target), 2 rad apart: SGD's norm grows fourfold, SGDP's stays below 2."""
    target = jnp.array([jnp.cos(2.0), jnp.sin(2.0)])

    def loss(params):
        w = params["kernel"][:, 0]
        return 1 - jnp.dot(w, target) / jnp.linalg.norm(w)

    def run(tx):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        start = one_tree(W)
        (params, _), losses = jax.lax.scan(step, (start, tx.init(start)), None, length=400)
        return float(jnp.linalg.norm(params["kernel"])), int(jnp.argmax(losses < 1e-3))

    norm, reached = run(ok.sgdp(0.1, 0.9))
    sgd_norm, sgd_reached = run(optax.sgd(0.1, 0.9))
    assert norm < 2 < 4 < sgd_norm
    assert 0 < reached < sgd_reached
    # Without momentum the gradient is tangential already, and there is nothing to remove.
    np.testing.assert_allclose(run(ok.sgdp(0.1))[0], run(optax.sgd(0.1))[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1, got 1"),
        ({"nesterov": True, "project_buffer": True}, "project_buffer must be None or False"),
        ({"dampening": 1.5}, "dampening must be <= 1"),
        ({"eps": 0.0}, "eps must be > 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ok.sgdp(0.1, **arguments)
