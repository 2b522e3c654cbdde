"""Choosing entries of an array by rank: the k largest, or all but the k smallest, as bool masks.

The numbers of entries may be traced, and nothing is sorted, flattened or moved: thresholds are
found by counting, so a sharded array gives the same choice as a whole one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optimkit.matrices.statistics import greatest_integer, magnitude_bits
from optimkit.protocols import Array


def count_entries(chosen: Array) -> Array:
    """How many entries of a bool array are True, int32."""
    return jnp.sum(chosen, dtype=jnp.int32)


@jax.jit
def above_smallest(x: Array, count: Array) -> Array:
    """Which entries are larger in magnitude than the ``count``-th smallest.

    Ties with it are left out, so more than ``count`` entries may be. With a count of 0 it is all
    that is not zero.

    >>> above_smallest(jnp.array([4.0, -1.0, 0.0, 2.0]), 2).tolist()
    [True, False, False, True]
    """
    bits, last_bit = magnitude_bits(x)
    start = jnp.zeros((), bits.dtype)
    found = greatest_integer(lambda value: count_entries(bits < value) < count, last_bit, start)
    return bits > jnp.where(count > 0, found, 0)


@jax.jit
def largest_entries(ranks: Array, eligible: Array, count: Array) -> Array:
    """The ``count`` eligible entries of the highest rank; all of them where they are fewer.

    Args:
      ranks: int32 or int64 numbers >= 0, such as ``magnitude_bits``. Of equal ones the first in
        the array's order are taken.
      eligible: bool, of the same shape.
      count: how many, >= 0.

    >>> eligible = jnp.array([True, True, True, False])
    >>> largest_entries(jnp.array([1, 3, 3, 9]), eligible, 1).tolist()
    [False, True, False, False]
    """
    last_bit, place_bits = ranks.dtype.itemsize * 8 - 2, ranks.size.bit_length()
    # Counted from the end, for the first of equal ranks comes first. All pairs differ.
    place = ranks.size - 1 - _places(ranks)

    def at_least(rank: Array, least_place: Array) -> Array:
        return eligible & ((ranks > rank) | ((ranks == rank) & (place >= least_place)))

    def set_bit(step: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        rank, least = found
        now = step <= last_bit
        bit = jnp.where(now, last_bit - step, last_bit + place_bits - step)
        rank_bit = jnp.left_shift(jnp.ones((), rank.dtype), bit.astype(rank.dtype))
        candidate = (
            jnp.where(now, rank | rank_bit, rank),
            jnp.where(now, least, least | rank_bit.astype(least.dtype)),
        )
        enough = count_entries(at_least(*candidate)) >= count
        return jnp.where(enough, candidate[0], rank), jnp.where(enough, candidate[1], least)

    start = jnp.zeros((), ranks.dtype), jnp.zeros((), jnp.int32)
    return at_least(*jax.lax.fori_loop(0, last_bit + 1 + place_bits, set_bit, start))


def random_entries(key: Array, eligible: Array, count: Array) -> Array:
    """``count`` of the eligible entries, each as likely as any other; all where they are fewer."""
    ranks = jax.random.bits(key, eligible.shape, jnp.uint32) >> 1
    return largest_entries(ranks.astype(jnp.int32), eligible, count)


def _places(x: Array) -> Array:
    """The position of every entry in the flattened array."""
    place, stride = jnp.zeros((), jnp.int32), 1
    for axis in reversed(range(x.ndim)):
        place = place + stride * jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        stride *= x.shape[axis]
    return place
