"""A dense layer on numbers rounded to 4 bits, as a function."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from optimkit.nn.fake_quant import (
    check_groups,
    fake_quant_fp4,
    fake_quant_int4_activation,
    fake_quant_int4_weight,
)
from optimkit.numerics import check_choice
from optimkit.protocols import Array

Kind = Literal["fp4", "int4"] | None
"""Number format of a layer; None computes without rounding."""


def quantized_dense(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    kind: Kind = "fp4",
    group_size: int = 256,
    keep_top: int = 2,
    out_sharding: Any = None,
) -> Array:
    r"""A dense layer on rounded inputs and weights, with straight-through gradients.

    .. math::

        y = Q(x)\,\tilde K + b, \qquad \tilde K = Q_w(K^T)^T

    and backward, for the cotangent dy,

    .. math::

        dx = dy\,\tilde K^T, \qquad dK = Q(x)^T dy, \qquad db = \textstyle\sum dy

    Args:
      x: inputs (..., in).
      kernel: (in, out). Its groups run along the inputs, as in the authors' (out, in) weights, and
        straddle outputs where ``group_size`` does not divide ``in``.
      bias: (out,) or None; never rounded.
      kind: ``"fp4"`` (``fake_quant_fp4`` for both), ``"int4"`` (``fake_quant_int4_activation`` and
        ``fake_quant_int4_weight``) or None (no rounding).
      group_size: numbers that share a scale, >= 1; must divide the size of ``x`` and of ``kernel``.
      keep_top: entries that a group keeps exactly (not in INT4 weights), >= 0.
      out_sharding: sharding of the result, where an explicit mesh needs it to be told.

    Returns:
      (..., out), in the promoted dtype. The gradient reaches the full-precision ``kernel``; forward
      mode works too.

    Raises:
      ValueError: for another kind, shapes that do not fit, or sizes that are not multiples of
        ``group_size``, naming the argument.

    The authors' code adds the rounding error as ``(Q(W) - W) + W``, which differs from ``Q(W)`` by
    1e-8 in float32 and by up to one unit in the last place in bfloat16; here it is ``Q(W)``.

    >>> kernel = jnp.array([[1.0], [0.3], [0.0], [0.0]])
    >>> quantized_dense(jnp.ones((1, 4)), kernel, group_size=4, keep_top=0).tolist()
    [[1.25]]

    Reference: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    2025, arXiv 2502.17055.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"kernel must be (in, out) with in the last axis of x, got kernel {kernel.shape} and "
            f"x {x.shape}"
        )
    if bias is not None and jnp.shape(bias) != kernel.shape[1:]:
        raise ValueError(f"bias must have shape {kernel.shape[1:]}, got {jnp.shape(bias)}")
    weights = kernel.T
    if kind is not None:
        check_choice(("fp4", "int4"), kind=kind)
        check_groups("x", x, group_size)
        check_groups("kernel", kernel, group_size)
    if kind == "fp4":
        x = fake_quant_fp4(x, group_size=group_size, keep_top=keep_top)
        weights = fake_quant_fp4(weights, group_size=group_size, keep_top=keep_top)
    elif kind == "int4":
        x = fake_quant_int4_activation(x, group_size=group_size, keep_top=keep_top)
        weights = fake_quant_int4_weight(weights, group_size=group_size)
    y = jnp.einsum("...i,oi->...o", x, weights, out_sharding=out_sharding)
    return y if bias is None else y + jnp.asarray(bias).reshape((1,) * (y.ndim - 1) + (-1,))
