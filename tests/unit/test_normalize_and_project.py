"""Normalize-and-Project on numbers checked by hand, and what measures its effect."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit import diagnostics
from optimkit.transforms.project_scale_offset import default_pairs

NORM = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}


class ProjectScaleOffsetTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_both_modes(self):
        move = {"scale": jnp.array([2.0, -1.0]), "bias": jnp.array([0.0, 4.0])}
        for tx, scale, bias in (
            # (3, 0, 0, 4) has norm 5, which becomes sqrt(2)
            (ok.project_scale_offset(), [3 * 2**0.5 / 5, 0.0], [0.0, 4 * 2**0.5 / 5]),
            (ok.project_scale_offset(mode="decay", decay=0.25), [2.5, 0.25], [0.0, 3.0]),
        ):
            updates, _ = self.variant(tx.update)(move, tx.init(NORM), NORM)
            new = optax.apply_updates(NORM, updates)
            np.testing.assert_allclose(new["scale"], scale, atol=1e-6)
            np.testing.assert_allclose(new["bias"], bias, atol=1e-6)


def test_every_second_step_and_layers_of_a_stack() -> None:
    tx = ok.project_scale_offset(every=2)
    params = {"scale": jnp.array([[2.0, 0.0], [0.0, 0.0]])}
    zero = {"scale": jnp.zeros((2, 2))}
    first, state = tx.update(zero, tx.init(params), params)
    np.testing.assert_array_equal(first["scale"], np.zeros((2, 2)))
    second, _ = tx.update(zero, state, params)
    # The first layer goes to norm sqrt(2); the second is zero, and stays.
    expected = [[2**0.5, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(params["scale"] + second["scale"], expected, atol=1e-6)


def test_which_layers() -> None:
    params = {"norm": NORM, "rms": {"scale": jnp.ones(3)}, "dense": {"bias": jnp.ones(2)}}
    assert default_pairs(params) == [("norm/scale", "norm/bias"), ("rms/scale", None)]
    tx = ok.project_scale_offset(pairs=[("rms/scale", None)])
    updates = {"norm": NORM, "rms": {"scale": jnp.ones(3)}, "dense": {"bias": jnp.ones(2)}}
    new, _ = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal(new["norm"], NORM)
    np.testing.assert_allclose(new["rms"]["scale"], np.zeros(3), atol=1e-6)


def test_the_norms_of_chosen_kernels_stay() -> None:
    params = {"hidden": {"kernel": 3 * jnp.eye(2)}, "head": {"kernel": 3 * jnp.eye(2)}, **NORM}
    grads = {"hidden": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}, **NORM}
    tx = ok.normalize_and_project(optax.sgd(1.0), scale_offset="joint")
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(jnp.linalg.norm(params["hidden"]["kernel"]), 18**0.5, rtol=1e-6)
    np.testing.assert_allclose(params["head"]["kernel"], [[1.0, -2.0], [-2.0, 1.0]], rtol=1e-6)
    # The scale went to zero in the first step and to -1 in the second, with norm sqrt(2) already.
    np.testing.assert_allclose(params["scale"], [-1.0, -1.0], rtol=1e-6)


def test_messages() -> None:
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        ok.normalize_and_project(optax.sgd(1.0), every=0)
    with pytest.raises(ValueError, match="scale_offset must be one of 'joint', 'decay'"):
        ok.normalize_and_project(optax.sgd(1.0), scale_offset="both")
    with pytest.raises(ValueError, match="decay must be >= 0 and <= 1, got 2"):
        ok.project_scale_offset(mode="decay", decay=2.0)
    with pytest.raises(ValueError, match="pairs: 'norm/scale' is none of the leaves"):
        ok.project_scale_offset(pairs=[("norm/scale", None)]).init(NORM)
    with pytest.raises(ValueError, match=r"mask: 'dense.*' matches none"):
        ok.normalize_and_project(optax.sgd(1.0), mask=["dense/*"]).init(NORM)
    tx = ok.project_scale_offset()
    with pytest.raises(ValueError, match="project_scale_offset needs the parameters"):
        tx.update(NORM, tx.init(NORM))


# -- diagnostics ------------------------------------------------------------------------------


def test_effective_learning_rates() -> None:
    params = {"w": jnp.array([3.0, 4.0]), "zero": jnp.zeros(2)}
    adam = diagnostics.effective_learning_rate(params, 0.5)
    sgd = diagnostics.effective_learning_rate(params, 0.5, rule="sgd")
    np.testing.assert_allclose([adam["w"], sgd["w"], adam["zero"]], [0.1, 0.02, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="rule must be one of 'adam', 'sgd'"):
        diagnostics.effective_learning_rate(params, 0.5, rule="lion")


def test_angles_small_and_large() -> None:
    old = jnp.array([2.0, 0.0])
    for angle in (1e-5, 0.5, 3.0):
        new = 7 * jnp.array([np.cos(angle), np.sin(angle)], jnp.float32)
        np.testing.assert_allclose(diagnostics.angular_update(old, new), angle, rtol=1e-5)
    assert float(diagnostics.angular_update(old, jnp.zeros(2))) == 0.0
    with pytest.raises(ValueError, match=r"\(3,\)"):
        diagnostics.angular_update(old, jnp.ones(3))
