"""Statistics of every matrix of a stack or leaf: norms of rows and columns, quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optimkit.numerics import safe_norm
from optimkit.protocols import Array


def row_norms(x: Array) -> jax.Array:
    """The l2 norm of every row of (..., m, n), as (..., m, 1); no overflow, zero for zeros.

    >>> import jax.numpy as jnp
    >>> norms = row_norms(jnp.array([[3e30, 4e30], [0.0, 1.0]]))
    >>> [f"{float(norm):.2g}" for norm in norms[:, 0]]
    ['5e+30', '1']
    """
    return safe_norm(x, -1, keepdims=True)


def column_norms(x: Array) -> jax.Array:
    """The l2 norm of every column of (..., m, n), as (..., 1, n).

    >>> import jax.numpy as jnp
    >>> column_norms(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
    [[5.0, 1.0]]
    """
    return safe_norm(x, -2, keepdims=True)


def frobenius_norm(x: Array) -> jax.Array:
    """The Frobenius norm of every matrix of (..., m, n), as (..., 1, 1).

    >>> import jax.numpy as jnp
    >>> frobenius_norm(jnp.array([[[3.0, 4.0]], [[0.0, 1.0]]]))[:, 0, 0].tolist()
    [5.0, 1.0]
    """
    return safe_norm(x, (-2, -1), keepdims=True)


def magnitude_bits(x: Array) -> tuple[Array, int]:
    """``|x|`` as integers that lie in the same order, and the number of their highest bit.

    Zero is 0, and NaN lies above infinity. f32 and f64 only.

    >>> import jax.numpy as jnp
    >>> magnitude_bits(jnp.array([0.0, -1.0, 1.0], jnp.float32))[0].tolist()
    [0, 1065353216, 1065353216]
    """
    kind, last_bit = (jnp.int32, 30) if x.dtype.itemsize == 4 else (jnp.int64, 62)
    return jax.lax.bitcast_convert_type(jnp.abs(x), kind), last_bit


def greatest_integer(holds: Callable[[Array], Array], last_bit: int, start: Array) -> Array:
    """The greatest integer of which something holds, built from its highest bit down.

    Args:
      holds: true up to some integer >= 0 and false from there on, or a bool for each of ``start``.
      last_bit: the highest bit that the integer may have.
      start: zeros, of the shape and dtype of the result.

    It asks ``last_bit + 1`` times. Counting how many entries lie below a candidate finds the k-th
    smallest of an array without sorting it, joining its axes or moving entries between devices.

    >>> import jax.numpy as jnp
    >>> int(greatest_integer(lambda value: value * value <= 50, 7, jnp.zeros((), jnp.int32)))
    7
    """
    kind = start.dtype

    def set_bit(step: Array, found: Array) -> Array:
        candidate = found | jnp.left_shift(jnp.ones((), kind), (last_bit - step).astype(kind))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, last_bit + 1, set_bit, start)


def magnitude_quantile(x: Array, quantile: Any, axis: tuple[int, ...]) -> Array:
    """The quantile of ``|x|`` over ``axis``, with size one there; linear between two entries.

    The same as ``jnp.quantile(abs(x), quantile, axis, keepdims=True)``, and found without sorting,
    joining axes or moving entries between devices: positive floats lie in the order of their bits,
    so the k-th smallest is built from its highest bit down, counting once a bit how many entries
    lie below. That is 31 reads of the array in f32, and 63 in f64.

    >>> import jax.numpy as jnp
    >>> magnitude_quantile(jnp.array([4.0, -1.0, 3.0, 2.0]), 0.5, (0,)).tolist()
    [2.5]
    """
    count = math.prod(x.shape[a] for a in axis)
    position = quantile * (count - 1)
    # Exact for a Python number, also where f32 cannot count to the size of the leaf.
    number = isinstance(position, (int, float))
    index = math.floor(position) if number else jnp.floor(position).astype(jnp.int32)
    weight = jnp.asarray(position - index, x.dtype)

    bits, last_bit = magnitude_bits(x)
    kind = bits.dtype

    def how_many(chosen: Array) -> Array:
        return jnp.sum(chosen, axis=axis, keepdims=True, dtype=jnp.int32)

    start = jnp.zeros_like(jnp.min(bits, axis=axis, keepdims=True))
    found = greatest_integer(lambda value: how_many(bits < value) <= index, last_bit, start)
    above = jnp.min(jnp.where(bits > found, bits, jnp.iinfo(kind).max), axis=axis, keepdims=True)
    repeated = how_many(bits <= found) >= jnp.minimum(index + 2, count)
    lower = jax.lax.bitcast_convert_type(found, x.dtype)
    upper = jax.lax.bitcast_convert_type(jnp.where(repeated, found, above), x.dtype)
    return jnp.where(weight > 0, (1 - weight) * lower + weight * upper, lower)
