"""Eight and four bits an entry: blocks of an array as codes and the block's largest magnitude."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optimkit.numerics import check_choice, check_count, compute_dtype
from optimkit.protocols import Array

BLOCK_AXES = ("last", "flat")


class QuantizedArray(NamedTuple):
    """``codes``: uint8, in the array's shape. ``absmax``: the largest magnitude of each block."""

    codes: Array
    absmax: Array


class BlockFormat(NamedTuple):
    """How an array is written: ``bits`` an entry, ``companded`` or by the dynamic map.

    ``block_axis``: blocks of ``block_size`` run along the ``last`` axis, or over the ``flat`` array
    in row-major order; the last block of a row may be short. ``signed``: whether entries may be
    negative. ``keep_sign``: no negative entry becomes zero. ``keep_positive``: where none is
    negative, no positive entry becomes zero.
    """

    signed: bool = True
    bits: int = 8
    companded: bool = False
    block_size: int = 256
    block_axis: str = "last"
    keep_sign: bool = False
    keep_positive: bool = False


# ---------------------------------------------------------------------------------------------
# The dynamic map
# ---------------------------------------------------------------------------------------------


@functools.cache
def dynamic_map(
    signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The values of dynamic quantisation, from 1 down through several decades, in rising order.

    Decade i of E = ``max_exponent_bits`` is cut in cells of equal width whose middles are the
    values, twice as many as in the decade below it; 0 and 1 are added, and, when ``signed``, the
    negatives of all but 1.

    Args:
      signed: whether half of the values are negative.
      max_exponent_bits: E, the number of decades, from 1 to ``total_bits - 1``.
      total_bits: bits of a code, 2 to 8.

    Returns:
      ``2**total_bits`` sorted f32 values, a NumPy array.

    Raises:
      ValueError: if an argument is out of range.

    >>> dynamic_map(True, 1, 2).tolist(), len(dynamic_map(False))
    ([-0.550000011920929, 0.0, 0.550000011920929, 1.0], 256)
    """
    check_count(least=2, total_bits=total_bits)
    check_count(least=1, max_exponent_bits=max_exponent_bits)
    if total_bits > 8 or max_exponent_bits >= total_bits:
        raise ValueError(
            "dynamic_map needs max_exponent_bits < total_bits <= 8, got "
            f"max_exponent_bits={max_exponent_bits}, total_bits={total_bits}"
        )
    spare = total_bits - 1 - max_exponent_bits
    values: list[float] = [0.0, 1.0]
    cells = [2 ** (i + spare + (not signed)) for i in range(max_exponent_bits)]
    # The codes that spare bits leave over stand in the last decade once more.
    for decade, count in [*enumerate(cells), (max_exponent_bits - 1, 2**spare - 1)]:
        middles = 0.1 + 0.9 * (np.arange(count) + 0.5) / max(count, 1)
        magnitudes = 10.0 ** (decade - max_exponent_bits + 1) * middles
        values += [*magnitudes, *(-magnitudes if signed else ())]
    values += [0.0] * (2**total_bits - len(values))
    table = np.sort(np.asarray(values)).astype(np.float32)
    table.setflags(write=False)
    return table


def _look_up(table: Array, index: Array) -> Array:
    sharding = jax.typeof(index).sharding
    placed = {"out_sharding": sharding} if any(part is not None for part in sharding.spec) else {}
    return table.at[index].get(mode="promise_in_bounds", **placed)


_OCTAVES = 23
"""Octaves below 1 in which borders between map values lie; what is smaller is zero."""


@functools.cache
def _cells(signed: bool, bits: int) -> tuple[int, np.ndarray[Any, np.dtype[np.int32]]]:
    """Cells of the f32 numbers in [0, 1], with one border between two map values in each at most.

    Returns:
      How many low bits of a number tell it from others in its cell, and for each cell the position
      below its border, times twice two to that power, plus those bits of the border.
    """
    table = dynamic_map(signed, bits - 1, bits)
    magnitudes = table[2 ** (bits - 1) - 1 :] if signed else table
    borders = (magnitudes[1:] + magnitudes[:-1]) / 2
    low = 24 - bits
    lowest = (127 - _OCTAVES) << (bits - 1)
    starts = np.arange(lowest, (127 << (bits - 1)) + 1, dtype=np.int32) << low
    first = np.searchsorted(borders, starts.view(np.float32), side="left").astype(np.int32)
    border = np.append(borders, np.float32(np.inf))[first].view(np.int32)
    inside = (border >> low) == (starts >> low)
    return low, (first << (low + 1)) + np.where(inside, border & (2**low - 1), 2**low)


def _dynamic_position(x: Array, signed: bool, bits: int) -> Array:
    """The position of the nearest map value to ``x`` in [0, 1]; zero has position 0.

    One look-up and one comparison; a search, or arithmetic on decades, takes longer.
    """
    low, cells = _cells(signed, bits)
    pattern = jax.lax.bitcast_convert_type(x, jnp.int32)
    cell = jnp.clip((pattern >> low) - ((127 - _OCTAVES) << (bits - 1)), 0, len(cells) - 1)
    found = _look_up(jnp.asarray(cells), cell)
    above = (pattern & (2**low - 1)) > (found & (2 ** (low + 1) - 1))
    return (found >> (low + 1)) + above


# ---------------------------------------------------------------------------------------------
# Codes of entries in [-1, 1]
# ---------------------------------------------------------------------------------------------


def _encode(x: Array, how: BlockFormat) -> Array:
    top = 2**how.bits - 1
    size = jnp.abs(x)
    if how.companded:
        zero = (top + 1) // 2 if how.signed else 0
        position = jnp.round(jnp.sqrt(size) * (top - zero)).astype(jnp.int32)
        most = zero - 1
    else:
        zero = top // 2 if how.signed else 0
        position = _dynamic_position(size, how.signed, how.bits)
        most = zero
    if how.keep_positive and not how.signed:
        position = jnp.maximum(position, x > 0)
    if how.signed:
        below = jnp.minimum(position, most)
        if how.keep_sign:
            below = jnp.maximum(below, 1)
        position = zero + jnp.where(x < 0, -below, position)
    return position.astype(jnp.uint8)


def _decode(codes: Array, how: BlockFormat, dtype: Any) -> Array:
    if not how.companded:
        table = jnp.asarray(dynamic_map(how.signed, how.bits - 1, how.bits), dtype)
        return _look_up(table, codes)
    top = 2**how.bits - 1
    zero = (top + 1) // 2 if how.signed else 0
    root = (codes.astype(jnp.int32) - zero).astype(dtype) / (top - zero)
    return root * jnp.abs(root)


def _pack(codes: Array) -> Array:
    """Two codes of four bits in a byte: one of the row's first half, and one of its second."""
    half = -(-codes.shape[-1] // 2)
    first, second = codes[..., :half], codes[..., half:]
    if second.shape[-1] < half:
        second = jnp.pad(second, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return first | (second << 4)


def _unpack(packed: Array, size: int) -> Array:
    return jnp.concatenate([packed & jnp.uint8(15), packed >> 4], axis=-1)[..., :size]


# ---------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------


def _in_rows(x: Array, how: BlockFormat) -> Array:
    """The array as rows along which blocks run; a row on one device where a mesh is explicit."""
    spec = jax.typeof(x).sharding.spec
    if any(part is not None for part in (spec if how.block_axis == "flat" else spec[-1:])):
        kept = () if how.block_axis == "flat" else spec[:-1]
        x = jax.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*kept)))
    return x.reshape(-1) if how.block_axis == "flat" else x


def _placed(x: Array, sharding: Any) -> Array:
    """The array back where an explicit mesh has it."""
    spec = getattr(sharding, "spec", ())
    return jax.reshard(x, sharding) if any(part is not None for part in spec) else x


def _row_shape(shape: tuple[int, ...], how: BlockFormat) -> tuple[int, ...]:
    return (int(np.prod(shape)),) if how.block_axis == "flat" else shape


def _largest(rows: Array, block: int) -> Array:
    """The largest magnitude of each block, blocks on the last axis, a short one at the end.

    Maximum and minimum in one reduction: XLA would hand a lone maximum to a library on CPUs, and
    store for it what it reads. All entries are finite.
    """

    def outer(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])

    def largest(blocks: Array) -> Array:
        zero = jnp.zeros((), blocks.dtype)
        high, low = jax.lax.reduce((blocks, blocks), (zero, zero), outer, (blocks.ndim - 1,))
        return jnp.maximum(high, -low)

    size = rows.shape[-1]
    whole = size // block * block
    parts = []
    if whole:
        parts.append(largest(rows[..., :whole].reshape(*rows.shape[:-1], -1, block)))
    if whole < size:
        parts.append(largest(rows[..., whole:])[..., None])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _spread(absmax: Array, block: int, size: int) -> Array:
    """Each block's number at each of its entries."""
    spread = jnp.broadcast_to(absmax[..., None], (*absmax.shape, block))
    return spread.reshape(*absmax.shape[:-1], -1)[..., :size]


def code_shapes(shape: tuple[int, ...], how: BlockFormat) -> tuple[tuple[int, ...], ...]:
    """The shapes of the codes and of the largest magnitudes of an array of this shape."""
    *lead, size = _row_shape(shape, how)
    blocks = -(-size // how.block_size)
    codes = shape if how.bits == 8 else (*lead, -(-size // 2))
    return codes, (*lead, blocks)


def encode_blocks(x: Array, how: BlockFormat) -> QuantizedArray:
    """The codes of an array with at least one axis and one entry.

    Entries that are not finite count as zero, so they harm themselves alone.
    """
    rows = _in_rows(x, how)
    size = rows.shape[-1]
    block = min(how.block_size, size)
    absmax = _largest(jnp.where(jnp.isfinite(rows), rows, 0), block)
    # What compiled code may flush to zero cannot be divided by.
    absmax = jnp.where(absmax < jnp.finfo(absmax.dtype).tiny, 0, absmax)
    # Entries are coded in the array's own shape: a look-up behind a reshape would not fuse.
    whole = rows.reshape(x.shape)
    divisor = _spread(jnp.where(absmax == 0, 1, absmax), block, size).reshape(x.shape)
    scaled = jnp.where(jnp.isfinite(whole), whole / divisor, 0)
    codes = _encode(scaled.astype(jnp.float32), how)
    if how.bits == 4:
        return QuantizedArray(_pack(codes.reshape(rows.shape)), absmax)
    return QuantizedArray(_placed(codes, jax.typeof(x).sharding), absmax)


def decode_blocks(
    q: QuantizedArray, shape: tuple[int, ...], how: BlockFormat, sharding: Any = None
) -> Array:
    """The array that codes stand for, in the dtype of their largest magnitudes."""
    size = _row_shape(shape, how)[-1]
    codes = _in_rows(q.codes, how) if how.bits == 8 else _unpack(_in_rows(q.codes, how), size)
    spread = _spread(_in_rows(q.absmax, how), min(how.block_size, size), size)
    whole = _decode(codes.reshape(shape), how, q.absmax.dtype) * spread.reshape(shape)
    return _placed(whole, sharding)


def quantize_blockwise(
    x: Array, *, code: Array | None = None, signed: bool = True, block_size: int = 256
) -> QuantizedArray:
    """Writes an array as one byte an entry and one number a block of the flattened array.

    Each entry, divided by its block's largest magnitude, is given the index of the nearest value of
    a code book; halfway between two, the lower one.

    Args:
      x: an array with at least one entry.
      code: code book, sorted, at most 256 values; default ``dynamic_map(signed)``.
      signed: whether entries may be negative.
      block_size: entries of a block, at least 1; the last block may be short.

    Returns:
      ``QuantizedArray(codes, absmax)``: codes in the shape of ``x``, one magnitude a block.

    Raises:
      ValueError: if ``block_size`` is below 1, or ``x`` is empty.

    Entries that are not finite become zero.

    >>> q = quantize_blockwise(jnp.array([0.5, -2.0, 0.0, 2.0]))
    >>> q.codes.tolist(), q.absmax.tolist()
    ([201, 0, 127, 255], [2.0])
    >>> [round(float(x), 4) for x in dequantize_blockwise(q)]
    [0.4953, -1.9859, 0.0, 2.0]
    """
    check_count(least=1, block_size=block_size)
    x = jnp.asarray(x)
    if not x.size:
        raise ValueError(f"x must have an entry, got shape {x.shape}")
    how = BlockFormat(signed=signed, block_size=block_size, block_axis="flat")
    wide = x.astype(compute_dtype(x))
    if code is None:
        return encode_blocks(wide, how)
    rows = jnp.where(jnp.isfinite(wide), wide, 0).reshape(-1)
    block = min(block_size, rows.size)
    absmax = _largest(rows, block)
    scaled = rows / _spread(jnp.where(absmax == 0, 1, absmax), block, rows.size)
    book = jnp.asarray(code, rows.dtype)
    found = jnp.searchsorted((book[1:] + book[:-1]) / 2, scaled, side="left")
    return QuantizedArray(found.astype(jnp.uint8).reshape(x.shape), absmax)


def dequantize_blockwise(
    q: QuantizedArray,
    *,
    code: Array | None = None,
    signed: bool = True,
    block_size: int = 256,
    dtype: Any = jnp.float32,
) -> Array:
    """The array that ``quantize_blockwise`` wrote, with the same arguments.

    Args:
      q: codes and largest magnitudes.
      code: the code book that was used; default ``dynamic_map(signed)``.
      signed: as it was written.
      block_size: as it was written.
      dtype: of the result.

    Returns:
      An array in the shape of the codes.

    Raises:
      ValueError: if the number of blocks does not go with ``block_size``.
    """
    check_count(least=1, block_size=block_size)
    how = BlockFormat(signed=signed, block_size=block_size, block_axis="flat")
    wanted = code_shapes(q.codes.shape, how)[1]
    if q.absmax.shape != wanted:
        raise ValueError(
            f"block_size {block_size} makes {wanted[0]} blocks of shape {q.codes.shape}, "
            f"but absmax has shape {q.absmax.shape}"
        )
    if code is None:
        return decode_blocks(q, q.codes.shape, how).astype(dtype)
    values = jnp.asarray(code, q.absmax.dtype)[q.codes.reshape(-1)]
    values = values * _spread(q.absmax, block_size, values.size)
    return values.reshape(q.codes.shape).astype(dtype)


def check_block_format(block_size: int, block_axis: str) -> None:
    """Raises unless both arguments are possible."""
    check_count(least=1, block_size=block_size)
    check_choice(BLOCK_AXES, block_axis=block_axis)
