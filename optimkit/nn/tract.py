"""TrAct as a layer: the ordinary output, and a kernel gradient as if the output were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optimkit.matrices.input_gram import (
    Kind,
    Padding,
    apply_rows_left_inverse,
    fan_in,
    input_rows,
    map_kernel,
    padding_of,
    strides_of,
)
from optimkit.matrices.input_gram import tract_gram as tract_gram
from optimkit.numerics import check_range, compute_dtype, narrow
from optimkit.protocols import Array


def tract_kernel(
    kernel: Array,
    x: Array,
    *,
    kind: Kind = "dense",
    strides: int | Sequence[int] | None = None,
    padding: Padding = None,
    l: Any = 0.1,  # noqa: E741 - the authors' name
) -> jax.Array:
    """The kernel itself; its gradient is divided by the second moment of the inputs ``x``.

    Multiply ``x`` with what it returns, in any layer: the output and the gradient of ``x`` are the
    ordinary ones.

    Args:
      kernel: ``(inputs, ...)``, or ``(*window, inputs, outputs)`` of a convolution.
      x: what enters the layer, ``(..., features)``.
      kind: ``"dense"`` or ``"conv"``.
      strides: strides of the convolution.
      padding: its padding.
      l: lambda of ``tract_precondition``, > 0.

    Raises:
      ValueError: if ``l`` is not positive or ``x`` does not fit the kernel.
    """
    check_range(l=l, gt=0)
    kernel = jnp.asarray(kernel)
    n = fan_in(kind, kernel.shape)
    window = kernel.shape[:-2] if kind == "conv" else None
    features = jnp.shape(x)[-1:]
    expected = kernel.shape[-2] if kind == "conv" else kernel.shape[0]
    if features != (expected,):
        raise ValueError(
            f"inputs of shape {jnp.shape(x)} do not fit a {kind} kernel of shape {kernel.shape}"
        )

    @jax.custom_vjp
    def identity(kernel: Array, x: Array, lam: Array) -> Array:
        del x, lam
        return kernel

    def forward(kernel: Array, x: Array, lam: Array) -> tuple[Array, Any]:
        return kernel, (x, lam)

    def backward(kept: Any, gradient: Array) -> tuple[Array, None, None]:
        x, lam = kept
        rows = input_rows(x, kind=kind, kernel_size=window, strides=strides, padding=padding)
        new = map_kernel(
            lambda matrix: apply_rows_left_inverse(rows, lam, matrix),
            jnp.asarray(gradient, compute_dtype(gradient)),
            kind,
        )
        return narrow(new, gradient.dtype), None, None

    identity.defvjp(forward, backward)
    return kernel if n == 0 else identity(kernel, x, jnp.asarray(l, compute_dtype(kernel)))


def tract_dense(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    l: Any = 0.1,  # noqa: E741 - the authors' name
) -> jax.Array:
    r"""``x @ kernel + bias``, whose kernel gradient makes the activations trainable.

    .. math:: \nabla W = (A^T A / b + \lambda I)^{-1} A^T Z

    with the b rows of ``x``, all leading axes flattened, in A, and the gradient at the output in Z.
    The gradients of ``x`` and the bias are the ordinary ones.

    Args:
      x: ``(..., inputs)``.
      kernel: ``(inputs, outputs)``.
      bias: ``(outputs,)`` or None.
      l: lambda, > 0; the authors' 0.1.

    Returns:
      ``(..., outputs)``.

    Raises:
      ValueError: if ``l`` is not positive or the shapes do not fit.

    For the first layer only. ``optimkit.tract_precondition`` does the same behind the backward
    pass, in one solve a step, for any layer.

    >>> x = jnp.array([[4.0], [0.0]])  # second moment 8
    >>> gradient = jax.grad(lambda k: jnp.sum(tract_dense(x, k, l=2.0)))(jnp.ones((1, 1)))
    >>> round(float(gradient[0, 0]), 3)  # 4 / (8 + 2)
    0.4

    Reference: Petersen et al., "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024,
    arXiv 2410.23970.
    """
    y = x @ tract_kernel(kernel, x, l=l)
    return y if bias is None else y + _along(bias, y)


def tract_conv(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    l: Any = 0.1,  # noqa: E741 - the authors' name
) -> jax.Array:
    """A convolution whose kernel gradient makes the activations trainable.

    Args:
      x: ``(batch, *sizes, inputs)``.
      kernel: ``(*window, inputs, outputs)``.
      bias: ``(outputs,)`` or None.
      strides: steps of the window, one or one an axis.
      padding: ``"SAME"``, ``"VALID"``, one number, one number an axis (both sides), or a pair
        ``(before, after)`` an axis.
      l: lambda, > 0; the authors' 0.1.

    Returns:
      ``(batch, *sizes, outputs)``.

    Raises:
      ValueError: if an argument is out of range or the shapes do not fit.

    As ``tract_dense``, with the patches under the window as rows. No dilation and no groups.

    >>> x, kernel = jnp.ones((1, 2, 2, 1)), jnp.ones((2, 2, 1, 1))
    >>> tract_conv(x, kernel, padding="VALID").shape
    (1, 1, 1, 1)

    Reference: Petersen et al., "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024,
    arXiv 2410.23970.
    """
    window = jnp.ndim(kernel) - 2
    y = tract_conv_general_dilated(
        x,
        kernel,
        strides_of(strides, window),
        padding_of(padding, window),
        l=l,
    )
    return y if bias is None else y + _along(bias, y)


def tract_conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    *,
    l: Any = 0.1,  # noqa: E741 - the authors' name
    **others: Any,
) -> jax.Array:
    """``lax.conv_general_dilated`` with TrAct's kernel gradient, features last.

    Flax's convolutions take it: ``nnx.Conv(..., conv_general_dilated=tract_conv_general_dilated)``.

    Args:
      lhs: inputs ``(batch, *sizes, inputs)``.
      rhs: kernel ``(*window, inputs, outputs)``.
      window_strides: one an axis.
      padding: a word, or a pair an axis.
      lhs_dilation: must be 1.
      rhs_dilation: must be 1.
      dimension_numbers: ignored: features are last.
      feature_group_count: must be 1.
      l: lambda, > 0.
      **others: handed to ``lax.conv_general_dilated``.

    Raises:
      ValueError: for dilation or groups.
    """
    del dimension_numbers
    for name, value in (("lhs_dilation", lhs_dilation), ("rhs_dilation", rhs_dilation)):
        if value is not None and any(step != 1 for step in value):
            raise ValueError(f"TrAct supports no dilation, got {name}={tuple(value)}")
    if feature_group_count != 1:
        raise ValueError(f"TrAct supports no groups, got feature_group_count={feature_group_count}")
    middle = "".join(map(str, range(jnp.ndim(rhs) - 2)))
    kernel = tract_kernel(rhs, lhs, kind="conv", strides=window_strides, padding=padding, l=l)
    return lax.conv_general_dilated(
        lhs,
        kernel,
        window_strides,
        padding,
        dimension_numbers=(f"N{middle}C", f"{middle}IO", f"N{middle}C"),
        **others,
    )


def _along(bias: Array, y: Array) -> Array:
    """A bias beside outputs of any rank."""
    return jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
