"""4-bit training, emulated: numbers are rounded to a 4-bit grid and stay in their own dtype.

A group of ``group_size`` consecutive numbers shares one scale, and the largest few of a group may
be kept exactly. Gradients pass straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optimkit.gradients.straight_through import straight_through
from optimkit.numerics import check_count, compute_dtype
from optimkit.protocols import Array

SMALLEST_SCALE = 1e-6
"""Floor of the largest magnitude of a group (FP4, INT4 activations)."""

SMALLEST_RANGE = 1e-5
"""Floor of ``max - min`` of a group (INT4 weights)."""

# ---------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------


def check_groups(name: str, x: Array, group_size: int) -> None:
    """Raises unless an array is real and of whole groups."""
    check_count(least=1, group_size=group_size)
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a real floating-point array, got dtype {dtype}")
    if np.size(x) % group_size:
        raise ValueError(
            f"{name} has {np.size(x)} entries (shape {np.shape(x)}), which is not a multiple of "
            f"group_size={group_size}"
        )


def _grouped(x: Array, group_size: int) -> Array:
    """The row-major flattening as (..., group_size).

    Leading axes are kept where no group straddles two rows: a batch sharded over devices then stays
    where it is.
    """
    if x.ndim and x.shape[-1] % group_size == 0:
        return x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    return x.reshape(x.size // group_size, group_size)


def _arithmetic(x: Array) -> tuple[Any, Callable[[Array], Array]]:
    """The dtype to compute in, and the rounding after each operation.

    The authors' bfloat16 runs round after every operation. XLA may leave such roundings out, which
    moves ties by a whole level, so they are made here by hand, on float32.
    """
    if x.dtype == jnp.bfloat16:
        return jnp.float32, lambda value: lax.reduce_precision(value, 8, 7)
    return compute_dtype(x), lambda value: value


def _divide(x: Array, constant: int) -> Array:
    """``x / constant``, truly divided.

    XLA turns a division by a known constant into a multiplication by its reciprocal, which is off
    by one unit in the last place; so it must not know.
    """
    return x / jnp.where(jnp.isnan(x), x, constant)


def _split_top(y: Array, keep_top: int) -> tuple[Array, Array]:
    """Marks the ``keep_top`` largest |y| of every group; gives the largest of the others too.

    No sorting; of equal ones, the first is kept. NaN is never kept, since it equals nothing: it
    stays with the others and spreads to the whole group through their maximum.
    """
    magnitude, kept = jnp.abs(y), jnp.zeros(y.shape, bool)
    size = y.shape[-1]
    place = lax.broadcasted_iota(jnp.int32, y.shape, y.ndim - 1)
    for _ in range(keep_top):
        tied = magnitude == jnp.max(magnitude, axis=-1, keepdims=True)
        # Two plain reductions: argmax takes several times as long on a CPU.
        first = jnp.min(jnp.where(tied, place, size), axis=-1, keepdims=True)
        top = place == first
        kept |= top
        magnitude = jnp.where(top, -1, magnitude)  # below every magnitude: not found again
    return kept, jnp.max(magnitude, axis=-1, keepdims=True, initial=0)


# ---------------------------------------------------------------------------------------------
# Quantizers
# ---------------------------------------------------------------------------------------------


def fake_quant_fp4(x: Array, *, group_size: int = 256, keep_top: int = 2) -> Array:
    r"""Rounds to the FP4 grid of Stable-SPAM, for weights and activations.

    .. math::

        \alpha = \max(\max_{i \notin K} |y_i|,\, 10^{-6}), \qquad
        y_i \leftarrow \frac{\alpha}{4}\,\mathrm{round}\!\left(\frac{4 y_i}{\alpha}\right)
        \;\text{ for } i \notin K

    per group y, where K holds the ``keep_top`` entries of largest magnitude, which stay as they
    are. Rounding is half to even.

    Args:
      x: a real floating-point array whose size is a multiple of ``group_size``. Groups run over its
        row-major flattening; give a Dense kernel transposed, (out, in).
      group_size: numbers that share a scale, >= 1. 256 is what the published runs use.
      keep_top: entries of a group that are kept exactly, >= 0. 2 is the authors' value.

    Returns:
      An array of the shape and dtype of ``x``. Its derivative is the identity. Under ``vmap`` every
      example is flattened alone, which changes nothing when an example holds whole groups.

    Raises:
      TypeError: if ``x`` is not a real floating-point array.
      ValueError: if its size is not a multiple of ``group_size``, or an argument is out of range.

    The grid is uniform, {0, 1/4, 1/2, 3/4, 1} times the scale with either sign: 9 levels, about 3.2
    bits. The authors call it E1M2, whose 15 levels would reach 1.75; their code scales to 1. With
    ``keep_top=0`` their code does not round at all, which is a slip; here it rounds.

    A group of zeros stays zero, and magnitudes far below 1e-6 round to zero. A NaN makes its whole
    group NaN; so do infinities beyond ``keep_top`` in one group. bfloat16 is rounded after every
    operation, as in the authors' runs; float16 is computed in float32.

    >>> x = jnp.array([9.0, -1.0, 0.3, 0.1])
    >>> fake_quant_fp4(x, group_size=4, keep_top=1).tolist()  # scale 1, steps of 1/4
    [9.0, -1.0, 0.25, 0.0]

    Reference: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    2025, arXiv 2502.17055.
    """
    x = jnp.asarray(x)
    check_groups("x", x, group_size)
    check_count(keep_top=keep_top)

    def quantize(x: Array) -> Array:
        dtype, rounded = _arithmetic(x)
        y = _grouped(x.astype(dtype), group_size)
        kept, largest = _split_top(y, keep_top)
        scale = jnp.maximum(largest, rounded(jnp.asarray(SMALLEST_SCALE, dtype)))
        # Times 4 after the division: y / scale cannot overflow outside K.
        level = jnp.round(4 * rounded(jnp.where(kept, 0, y) / scale))
        return jnp.where(kept, y, rounded(level * (scale / 4))).reshape(x.shape).astype(x.dtype)

    return straight_through(quantize)(x)


class Int4Codes(NamedTuple):
    """Weights as codes: ``(codes - zero) * scale`` per group.

    ``codes``: uint8, in the shape of the weights. ``scale`` and ``zero``: one a group, in the
    order of the groups; ``zero`` holds whole numbers. Both are float32 at least.
    """

    codes: Array
    scale: Array
    zero: Array


def _encode(w: Array, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    """Levels, scales and zero points of the groups of ``w``, as floats that broadcast."""
    dtype, rounded = _arithmetic(w)
    y, top = _grouped(w.astype(dtype), group_size), 2**bits - 1
    low, high = jnp.min(y, axis=-1, keepdims=True), jnp.max(y, axis=-1, keepdims=True)
    floor = rounded(jnp.asarray(SMALLEST_RANGE, dtype))
    width = jnp.maximum(rounded(high - low), floor)
    scale = rounded(_divide(width, top))
    zero = jnp.clip(-jnp.round(rounded(low / scale)), 0, top)
    codes = jnp.clip(rounded(jnp.round(rounded(y / scale)) + zero), 0, top)
    return codes, scale, zero


def int4_weight_codes(w: Array, *, bits: int = 4, group_size: int = 256) -> Int4Codes:
    """The codes, scales and zero points behind ``fake_quant_int4_weight``.

    Args:
      w: the weights, as there.
      bits: width of a code, from 2 to 8.
      group_size: numbers that share a scale, >= 1.

    Returns:
      ``Int4Codes(codes, scale, zero)``. A group with a NaN has a NaN scale, and its codes mean
      nothing.

    >>> stored = int4_weight_codes(jnp.array([-3.0, 0.0, 5.0, 12.0]), group_size=4)
    >>> stored.codes.tolist(), stored.scale.tolist(), stored.zero.tolist()
    ([0, 3, 8, 15], [1.0], [3.0])
    """
    w = jnp.asarray(w)
    check_groups("w", w, group_size)
    _check_bits(bits)
    codes, scale, zero = _encode(w, bits, group_size)
    return Int4Codes(codes.reshape(w.shape).astype(jnp.uint8), scale.reshape(-1), zero.reshape(-1))


def fake_quant_int4_weight(w: Array, *, bits: int = 4, group_size: int = 256) -> Array:
    r"""Rounds weights to 16 levels between the smallest and the largest of their group.

    .. math::

        s = \frac{\max(\max y - \min y,\, 10^{-5})}{15}, \quad
        z = \mathrm{clip}\!\left(-\mathrm{round}(\min y / s), 0, 15\right), \quad
        y \leftarrow \left(\mathrm{clip}(\mathrm{round}(y/s) + z, 0, 15) - z\right) s

    Args:
      w: a real floating-point array whose size is a multiple of ``group_size``. Groups run over its
        row-major flattening; give a Dense kernel transposed, (out, in).
      bits: from 2 to 8; 15 above is ``2**bits - 1``. The published runs use 4.
      group_size: numbers that share a scale, >= 1. 256 is what the published runs use.

    Returns:
      An array of the shape and dtype of ``w``. Its derivative is the identity. Under ``vmap`` every
      example is flattened alone.

    Raises:
      TypeError: if ``w`` is not a real floating-point array.
      ValueError: if its size is not a multiple of ``group_size``, or an argument is out of range.

    A group of one sign has its zero point at the end of the codes, so that a group far from zero
    saturates: with all entries positive, at ``max - min``. A NaN makes its group NaN, where the
    authors' code stops with an assertion. ``max - min`` must not overflow.

    >>> fake_quant_int4_weight(jnp.array([-3.0, 0.2, 4.6, 12.0]), group_size=4).tolist()
    [-3.0, 0.0, 5.0, 12.0]

    Reference: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    2025, arXiv 2502.17055.
    """
    w = jnp.asarray(w)
    check_groups("w", w, group_size)
    _check_bits(bits)

    def quantize(w: Array) -> Array:
        codes, scale, zero = _encode(w, bits, group_size)
        _, rounded = _arithmetic(w)
        return rounded((codes - zero) * scale).reshape(w.shape).astype(w.dtype)

    return straight_through(quantize)(w)


def fake_quant_int4_activation(
    x: Array,
    *,
    bits: int = 4,
    group_size: int = 256,
    keep_top: int = 2,
    key: Array | None = None,
) -> Array:
    r"""Rounds activations to 15 levels, symmetric about zero, but for the largest of each group.

    .. math::

        s = \max(\max_{i \notin K} |y_i|,\, 10^{-6}), \qquad
        y_i \leftarrow \frac{s}{7}\,\mathrm{clip}(\mathrm{round}(7 y_i / s + u_i), -8, 7)
        \;\text{ for } i \notin K

    per group y, where K holds the ``keep_top`` entries of largest magnitude, which stay as they
    are, and u is 0, or uniform in [-1/2, 1/2) when a key is given.

    Args:
      x: a real floating-point array whose size is a multiple of ``group_size``. Groups run over its
        row-major flattening.
      bits: from 2 to 8; 7 above is ``2**(bits - 1) - 1``. The published runs use 4.
      group_size: numbers that share a scale, >= 1. 256 is what the published runs use; their script
        asks for 64, which does not reach the layer.
      keep_top: entries of a group that are kept exactly, >= 0. 2 is the authors' value.
      key: a random key switches stochastic rounding on. The published runs round to nearest.

    Returns:
      An array of the shape and dtype of ``x``. Its derivative is the identity. Under ``vmap`` every
      example is flattened alone; give each its own key, or all round with the same noise.

    Raises:
      TypeError: if ``x`` is not a real floating-point array.
      ValueError: if its size is not a multiple of ``group_size``, or an argument is out of range.

    Magnitudes must stay below an eighth of the dtype's largest number. A NaN makes its group NaN.

    >>> x = jnp.array([50.0, -7.0, 2.4, 0.3])
    >>> fake_quant_int4_activation(x, group_size=4, keep_top=1).tolist()
    [50.0, -7.0, 2.0, 0.0]

    Reference: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    2025, arXiv 2502.17055.
    """
    x = jnp.asarray(x)
    check_groups("x", x, group_size)
    _check_bits(bits)
    check_count(keep_top=keep_top)
    top = 2 ** (bits - 1) - 1

    def quantize(x: Array) -> Array:
        dtype, rounded = _arithmetic(x)
        y = _grouped(x.astype(dtype), group_size)
        kept, largest = _split_top(y, keep_top)
        scale = jnp.maximum(largest, rounded(jnp.asarray(SMALLEST_SCALE, dtype)))
        # 7 / s and the division by 7 are not rounded to bfloat16: this reproduces the recordings.
        level = rounded(jnp.where(kept, 0, y) * (top / scale))
        if key is not None:
            level += jax.random.uniform(key, y.shape, dtype, -0.5, 0.5)
        level = jnp.clip(jnp.round(level), -top - 1, top)
        value = rounded(_divide(level * scale, top))
        return jnp.where(kept, y, value).reshape(x.shape).astype(x.dtype)

    return straight_through(quantize)(x)


def _check_bits(bits: int) -> None:
    check_count(least=2, bits=bits)
    if bits > 8:
        raise ValueError(f"bits must be at most 8, got {bits}")
