"""Weight-normalised steps and LoRA of given lengths, on numbers to be checked by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit import nn
from tests.goldens import adapters
from tests.goldens.golden import all_goldens

PLAIN = {"eps": 1e-6, "eps_form": "before_bias_correction"}


def test_own_projectors_reproduce_the_recording_to_the_rounding_of_its_svd() -> None:
    golden = all_goldens()["gradnormlorp__weight_decay"]
    with jax.enable_x64(True):
        params, _ = adapters.replay(golden, ok.gradnormlorp(**golden.kwargs))
        assert adapters.parameter_error(golden, params) < 1e-5


class LengthTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_negative_length_lasts_one_step(self):
        tx = ok.weight_normalized(
            optax.identity(), optax.identity(), 1.0, weight_norm_gradient="tangent"
        )
        w = {"kernel": jnp.array([[3.0], [4.0]])}
        state = tx.init(w)
        # Along v: nothing turns, and the length goes from 5 to 5 - 10.
        updates, state = self.variant(tx.update)({"kernel": 2 * w["kernel"]}, state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w["kernel"], [[-3.0], [-4.0]], rtol=1e-6)
        np.testing.assert_allclose(state.direction_norm["kernel"], [[-5.0]], rtol=1e-6)
        updates, state = self.variant(tx.update)({"kernel": jnp.zeros((2, 1))}, state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w["kernel"], [[3.0], [4.0]], rtol=1e-6)
        np.testing.assert_allclose(state.direction_norm["kernel"], [[5.0]], rtol=1e-6)


def test_which_leaves_and_rows_get_the_plain_step() -> None:
    params = {
        "kernel": jnp.array([[0.0, 3.0], [0.0, 4.0]]),  # the first row is zero
        "conv": jnp.ones((2, 2, 2)),
        "bias": jnp.ones(3),
        "temperature": jnp.ones(()),
    }
    grads = jax.tree.map(lambda p: jnp.arange(1.0, p.size + 1).reshape(p.shape), params)
    tx = ok.weight_norm_adam(0.1, weight_decay=0.5)
    plain = optax.chain(
        ok.scale_by_adam(**PLAIN), optax.scale_by_learning_rate(0.1), ok.decay_after_step(0.5, 0.1)
    )
    updates, state = tx.update(grads, tx.init(params), params)
    expected, _ = plain.update(grads, plain.init(params), params)
    rest = ("conv", "bias", "temperature")
    for name in rest:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)
    np.testing.assert_allclose(updates["kernel"][:, 0], expected["kernel"][:, 0], rtol=1e-6)
    shapes = jax.tree.map(jnp.shape, state[0].direction_norm)
    assert shapes == {"kernel": (1, 2), **dict.fromkeys(rest, ())}
    # With a direction of its own, the row takes part from the second step on.
    params = optax.apply_updates(params, updates)
    updates, _ = tx.update(grads, state, params)
    new, old = params["kernel"] + updates["kernel"], params["kernel"]
    assert float(jnp.linalg.norm(new[:, 0])) > float(jnp.linalg.norm(old[:, 0])) > 0


def test_norms_are_f32_where_parameters_have_16_bits() -> None:
    tx = ok.weight_normalized(optax.identity(), optax.set_to_zero(), 1e-3)
    w = {"kernel": jnp.ones((4, 1), jnp.bfloat16)}
    g = {"kernel": -jnp.ones((4, 1), jnp.bfloat16)}
    state = tx.init(w)
    for _ in range(8):  # no step alone reaches the next bfloat16, which is 1 + 1 / 128
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(state.direction_norm["kernel"], [[2 * 1.008]], rtol=1e-5)
    assert w["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(w["kernel"].astype(jnp.float32), 1 + 1 / 128)


def test_axes_of_the_norms() -> None:
    params = {"embed": {"embedding": jnp.ones((5, 2))}, "query": jnp.ones((4, 3, 2))}
    params |= {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}

    def shapes(**kwargs):
        state = jax.eval_shape(ok.weight_norm_adam(0.1, **kwargs).init, params)
        return jax.tree.leaves(
            jax.tree.map(lambda x: x.shape, state[0].direction_norm),
            is_leaf=lambda x: isinstance(x, tuple),
        )

    # bias, embedding, kernel, query
    assert shapes() == [(), (5, 1), (1, 3), ()]
    assert shapes(normalize_vectors=True) == [(1,), (5, 1), (1, 3), ()]
    assert shapes(norm_axis=-1) == [(), (5, 1), (2, 1), ()]
    heads = shapes(norm_axis=lambda path, leaf: 0 if path == "query" else None)
    assert heads == [(), (), (), (1, 3, 2)]


def test_moments_in_few_bits() -> None:
    params = {"kernel": jnp.ones((64, 64))}
    eight = jax.eval_shape(ok.weight_norm_adam(0.1, state_bits=8).init, params)
    low = jax.eval_shape(ok.gradnormlorp(0.1, rank=64, state_bits=8).init, params)
    for codes in (
        eight[0].direction_state.inner_state.mu["kernel"],
        low[0].direction_state.inner_state.inner_state.mu["kernel"],
    ):
        assert codes.dtype == jnp.uint8


def test_messages() -> None:
    params = {"kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="weight_norm_gradient must be one of 'identity'"):
        ok.gradnormlorp(0.1, weight_norm_gradient="radial")
    with pytest.raises(ValueError, match="norm_eps must be >= 0, got -1"):
        ok.weight_norm_adam(0.1, norm_eps=-1.0)
    with pytest.raises(ValueError, match="state_bits must be None, 8 or 4, got 3"):
        ok.weight_norm_adam(0.1, state_bits=3)
    with pytest.raises(ValueError, match=r"norm_axis \(2,\) does not exist in leaf 'kernel'"):
        ok.weight_norm_adam(0.1, norm_axis=2).init(params)
    tx = ok.weight_normalized(optax.identity(), optax.identity(), 0.1)
    with pytest.raises(ValueError, match="weight_normalized needs the parameters"):
        tx.update(params, tx.init(params))
    other = {"kernel": jnp.ones((2, 4))}
    with pytest.raises(ValueError, match=r"state leaf 'kernel' has shape \(1, 3\)"):
        tx.update(other, tx.init(params), other)


# -- LoRA of given lengths ----------------------------------------------------------------------


@pytest.mark.parametrize("norm_axis", [0, 1])
def test_lora_starts_at_the_kernel_and_turns_it_with_orthogonal_gradients(norm_axis: int) -> None:
    w0 = jnp.array([[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]])
    a, b, magnitude = nn.init_weight_norm_lora(w0, 1, jax.random.key(0), norm_axis=norm_axis)
    np.testing.assert_allclose(magnitude, np.linalg.norm(w0, axis=norm_axis), rtol=1e-6)

    def lora(a, b, magnitude):
        return nn.weight_norm_lora(w0, a, b, magnitude, norm_axis=norm_axis)

    np.testing.assert_allclose(lora(a, b, magnitude), w0, rtol=1e-6)
    # Columns (rows) have the lengths that are asked for, whatever their directions.
    b, magnitude = b + 1, 2 * magnitude
    w = lora(a, b, magnitude)
    np.testing.assert_allclose(np.linalg.norm(w, axis=norm_axis), magnitude, rtol=1e-6)
    # Gradients by hand: v = w0 + a b with unit columns u, G the gradient of w.
    g = jnp.array([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])
    grad_a, grad_b, grad_m = jax.vjp(lora, a, b, magnitude)[1](g)
    v = np.asarray(w0 + a @ b)
    norms = np.linalg.norm(v, axis=norm_axis, keepdims=True)
    along = np.sum(g * v / norms, axis=norm_axis, keepdims=True)
    tangent = np.expand_dims(magnitude, norm_axis) / norms * (g - along * v / norms)
    np.testing.assert_allclose(np.sum(tangent * v, axis=norm_axis), 0, atol=1e-5)
    np.testing.assert_allclose(grad_m, np.squeeze(along, norm_axis), rtol=1e-5)
    np.testing.assert_allclose(grad_a, tangent @ b.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad_b, a.T @ tangent, rtol=1e-5, atol=1e-6)


def test_lora_of_a_zero_column_and_a_16_bit_kernel() -> None:
    w0 = jnp.array([[3.0, 0.0], [4.0, 0.0]], jnp.bfloat16)
    a, b, magnitude = nn.init_weight_norm_lora(w0, 1, jax.random.key(0))
    assert a.dtype == b.dtype == magnitude.dtype == jnp.float32
    w, back = jax.vjp(lambda *trained: nn.weight_norm_lora(w0, *trained), a, b, magnitude)
    assert w.dtype == jnp.bfloat16
    np.testing.assert_array_equal(w, w0)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in back(jnp.ones_like(w)))


def test_lora_messages() -> None:
    w0 = jnp.ones((2, 3))
    a, b, magnitude = nn.init_weight_norm_lora(w0, 1, jax.random.key(0))
    with pytest.raises(ValueError, match=r"w0 must be a kernel \(inputs, outputs\), got .*\(4,\)"):
        nn.weight_norm_lora(jnp.ones(4), a, b, magnitude)
    with pytest.raises(ValueError, match=r"b has shape \(2, 3\), .* must have \(1, 3\)"):
        nn.weight_norm_lora(w0, a, jnp.ones((2, 3)), magnitude)
    with pytest.raises(ValueError, match=r"magnitude has shape \(3,\), .* must have \(2,\)"):
        nn.weight_norm_lora(w0, a, b, magnitude, norm_axis=1)
    with pytest.raises(ValueError, match="norm_axis must be an axis of a kernel, 0 or 1, got 2"):
        nn.init_weight_norm_lora(w0, 1, jax.random.key(0), norm_axis=2)
    with pytest.raises(ValueError, match="rank must be an integer >= 1, got 0"):
        nn.init_weight_norm_lora(w0, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        nn.weight_norm_lora(w0, a, b, magnitude, eps=0.0)
