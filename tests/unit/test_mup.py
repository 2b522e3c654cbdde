"""muP's multipliers and the decay beside them; z-loss and learning-rate sensitivity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit import MatrixAxes, nn
from optimkit.diagnostics import lr_sensitivity
from optimkit.transforms.mup import base_shapes, mup_multipliers, mup_weight_decay_multipliers

SHAPES = {"embed": {"embedding": (10, 32)}, "mlp": {"kernel": (32, 64), "bias": (64,)},
          "head": {"kernel": (64, 10)}}  # fmt: skip
BASE = {"embed": {"embedding": (10, 8)}, "mlp": {"kernel": (8, 8), "bias": (8,)},
        "head": {"kernel": (8, 10)}}  # fmt: skip


def test_multipliers_by_hand():
    adam = mup_multipliers(SHAPES, BASE)
    assert adam == {"embed": {"embedding": 1.0}, "mlp": {"kernel": 0.25, "bias": 1.0},
                    "head": {"kernel": 1.0}}  # fmt: skip
    sgd = mup_multipliers(SHAPES, BASE, optimizer="sgd")
    assert sgd == {"embed": {"embedding": 4.0}, "mlp": {"kernel": 2.0, "bias": 8.0},
                   "head": {"kernel": 8.0}}  # fmt: skip
    for optimizer in ("adam", "sgd"):
        no_multiplier = mup_multipliers(SHAPES, BASE, optimizer=optimizer, readout="lr")
        assert no_multiplier["head"]["kernel"] == 1 / 8
        assert set(jax.tree.leaves(mup_multipliers(BASE, BASE, optimizer=optimizer))) == {1.0}


def test_decay_times_rate_is_the_same_everywhere():
    rates = mup_multipliers(SHAPES, BASE, optimizer="sgd")
    decays = mup_weight_decay_multipliers(SHAPES, BASE, optimizer="sgd")
    assert set(jax.tree.leaves(jax.tree.map(lambda r, d: r * d, rates, decays))) == {1.0}
    kept = mup_weight_decay_multipliers(SHAPES, BASE, decoupled=True)
    assert set(jax.tree.leaves(kept)) == {1.0}


def test_attention_and_stacked_layers():
    shapes = {"query": {"kernel": (32, 4, 16)}, "out": {"kernel": (4, 16, 32)},
              "layers": {"kernel": (3, 32, 64)}}  # fmt: skip
    base = {"query": {"kernel": (8, 2, 8)}, "out": {"kernel": (2, 8, 8)},
            "layers": {"kernel": (3, 8, 8)}}  # fmt: skip
    sgd = mup_multipliers(shapes, base, optimizer="sgd")
    assert jax.tree.leaves(sgd) == [2.0, 1.0, 1.0]  # layers 8/4, out 4/4, query 4/4
    assert jax.tree.leaves(mup_multipliers(shapes, base)) == [0.25, 0.25, 0.25]


def test_a_model_scaled_up_in_a_chain():
    def init(width):
        return {"kernel": jnp.ones((width, width)), "bias": jnp.ones(width)}

    tx = optax.chain(
        ok.scale_by_mup(base_shapes(init, width=2)), optax.add_decayed_weights(0.5), optax.scale(-1)
    )
    params = init(8)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -(1 / 4 + 0.5))
    np.testing.assert_allclose(updates["bias"], -(1 + 0.5))


def test_what_cannot_be_read_is_named():
    leaf = {"x": jnp.zeros((8, 8, 8))}
    with pytest.raises(ValueError, match=r"leaf 'x' .* grew from .* along axis 0"):
        ok.scale_by_mup({"x": (4, 4, 4)}).init(leaf)
    axes = {"x": MatrixAxes((), (0,), (1, 2))}
    assert mup_multipliers(leaf, {"x": (4, 4, 4)}, fan_axes=axes) == {"x": 0.5}
    with pytest.raises(ValueError, match="base_shapes has no leaf 'x'; it has"):
        ok.scale_by_mup({"y": (4, 4, 4)}).init(leaf)
    with pytest.raises(ValueError, match=r"'x' has shape \(8, 8, 8\), but \(4, 4\) in base_shapes"):
        ok.scale_by_mup({"x": (4, 4)}).init(leaf)
    with pytest.raises(ValueError, match="the vocabulary must be the same"):
        mup_multipliers({"embedding": (8, 8)}, {"embedding": (4, 4)})
    with pytest.raises(ValueError, match="optimizer must be one of 'adam', 'sgd'"):
        ok.scale_by_mup({}, optimizer="adamw")
    with pytest.raises(ValueError, match="readout must be one of 'multiplier', 'lr'"):
        ok.scale_by_mup({}, readout="rate")


def test_simple_scales_linear_layers_only():
    tree = {"mlp": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)},
            "embed": {"embedding": jnp.ones((8, 2))}}  # fmt: skip
    updates, _ = ok.mup_simple(4).update(tree, optax.EmptyState())
    assert [float(u.ravel()[0]) for u in jax.tree.leaves(updates)] == [1.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="base_fan_in must be > 0, got 0"):
        ok.mup_simple(0)


def test_independent_decay_follows_the_schedule_not_the_rate():
    tx = ok.independent_weight_decay(
        0.5, lambda count: 1 / (count + 1), mask={"w": True, "b": False}
    )
    params = {"w": jnp.full(2, 4.0), "b": jnp.full(2, 4.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    first, state = tx.update(zero, tx.init(params), params)
    second, _ = tx.update(zero, state, params)
    np.testing.assert_array_equal(first["w"], -2.0)
    np.testing.assert_array_equal(second["w"], -1.0)
    np.testing.assert_array_equal(first["b"], 0.0)
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        ok.independent_weight_decay(-1.0)


def test_z_loss_counts_tokens_and_survives_large_logits():
    logits = jnp.array([[0.0, 0.0], [1e4, 0.0]])
    half = nn.z_loss(logits, 1.0, where=jnp.array([True, False]))
    np.testing.assert_allclose(half, np.log(2) ** 2, rtol=1e-6)
    assert nn.z_loss(logits, 1.0, where=jnp.zeros(2, bool)) == 0
    np.testing.assert_allclose(nn.z_loss(logits.astype(jnp.bfloat16)), 5e3, rtol=1e-2)
    assert jnp.isfinite(nn.z_loss(jnp.full((2, 3), 1e30)))
    gradient = jax.grad(nn.z_loss)(jnp.full((2, 3), -3e38))
    assert jnp.isfinite(gradient).all()
    with pytest.raises(ValueError, match=r"where has shape \(3,\), but logits \(2, 2\)"):
        nn.z_loss(logits, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="coefficient must be >= 0, got -1"):
        nn.z_loss(logits, -1.0)


def test_sensitivity_of_a_sweep():
    losses = jnp.array([[3.0, 2.0, jnp.nan], [jnp.inf, 9.0, 9.0]])
    np.testing.assert_allclose(lr_sensitivity(losses, 8.0), [(1 + 0 + 6) / 3, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"learning_rates has shape \(2,\)"):
        lr_sensitivity(losses, 8.0, jnp.ones(2))
    with pytest.raises(ValueError, match="losses must have one entry a learning rate"):
        lr_sensitivity(jnp.float32(1.0), 8.0)
