"""Dense layers for 4-bit training: ``QuantLinear`` for Flax NNX, ``QuantDense`` for Flax Linen.

Each has the name, arguments and parameters of the Flax layer it stands in for (``nnx.Linear``,
``linen.Dense``), so that weights move between the two unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.linen.dtypes import promote_dtype

from optimkit.nn.quantized_dense import Kind, quantized_dense
from optimkit.protocols import Array


class QuantLinear(nnx.Linear):
    """``nnx.Linear`` on inputs and weights rounded to 4 bits (see ``quantized_dense``).

    Args:
      in_features: length of the last axis of the inputs.
      out_features: length of the last axis of the outputs.
      kind: ``"fp4"``, ``"int4"`` or None (no rounding: an ``nnx.Linear``).
      use_bias: whether to add a bias; it is not rounded.
      group_size: numbers that share a scale. It must divide ``in_features * out_features``, and the
        number of entries of every input.
      keep_top: entries that a group keeps exactly.
      dtype: dtype to compute in; default: that of inputs and parameters, promoted.
      param_dtype: dtype of the parameters, which are never rounded themselves.
      kernel_init: initializer of the kernel (in, out).
      bias_init: initializer of the bias (out,).
      rngs: where the initializers draw from.
      kernel_metadata: passed to the ``nnx.Param`` of the kernel, for sharding.
      bias_metadata: passed to the ``nnx.Param`` of the bias.

    Raises:
      ValueError: when called, if ``group_size`` does not divide a size.

    >>> layer = QuantLinear(64, 8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((4, 64))).shape, layer.kernel.shape
    ((4, 8), (64, 8))

    In the published runs the projections of attention and of the feed-forward part are such layers;
    the embedding, the head and the norms are not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kind: Kind = "fp4",
        use_bias: bool = False,
        group_size: int = 256,
        keep_top: int = 2,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008 - a pure function
        bias_init: Any = nnx.initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.kind: Kind = kind
        self.group_size, self.keep_top = group_size, keep_top

    def __call__(self, inputs: Array, out_sharding: Any = None) -> jax.Array:
        """Maps (..., in_features) to (..., out_features), sharded as asked on an explicit mesh."""
        bias = None if self.bias is None else self.bias[...]
        arrays = (inputs, self.kernel[...], bias)
        inputs, kernel, bias = self.promote_dtype(arrays, dtype=self.dtype)
        return quantized_dense(
            inputs,
            kernel,
            bias,
            kind=self.kind,
            group_size=self.group_size,
            keep_top=self.keep_top,
            out_sharding=out_sharding,
        )


class QuantDense(linen.Module):
    """``linen.Dense`` on inputs and weights rounded to 4 bits (see ``quantized_dense``).

    Attributes:
      features: length of the last axis of the outputs.
      kind: ``"fp4"``, ``"int4"`` or None (no rounding: a ``linen.Dense``).
      use_bias: whether to add a bias; it is not rounded.
      group_size: numbers that share a scale. It must divide the size of the kernel and of every
        input.
      keep_top: entries that a group keeps exactly.
      dtype: dtype to compute in; default: that of inputs and parameters, promoted.
      param_dtype: dtype of the parameters, which are never rounded themselves.
      kernel_init: initializer of ``kernel`` (in, out).
      bias_init: initializer of ``bias`` (out,).

    >>> layer = QuantDense(8, kind="int4")
    >>> params = layer.init(jax.random.key(0), jnp.ones((4, 64)))
    >>> layer.apply(params, jnp.ones((4, 64))).shape
    (4, 8)
    """

    features: int
    kind: Kind = "fp4"
    use_bias: bool = False
    group_size: int = 256
    keep_top: int = 2
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = linen.initializers.lecun_normal()
    bias_init: Any = linen.initializers.zeros_init()

    @linen.compact
    def __call__(self, inputs: Array) -> jax.Array:
        """Maps (..., in) to (..., features)."""
        shape = (jnp.shape(inputs)[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return quantized_dense(
            inputs,
            kernel,
            bias,
            kind=self.kind,
            group_size=self.group_size,
            keep_top=self.keep_top,
        )
