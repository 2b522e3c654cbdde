"""The inputs of a layer as a matrix, its second moment, and gradients multiplied by its inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optimkit.matrices.decompositions import solve, solve_positive
from optimkit.matrices.placement import gather, place_like, replicated
from optimkit.numerics import check_choice, compute_dtype, saturate
from optimkit.protocols import Array

Kind = Literal["dense", "conv"]
Method = Literal["solve", "cholesky"]
Padding = str | int | Sequence[int] | Sequence[tuple[int, int]] | None

KINDS = ("dense", "conv")
METHODS = ("solve", "cholesky")


def input_rows(
    x: Array,
    *,
    kind: Kind = "dense",
    kernel_size: Sequence[int] | None = None,
    strides: int | Sequence[int] | None = None,
    padding: Padding = None,
) -> Array:
    """What a kernel is multiplied with: one row for each use, on the last axis.

    Args:
      x: inputs of the layer, ``(..., features)``; for a convolution ``(..., *window, features)``.
      kind: ``"dense"``: x itself. ``"conv"``: the patch under each place of the window.
      kernel_size: extent of the window.
      strides: steps of the window; one number serves all axes. Default 1.
      padding: ``"SAME"`` (the default), ``"VALID"``, one number, one number an axis, or a pair
        ``(before, after)`` an axis.

    Returns:
      ``(..., n)`` in f32 or better. A patch is ordered by input, then by place in the window.

    Raises:
      ValueError: if ``x`` or an argument does not fit the kind.
    """
    check_choice(KINDS, kind=kind)
    x = jnp.asarray(x)
    x = saturate(x.astype(compute_dtype(x)))
    if kind == "dense":
        if x.ndim < 1:
            raise ValueError("the inputs of a dense layer need a feature axis, got shape ()")
        return x
    if kernel_size is None:
        raise ValueError('kernel_size is needed with kind="conv"')
    window = len(kernel_size)
    if x.ndim < window + 1:
        raise ValueError(
            f"the inputs of a convolution with window {tuple(kernel_size)} need shape "
            f"(batch, {'size, ' * window}features), got {x.shape}"
        )
    if x.ndim != window + 2:
        x = x.reshape(-1, *x.shape[-window - 1 :])
    middle = "".join(map(str, range(window)))
    return lax.conv_general_dilated_patches(
        x,
        tuple(kernel_size),
        strides_of(strides, window),
        padding_of(padding, window),
        dimension_numbers=(f"N{middle}C", f"{middle}IO", f"N{middle}C"),
        precision=lax.Precision.HIGHEST,
    )


def strides_of(strides: int | Sequence[int] | None, window: int) -> tuple[int, ...]:
    """Strides as ``lax`` wants them: one an axis."""
    if strides is None or isinstance(strides, (int, np.integer)):
        return (int(strides or 1),) * window
    return tuple(strides)


def padding_of(padding: Padding, window: int) -> str | list[tuple[int, int]]:
    """Padding as ``lax`` wants it: a word, or a pair an axis."""
    if padding is None:
        return "SAME"
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID", "SAME_LOWER"):
            raise ValueError(
                f"padding must be 'SAME', 'SAME_LOWER', 'VALID' or numbers, got {padding!r}"
            )
        return padding
    sides = [padding] * window if isinstance(padding, (int, np.integer)) else list(padding)
    if len(sides) != window:
        raise ValueError(f"padding must name {window} axes, got {padding!r}")
    return [tuple(s) if isinstance(s, Sequence) else (s, s) for s in sides]  # type: ignore[misc]


def tract_gram(
    x: Array,
    *,
    kind: Kind = "dense",
    kernel_size: Sequence[int] | None = None,
    strides: int | Sequence[int] | None = None,
    padding: Padding = None,
) -> jax.Array:
    r"""The second moment of a layer's inputs, :math:`A^T A / b`, with b rows in A.

    A row of A is what the kernel is multiplied with at one place: the features of a sample or a
    token, or a patch.

    Args:
      x: inputs, ``(..., features)``, or ``(batch, *window, features)`` of a convolution.
      kind: ``"dense"`` or ``"conv"``.
      kernel_size: extent of a convolution's window.
      strides: steps of the window, one or one an axis; default 1.
      padding: as for ``flax.linen.Conv``; default ``"SAME"``. A number pads both sides.

    Returns:
      An (n, n) array, f32 or better, whole on every device; n inputs times the window.

    Raises:
      ValueError: if ``x`` or an argument does not fit the kind.

    >>> tract_gram(jnp.array([[1.0, 2.0], [1.0, 0.0]])).tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """
    rows = input_rows(x, kind=kind, kernel_size=kernel_size, strides=strides, padding=padding)
    return gram_of_rows(rows)


def gram_of_rows(rows: Array) -> jax.Array:
    """``A^T A / b`` of rows ``(..., n)``; zero without rows."""
    lead = tuple(range(rows.ndim - 1))
    # Contracting all leading axes at once: a sharded one could not be merged with another.
    product = lax.dot_general(
        rows,
        rows,
        ((lead, lead), ((), ())),
        precision=lax.Precision.HIGHEST,
        out_sharding=replicated(rows),
    )
    return product / max(count_rows(rows), 1)


def count_rows(rows: Array) -> int:
    """How many rows ``(..., n)`` holds."""
    return math.prod(rows.shape[:-1])


# ---------------------------------------------------------------------------------------------
# The inverse
# ---------------------------------------------------------------------------------------------


def regularization(gram: Array, lam: Any) -> Array:
    """``lam``, or what the sum ``gram + lam I`` can tell from rounding, if that is more."""
    return jnp.maximum(
        jnp.asarray(lam, gram.dtype), 4 * jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    )


def apply_left_inverse(gram: Array, lam: Any, g: Array, method: Method = "solve") -> jax.Array:
    """``(gram + lam I)^-1 g`` for a symmetric ``gram`` without negative eigenvalues.

    Args:
      gram: (n, n), f32 or better.
      lam: > 0. It counts as 4 eps times the trace of ``gram`` at least: less would be lost in the
        sum, and a singular ``gram`` would stay so.
      g: (n, m).
      method: ``"solve"``, LU with pivots, or ``"cholesky"``, half the work.
    """
    if gram.size == 0:
        return g
    matrix = gram + regularization(gram, lam) * jnp.eye(gram.shape[0], dtype=gram.dtype)
    if method == "cholesky":
        return solve_positive(matrix, g)
    return solve(matrix, g)


def apply_rows_left_inverse(rows: Array, lam: Any, g: Array, method: Method = "solve") -> jax.Array:
    """``(A^T A / b + lam I)^-1 g``, by the smaller of the n x n and the b x b system."""
    count, n = count_rows(rows), rows.shape[-1]
    if count == 0 or count >= n:
        return apply_left_inverse(gram_of_rows(rows), lam, g, method)
    a = gather(rows).reshape(count, n)
    with jax.default_matmul_precision("highest"):
        gram = a @ a.T / count
        inner = apply_left_inverse(gram, lam, a @ g / count, method)
        return (g - a.T @ inner) / regularization(gram, lam)


# ---------------------------------------------------------------------------------------------
# Kernels as matrices
# ---------------------------------------------------------------------------------------------


def kernel_order(kind: Kind, rank: int) -> tuple[int, ...]:
    """The axes of a kernel in the order of a row: inputs first, then the window, then outputs."""
    if kind == "dense":
        return tuple(range(rank))
    return (rank - 2, *range(rank - 2), rank - 1)


def fan_in(kind: Kind, shape: tuple[int, ...]) -> int:
    """How many entries of a row meet one output."""
    return shape[0] if kind == "dense" else math.prod(shape[:-1])


def map_kernel(function: Any, kernel: Array, kind: Kind) -> jax.Array:
    """Applies a function of an (n, outputs) matrix to a kernel in Flax layout; keeps its place."""
    order = kernel_order(kind, kernel.ndim)
    n = fan_in(kind, kernel.shape)
    turned = jnp.transpose(gather(kernel), order)
    matrix = turned.reshape(n, kernel.size // n if n else 0)
    back = function(matrix).reshape(turned.shape)
    return place_like(jnp.transpose(back, [order.index(a) for a in range(kernel.ndim)]), kernel)
