"""Dense and Conv layers of Flax that hand out the statistics which MKOR needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx

from optimkit.nn.mkor import tap_inputs, tap_outputs, tap_patches
from optimkit.protocols import Array

TAPS = "taps"
"""The collection of Linen that holds the taps."""


class TappedDense(linen.Dense):
    """``linen.Dense`` with two taps, whose gradients are MKOR's statistics.

    Attributes:
      clip: entries of each row of the statistics are limited to this magnitude. All else as for
        ``linen.Dense``; parameters and outputs are the same.

    The collection ``"taps"`` holds zeros. Differentiate by them beside the parameters, and give
    their gradient to ``collect_layer_stats``.

    >>> import jax
    >>> from optimkit.nn import collect_layer_stats
    >>> x, layer = jnp.array([[1.0, 2.0], [3.0, 4.0]]), TappedDense(1)
    >>> variables = layer.init(jax.random.key(0), x)
    >>> grads = jax.grad(lambda v: jnp.mean(layer.apply(v, x)))(variables)
    >>> {k: v.tolist() for k, v in collect_layer_stats(grads["taps"])["(root)"].items()}
    {'a': [2.0, 3.0], 'g': [1.0]}
    """

    clip: float = 100.0

    @linen.compact
    def __call__(self, inputs: Array) -> Array:
        """Applies the layer to ``(..., inputs)``."""
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        tap_a = self.variable(TAPS, "tap_a", jnp.zeros, inputs.shape[-1:], dtype)
        tap_g = self.variable(TAPS, "tap_g", jnp.zeros, (self.features,), dtype)
        y = super().__call__(tap_inputs(inputs, tap_a.value, self.clip))
        return tap_outputs(y, tap_g.value, clip=self.clip)


class TappedConv(linen.Conv):
    """``linen.Conv`` with two taps, whose gradients are MKOR's statistics.

    Attributes:
      clip: entries of each row of the statistics are limited to this magnitude. All else as for
        ``linen.Conv``. Groups, dilated inputs, and padding other than ``"SAME"``, ``"VALID"`` and
        numbers raise.

    >>> import jax
    >>> layer = TappedConv(8, (3, 3))
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    >>> {name: tap.shape for name, tap in variables["taps"].items()}
    {'tap_a': (18,), 'tap_g': (8,)}
    """

    clip: float = 100.0

    @linen.compact
    def __call__(self, inputs: Array) -> Array:
        """Applies the layer to ``(batch, *sizes, inputs)``."""
        size = _window(self.kernel_size)
        _check_conv(self.feature_group_count, self.input_dilation)
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        entries = math.prod(size) * inputs.shape[-1]
        tap_a = self.variable(TAPS, "tap_a", jnp.zeros, (entries,), dtype)
        tap_g = self.variable(TAPS, "tap_g", jnp.zeros, (self.features,), dtype)
        tapped = tap_patches(
            inputs,
            tap_a.value,
            size,
            strides=self.strides,
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.kernel_dilation,
            clip=self.clip,
        )
        y = super().__call__(tapped)
        return tap_outputs(y, tap_g.value, _places(y, size), self.clip)


class Tap(nnx.Variable):
    """Zeros whose gradient is a statistic of the layer."""


class TappedLinear(nnx.Linear):
    """``nnx.Linear`` with two taps, whose gradients are MKOR's statistics.

    Args:
      in_features: length of the last axis of the inputs.
      out_features: length of the last axis of the outputs.
      clip: entries of each row of the statistics are limited to this magnitude.
      **others: the other arguments of ``nnx.Linear``.

    ``graphdef, params, taps = nnx.split(model, nnx.Param, optimkit.nn.Tap)`` parts parameters and
    taps; differentiate by both.

    >>> import jax
    >>> from optimkit.nn import Tap, collect_layer_stats
    >>> layer = TappedLinear(2, 1, rngs=nnx.Rngs(0))
    >>> graphdef, params, taps = nnx.split(layer, nnx.Param, Tap)
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> grads = jax.grad(lambda taps: jnp.mean(nnx.merge(graphdef, params, taps)(x)))(taps)
    >>> {k: v.tolist() for k, v in collect_layer_stats(grads)["(root)"].items()}
    {'a': [2.0, 3.0], 'g': [1.0]}
    """

    def __init__(self, in_features: int, out_features: int, *, clip: float = 100.0, **others: Any):
        super().__init__(in_features, out_features, **others)
        self.clip = clip
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        self.tap_a = Tap(jnp.zeros((in_features,), dtype))
        self.tap_g = Tap(jnp.zeros((out_features,), dtype))

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Applies the layer to ``(..., in_features)``."""
        tapped = tap_inputs(inputs, self.tap_a[...], self.clip)
        place = {} if out_sharding is None else {"out_sharding": out_sharding}
        y = super().__call__(tapped, **place)
        return tap_outputs(y, self.tap_g[...], clip=self.clip)


class TappedConvolution(nnx.Conv):
    """``nnx.Conv`` with two taps, whose gradients are MKOR's statistics.

    Args:
      in_features: length of the last axis of the inputs.
      out_features: length of the last axis of the outputs.
      kernel_size: the window.
      clip: entries of each row of the statistics are limited to this magnitude.
      **others: the other arguments of ``nnx.Conv``, with the limits of ``TappedConv``.

    >>> layer = TappedConvolution(2, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 4, 4, 2))).shape
    (1, 4, 4, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        clip: float = 100.0,
        **others: Any,
    ):
        super().__init__(in_features, out_features, kernel_size, **others)
        _check_conv(self.feature_group_count, self.input_dilation)
        self.clip = clip
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        entries = math.prod(_window(self.kernel_size)) * in_features
        self.tap_a = Tap(jnp.zeros((entries,), dtype))
        self.tap_g = Tap(jnp.zeros((out_features,), dtype))

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Applies the layer to ``(batch, *sizes, in_features)``."""
        size = _window(self.kernel_size)
        tapped = tap_patches(
            inputs,
            self.tap_a[...],
            size,
            strides=self.strides,
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.kernel_dilation,
            clip=self.clip,
        )
        place = {} if out_sharding is None else {"out_sharding": out_sharding}
        y = super().__call__(tapped, **place)
        return tap_outputs(y, self.tap_g[...], _places(y, size), self.clip)


def _window(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    return (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)


def _places(y: Array, window: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(y.ndim - 1 - len(window), y.ndim - 1))


def _check_conv(groups: int, input_dilation: int | Sequence[int] | None) -> None:
    spread = (input_dilation,) if isinstance(input_dilation, int) else input_dilation or ()
    if groups != 1 or any(step != 1 for step in spread):
        raise ValueError(
            "MKOR's taps support neither groups nor dilated inputs, got "
            f"feature_group_count={groups}, input_dilation={input_dilation}"
        )
