"""4-bit emulation: grids on numbers checkable by hand, straight-through gradients, layers."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import linen, nnx

from optimkit import nn

QUANTIZERS = {
    "fp4": nn.fake_quant_fp4,
    "int4_weight": nn.fake_quant_int4_weight,
    "int4_activation": nn.fake_quant_int4_activation,
}
quantizers = pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS.keys())


class Grids(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(
        # scale 8 (the third largest), steps of 2, half to even: 1 -> 0, 3 -> 4, 5 -> 4
        (
            [20.0, -10.0, 8.0, 1.0, 3.0, 5.0, -6.9, 0.0],
            [20.0, -10.0, 8.0, 0.0, 4.0, 4.0, -6.0, 0.0],
        ),
        # ties among the largest: two are kept, the third is the scale and stays too
        ([4.0, -4.0, 4.0, 1.4, 0.4, 0.0, 0.0, 0.0], [4.0, -4.0, 4.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        # below the floor of 1e-6: steps of 2.5e-7
        ([0.0, 3e-7, 3e-7, 3e-7, 1e-7, 0, 0, 0], [0.0, 3e-7, 3e-7, 2.5e-7, 0, 0, 0, 0]),
        ([0.0] * 8, [0.0] * 8),
    )
    def test_fp4(self, x: Any, wanted: Any) -> None:
        got = self.variant(lambda x: nn.fake_quant_fp4(x, group_size=8))(jnp.array(x))
        np.testing.assert_allclose(got, wanted, rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(
        ([-3.0, 0.2, 4.6, 12.0], [-3.0, 0.0, 5.0, 12.0]),  # scale 1, zero point 3
        ([30.0, 34.0, 44.0, 45.0], [15.0, 15.0, 15.0, 15.0]),  # one sign: saturates at max - min
        ([-15.0, -7.4, -1.0, 0.0], [-15.0, -7.0, -1.0, 0.0]),
        ([0.0] * 4, [0.0] * 4),
    )
    def test_int4_weight(self, w: Any, wanted: Any) -> None:
        got = self.variant(lambda w: nn.fake_quant_int4_weight(w, group_size=4))(jnp.array(w))
        np.testing.assert_array_equal(got, wanted)

    @chex.all_variants(with_pmap=False)
    def test_int4_activation(self) -> None:
        x = jnp.array([100.0, -50.0, 14.0, 2.9, 3.0, -13.1, 0.9, 5.0])  # scale 14, steps of 2
        got = self.variant(lambda x: nn.fake_quant_int4_activation(x, group_size=8))(x)
        np.testing.assert_array_equal(got, [100.0, -50.0, 14.0, 2.0, 4.0, -14.0, 0.0, 4.0])


def test_groups_do_not_see_each_other() -> None:
    x = jnp.array([[1.0, 0.3], [100.0, 30.0]])
    wanted = [[1.0, 0.25], [100.0, 25.0]]
    assert nn.fake_quant_fp4(x, group_size=2, keep_top=0).tolist() == wanted
    straddling = nn.fake_quant_fp4(x.reshape(4, 1), group_size=2, keep_top=0)
    assert straddling.reshape(2, 2).tolist() == wanted


def test_keep_top_zero_still_rounds() -> None:
    x = jnp.array([4.0, 1.2])
    assert nn.fake_quant_fp4(x, group_size=2, keep_top=0).tolist() == [4.0, 1.0]
    assert nn.fake_quant_fp4(x, group_size=2, keep_top=5).tolist() == x.tolist()


def test_codes_rebuild_the_weights() -> None:
    w = jax.random.normal(jax.random.key(0), (6, 8))
    codes, scale, zero = nn.int4_weight_codes(w, group_size=16)
    assert codes.dtype == jnp.uint8
    assert codes.shape == w.shape
    assert scale.shape == zero.shape == (3,)
    assert int(codes.max()) == 15
    rebuilt = (codes.reshape(3, 16) - zero[:, None]) * scale[:, None]
    np.testing.assert_array_equal(
        rebuilt.reshape(w.shape), nn.fake_quant_int4_weight(w, group_size=16)
    )


def test_error_of_a_gaussian_matrix() -> None:
    x = jax.random.normal(jax.random.key(1), (64, 256))
    error = nn.fake_quant_fp4(x) - x
    relative = float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(x**2)))
    assert 0.17 < relative < 0.2  # scale / (4 sqrt(12)) with a scale of 2.5 to 2.8 sigma
    finer = nn.fake_quant_int4_activation(x, bits=8) - x
    assert float(jnp.sqrt(jnp.mean(finer**2))) < 0.01


def test_stochastic_rounding_is_unbiased() -> None:
    x = jnp.tile(jnp.array([7.0, 0.3, 2.8, -4.4]), (500, 1))
    keys = jax.random.split(jax.random.key(0))
    rounded = [nn.fake_quant_int4_activation(x, group_size=4, keep_top=1, key=key) for key in keys]
    assert not jnp.array_equal(rounded[0], rounded[1])
    # After the kept 7 the scale is 4.4; the standard error of a mean of 1000 is below 0.01.
    means = jnp.mean(jnp.concatenate(rounded), axis=0)
    np.testing.assert_allclose(means, [7.0, 0.3, 2.8, -4.4], atol=0.04)
    same = nn.fake_quant_int4_activation(x, group_size=4, keep_top=1, key=keys[0])
    assert jnp.array_equal(same, rounded[0])


@quantizers
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_finite_input_gives_finite_output_in_its_dtype(quantize: Any, dtype: Any) -> None:
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    large = 6e4 if dtype == jnp.float16 else 1e30
    for value in (0.0, tiny, 1e-7, 1.0, large):
        x = jnp.full((2, 8), value, dtype).at[0, ::3].mul(-0.4)
        out = jax.jit(quantize, static_argnames="group_size")(x, group_size=8)
        assert out.dtype == dtype
        assert bool(jnp.all(jnp.isfinite(out))), value


@quantizers
def test_nan_spreads_over_its_group_only(quantize: Any) -> None:
    x = jnp.arange(16.0).reshape(2, 8).at[0, 3].set(jnp.nan)
    out = quantize(x, group_size=8)
    assert bool(jnp.all(jnp.isnan(out[0])))
    assert not bool(jnp.any(jnp.isnan(out[1])))


@quantizers
def test_bfloat16_is_the_same_with_and_without_jit(quantize: Any) -> None:
    x = jax.random.normal(jax.random.key(2), (8, 256), jnp.bfloat16)
    with jax.disable_jit():
        eager = quantize(x)
    chex.assert_trees_all_equal(jax.jit(quantize)(x), eager)


@quantizers
def test_derivative_is_the_identity(quantize: Any) -> None:
    x, v = jax.random.normal(jax.random.key(3), (2, 4, 8))
    _, tangent = jax.jvp(lambda x: quantize(x, group_size=8), (x,), (v,))
    _, pull = jax.vjp(lambda x: quantize(x, group_size=8), x)
    np.testing.assert_array_equal(tangent, v)
    np.testing.assert_array_equal(pull(v)[0], v)


@quantizers
def test_vmap_flattens_every_example_alone(quantize: Any) -> None:
    x = jax.random.normal(jax.random.key(4), (3, 2, 8))
    mapped = jax.vmap(lambda x: quantize(x, group_size=16))(x)
    np.testing.assert_array_equal(mapped, quantize(x, group_size=16))
    with pytest.raises(ValueError, match="has 16 entries"):
        jax.vmap(lambda x: quantize(x, group_size=48))(x)


@quantizers
def test_empty_input(quantize: Any) -> None:
    assert quantize(jnp.zeros((0, 4))).shape == (0, 4)


@quantizers
def test_bad_input(quantize: Any) -> None:
    with pytest.raises(ValueError, match=r"has 6 entries \(shape \(2, 3\)\).*group_size=4"):
        quantize(jnp.ones((2, 3)), group_size=4)
    with pytest.raises(ValueError, match="group_size must be an integer >= 1"):
        quantize(jnp.ones(4), group_size=0)
    with pytest.raises(TypeError, match="real floating-point array, got dtype int32"):
        quantize(jnp.ones(4, jnp.int32), group_size=4)
    if quantize is not nn.fake_quant_fp4:
        with pytest.raises(ValueError, match="bits must be at most 8, got 9"):
            quantize(jnp.ones(4), group_size=4, bits=9)
        with pytest.raises(ValueError, match="bits must be an integer >= 2, got 1"):
            quantize(jnp.ones(4), group_size=4, bits=1)


# -- the layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp4", "int4", None])
def test_layer_is_the_dense_layer_of_rounded_arrays(kind: Any) -> None:
    x, dy = jax.random.normal(jax.random.key(5), (2, 4, 8))
    kernel = jax.random.normal(jax.random.key(6), (8, 8))
    bias = jnp.arange(8.0)
    rounded, weights = x, kernel
    if kind == "fp4":
        rounded = nn.fake_quant_fp4(x, group_size=16)
        weights = nn.fake_quant_fp4(kernel.T, group_size=16).T
    elif kind == "int4":
        rounded = nn.fake_quant_int4_activation(x, group_size=16)
        weights = nn.fake_quant_int4_weight(kernel.T, group_size=16).T
    y, pull = jax.vjp(lambda *a: nn.quantized_dense(*a, kind=kind, group_size=16), x, kernel, bias)
    chex.assert_trees_all_close(y, rounded @ weights + bias[None], rtol=1e-6)
    wanted = (dy @ weights.T, rounded.T @ dy, dy.sum(0))
    chex.assert_trees_all_close(pull(dy), wanted, rtol=1e-6, atol=1e-6)


def test_layer_names_the_argument_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^x has 24 entries"):
        nn.quantized_dense(jnp.ones((3, 8)), jnp.ones((8, 4)), group_size=16)
    with pytest.raises(ValueError, match=r"^kernel has 24 entries"):
        nn.quantized_dense(jnp.ones((2, 8)), jnp.ones((8, 3)), group_size=16)
    with pytest.raises(ValueError, match="kind must be one of 'fp4', 'int4', got 'fp8'"):
        nn.quantized_dense(jnp.ones((2, 8)), jnp.ones((8, 2)), kind="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel must be"):
        nn.quantized_dense(jnp.ones((2, 8)), jnp.ones((4, 2)), group_size=2)
    with pytest.raises(ValueError, match=r"bias must have shape \(2,\)"):
        nn.quantized_dense(jnp.ones((2, 8)), jnp.ones((8, 2)), jnp.ones(3), group_size=2)


@pytest.mark.parametrize("kind", ["fp4", "int4", None])
def test_flax_modules_agree_and_train_the_full_precision_kernel(kind: Any) -> None:
    x = jax.random.normal(jax.random.key(7), (4, 16))
    settings = {"kind": kind, "use_bias": True, "group_size": 32}
    linear = nn.QuantLinear(16, 4, **settings, rngs=nnx.Rngs(0))
    dense = nn.QuantDense(4, **settings)
    params = {"kernel": linear.kernel[...], "bias": linear.bias[...]}
    wanted = nn.quantized_dense(x, *params.values(), kind=kind, group_size=32)
    np.testing.assert_array_equal(linear(x), wanted)
    np.testing.assert_array_equal(dense.apply({"params": params}, x), wanted)
    chex.assert_trees_all_equal_shapes(dense.init(jax.random.key(0), x)["params"], params)
    grads = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(linear)
    assert grads["kernel"][...].shape == (16, 4)
    assert bool(jnp.all(grads["kernel"][...] != 0))


def test_flax_modules_stand_in_for_flax_layers() -> None:
    assert isinstance(nn.QuantLinear(8, 4, rngs=nnx.Rngs(0)), nnx.Linear)
    kernel = nn.QuantLinear(8, 4, rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_array_equal(kernel, nnx.Linear(8, 4, rngs=nnx.Rngs(0)).kernel[...])
    variables = nn.QuantDense(4, group_size=8).init(jax.random.key(0), jnp.ones((1, 8)))
    other = linen.Dense(4, use_bias=False).init(jax.random.key(0), jnp.ones((1, 8)))
    chex.assert_trees_all_equal(variables, other)


# -- Flax is optional -------------------------------------------------------------------------


def test_flax_is_not_imported_until_a_module_is_asked_for() -> None:
    program = "import sys, optimkit.nn; assert 'flax' not in sys.modules; optimkit.nn.QuantDense"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_flax_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_flax(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "flax":
            raise ModuleNotFoundError("No module named 'flax'", name="flax")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "optimkit.nn.quant_layers", raising=False)
    monkeypatch.delattr(importlib.import_module("optimkit.nn"), "quant_layers", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_flax)
    with pytest.raises(ImportError, match=r'pip install "optimkit\[flax\]"'):
        _ = nn.QuantLinear
    assert nn.fake_quant_fp4(jnp.zeros(2), group_size=2).tolist() == [0.0, 0.0]
    with pytest.raises(AttributeError, match="no attribute 'QuantConv'"):
        _ = nn.QuantConv  # type: ignore[attr-defined]
