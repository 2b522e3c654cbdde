"""First layers with TrAct's kernel gradient, for Flax: parameters and outputs stay the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import linen, nnx
from jax import lax

from optimkit.nn.tract import tract_conv_general_dilated, tract_kernel
from optimkit.protocols import Array


@dataclasses.dataclass(frozen=True)  # equal for equal l, so that equal layers share a compilation
class _DotGeneral:
    """``lax.dot_general`` of a dense layer with TrAct's kernel gradient."""

    lam: float

    def __call__(self, x: Array, kernel: Array, *args: Any, **others: Any) -> jax.Array:
        return lax.dot_general(x, tract_kernel(kernel, x, l=self.lam), *args, **others)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """``tract_conv_general_dilated`` with its lambda."""

    lam: float

    def __call__(self, *args: Any, **others: Any) -> jax.Array:
        return tract_conv_general_dilated(*args, l=self.lam, **others)


class TrActDense(linen.Dense):
    """``linen.Dense`` for the first layer, with TrAct's kernel gradient (see ``tract_dense``).

    Attributes:
      l: lambda, > 0; the authors' 0.1. All else as for ``linen.Dense``.

    >>> import jax.numpy as jnp
    >>> layer = TrActDense(8)
    >>> params = layer.init(jax.random.key(0), jnp.ones((4, 64)))
    >>> layer.apply(params, jnp.ones((4, 64))).shape
    (4, 8)
    """

    l: float = 0.1  # noqa: E741 - the authors' name

    def __post_init__(self) -> None:
        self.dot_general = _DotGeneral(self.l)
        super().__post_init__()


class TrActConv(linen.Conv):
    """``linen.Conv`` for the first layer, with TrAct's kernel gradient (see ``tract_conv``).

    Attributes:
      l: lambda, > 0; the authors' 0.1. All else as for ``linen.Conv``; dilation and groups raise.

    For NNX: ``nnx.Conv(..., conv_general_dilated=optimkit.nn.tract_conv_general_dilated)``.

    >>> import jax.numpy as jnp
    >>> layer = TrActConv(8, (4, 4), strides=4, padding="VALID")
    >>> params = layer.init(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    >>> layer.apply(params, jnp.ones((2, 8, 8, 3))).shape
    (2, 2, 2, 8)
    """

    l: float = 0.1  # noqa: E741 - the authors' name

    def __post_init__(self) -> None:
        self.conv_general_dilated = _Convolution(self.l)
        super().__post_init__()


class TrActLinear(nnx.Linear):
    """``nnx.Linear`` for the first layer, with TrAct's kernel gradient (see ``tract_dense``).

    Args:
      in_features: length of the last axis of the inputs.
      out_features: length of the last axis of the outputs.
      l: lambda, > 0; the authors' 0.1.
      **others: the other arguments of ``nnx.Linear``.

    >>> import jax.numpy as jnp
    >>> layer = TrActLinear(64, 8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((4, 64))).shape
    (4, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        l: float = 0.1,  # noqa: E741 - the authors' name
        **others: Any,
    ):
        super().__init__(in_features, out_features, dot_general=_DotGeneral(l), **others)
