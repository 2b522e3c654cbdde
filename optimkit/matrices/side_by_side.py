"""Kernels that need several matrices at once: laid side by side, they travel as one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from optimkit.matrices import placement
from optimkit.matrices.engine import map_matrices
from optimkit.protocols import Array, MatrixAxes


def whole_matrices(x: Array) -> Array:
    """The array with its matrices whole on every device of an explicit mesh."""
    if not placement.explicit_axes(x):
        return x
    return placement.walk(x, (*placement.spec_of(x)[:-2], (), ()))


def map_side_by_side(
    function: Callable[..., Sequence[Array]],
    groups: Sequence[Sequence[Array]],
    *operands: Array,
) -> list[list[Array]]:
    """Runs a function of several matrices of one height on groups of them, many groups at once.

    Args:
      function: ``(*stacks, *operands) -> stacks``, each stack (batch, d, columns), each matrix on
        its own. Groups of zero matrices may be added to its batch.
      groups: for each call that is wanted, the arrays (..., d, columns); one dtype a group.
      *operands: further arrays, the same for all groups.

    Returns:
      For each group what the function gives, (..., d, columns); on an explicit mesh with whole
      matrices on every device.

    Groups of the same sizes go through the function together, and on a mesh are divided among the
    devices, as in ``map_matrices``.

    >>> wide, thin = jnp.ones((2, 3)), jnp.full((2, 1), 2.0)
    >>> [[product]] = map_side_by_side(lambda a, b: [a * b], [[wide, thin]])
    >>> product.tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    alike: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        sizes = tuple(x.shape[-2:] for x in group)
        alike.setdefault((sizes, jnp.result_type(*group)), []).append(place)
    found: dict[int, list[Array]] = {}
    for places in alike.values():
        together = _together(function, [groups[place] for place in places], operands)
        found |= dict(zip(places, together, strict=True))
    return [found[place] for place in range(len(groups))]


def _together(
    function: Callable[..., Sequence[Array]],
    groups: Sequence[Sequence[Array]],
    operands: Sequence[Array],
) -> list[list[Array]]:
    """Groups of the same sizes.

    The engine wants kernels that keep a matrix's shape: all results must find room in the place of
    the arguments, which are given empty columns where they have too few.
    """
    rows = groups[0][0].shape[-2]
    dtype = jnp.result_type(*groups[0])
    given = _offsets([x.shape[-1] for x in groups[0]])
    shapes = [jax.ShapeDtypeStruct((1, rows, x.shape[-1]), dtype) for x in groups[0]]
    made = _offsets([x.shape[-1] for x in jax.eval_shape(function, *shapes, *operands)])
    columns = max(given[-1], made[-1])

    def packed(group: Sequence[Array]) -> Array:
        if len(group) == 1 and columns == given[-1]:
            return group[0]
        joined = jnp.concatenate([whole_matrices(x) for x in group], axis=-1)
        return _padded(joined, columns)

    def on_device(stack: Array, *operands: Array) -> Array:
        x = jnp.swapaxes(stack, -2, -1) if rows > columns else stack
        results = function(*_cut(x, given), *operands)
        x = _padded(jnp.concatenate(list(results), axis=-1), columns)
        return jnp.swapaxes(x, -2, -1) if rows > columns else x

    def kernel(stack: Array) -> Array:
        if not placement.explicit_axes(stack):
            return on_device(stack, *operands)
        place = jax.typeof(stack).sharding.spec
        return jax.shard_map(
            on_device,
            in_specs=(place, *(P() for _ in operands)),
            out_specs=place,
            check_vma=False,
        )(stack, *operands)

    trees = [packed(group) for group in groups]
    axes = [MatrixAxes(tuple(range(x.ndim - 2)), (x.ndim - 2,), (x.ndim - 1,)) for x in trees]
    return [_cut(whole_matrices(x), made) for x in map_matrices(kernel, trees, axes)]


def _offsets(widths: Sequence[int]) -> list[int]:
    """Where each matrix begins, and where the last one ends."""
    return [sum(widths[:place]) for place in range(len(widths) + 1)]


def _cut(x: Array, offsets: Sequence[int]) -> list[Any]:
    return [x[..., start:stop] for start, stop in itertools.pairwise(offsets)]


def _padded(x: Array, columns: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])
