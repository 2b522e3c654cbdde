"""The matrix engine: batched kernels for the matrices of a tree, spread over the mesh.

Leaves of any layout are seen as stacks of matrices with rows <= cols. Matrices of one size and
dtype are joined into chunks, a kernel runs once a chunk, and every leaf gets its part back. One
chunk follows the other, so that temporary memory is that of a chunk and not that of the tree. On a
mesh, the matrices of a chunk are divided among the devices: each gets whole ones, and hands them
back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from optimkit.layout import MatrixAxesOverride, matrix_axes, matrix_shape, path_name
from optimkit.matrices import placement
from optimkit.matrices.placement import gather as gather
from optimkit.matrices.placement import place_like as place_like
from optimkit.matrices.placement import replicated as replicated
from optimkit.numerics import in_turn, narrow
from optimkit.protocols import Array, MatrixAxes, PyTree

LEAST_ENTRIES = {"cpu": 2**17}
"""Entries a device that a chunk has at least, by platform: what keeps its cores busy."""

LEAST_ENTRIES_ELSEWHERE = 2**22

PARTS = 32
"""A chunk is no larger than this fraction of the tree's matrices, unless that is too little."""


def leaf_axes(tree: PyTree, override: MatrixAxesOverride = None) -> list[MatrixAxes | None]:
    """How each leaf is seen as matrices, in the order of ``jax.tree.leaves``; None for vectors.

    Raises:
      ValueError: where name and shape of a leaf allow two readings; the message shows the override.
    """
    return [
        matrix_axes(path_name(path), leaf, override)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def axes_tree(tree: PyTree, override: MatrixAxesOverride = None) -> PyTree:
    """``leaf_axes`` as a tree like ``tree``."""
    return jax.tree.structure(tree).unflatten(leaf_axes(tree, override))


def map_matrices(
    kernel: Callable[[Array], Array],
    tree: PyTree,
    axes: Sequence[MatrixAxes | None],
    *,
    dtype: Any = None,
    bucket: bool = True,
    chunk: int | None = None,
    axis_names: Sequence[str] | None = None,
) -> PyTree:
    """Applies a kernel for stacks of matrices to all matrices of a tree.

    Args:
      kernel: ``(batch, m, n) -> (batch, m, n)`` with m <= n, each matrix on its own. It must not
        care about the orientation: f(X^T) = f(X)^T. Zero matrices may be added to its batch.
      tree: arrays of any layout.
      axes: how each leaf is seen as matrices, in the order of ``jax.tree.leaves`` (``leaf_axes``).
        Leaves with None, and empty ones, are handed back as they are.
      dtype: what the matrices are cast to before they travel between devices, and what the kernel
        gets. Default: each leaf's own.
      bucket: join leaves whose matrices have the same size. False runs the kernel leaf by leaf:
        the same numbers, more and smaller products.
      chunk: most entries a device that the kernel gets at once, one matrix at least. Default: a
        32nd of the matrices of the tree, or what the platform needs to be busy if that is more.
      axis_names: mesh axes among whose devices the matrices are divided; default all. Devices along
        other axes repeat the work. Without a mesh it has no effect.

    Returns:
      A tree like ``tree``: every leaf with its own shape, dtype and, on an explicit mesh, its own
      sharding.

    Raises:
      ValueError: for a mesh axis that does not exist.

    On an explicit mesh a sharded leaf travels as all-to-all, there and back; what is gathered is
    what lies replicated at the end. On an automatic mesh the compiler is told to divide the work
    and finds the way. Inside ``shard_map`` and ``pmap`` every device works on what it has.

    >>> import jax.numpy as jnp
    >>> tree = {"wide": jnp.ones((2, 3)), "tall": jnp.ones((3, 2))}
    >>> halved = map_matrices(lambda stack: stack / stack.shape[0], tree, leaf_axes(tree))
    >>> halved["tall"].shape, float(halved["tall"][0, 0])  # one bucket of two matrices
    ((3, 2), 0.5)
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    buckets: dict[Hashable, list[_Leaf]] = {}
    for index, (leaf, seen_as) in enumerate(zip(leaves, axes, strict=True)):
        if seen_as is None or leaf.size == 0:
            continue
        ends = placement.mergeable(leaf, seen_as) if placement.explicit_axes(leaf) else ()
        member = _Leaf(index, leaf, seen_as, *matrix_shape(leaf.shape, seen_as), ends)
        mesh = jax.typeof(leaf).sharding.mesh
        key = (*member.size, jnp.dtype(dtype or leaf.dtype), mesh)
        if not bucket or _holds_whole_matrices(member):
            key = (key, index)
        buckets.setdefault(key, []).append(member)
    total = sum(member.leaf.size for members in buckets.values() for member in members)
    parts: dict[int, list[Array]] = {}
    previous = None
    for members in buckets.values():
        names = _mesh_axes(members[0].leaf, axis_names)
        devices = _devices(members[0].leaf, names)
        to = dtype or members[0].leaf.dtype
        for alike, spec in _by_place(members, devices):
            for pieces in _chunks(alike, chunk or max(_least_entries(), total // PARTS), devices):
                stacks = [_to_stack(piece, spec, previous) for piece in pieces]
                done = _run(kernel, narrow(_join(stacks), to), names)
                if not names:
                    previous = jnp.sum(jnp.square(done[0, 0].astype(jnp.float32)))
                start = 0
                for piece, stack in zip(pieces, stacks, strict=True):
                    part = done[start : start + len(stack)] if len(pieces) > 1 else done
                    parts.setdefault(piece.member.place, []).append(part)
                    start += len(stack)
        for member in members:
            leaves[member.place] = _from_stack(_join(parts.pop(member.place)), member)
    return structure.unflatten(leaves)


class _Leaf(NamedTuple):
    """One leaf, and how it is seen."""

    place: int
    leaf: Array
    axes: MatrixAxes
    number: int
    inputs: int
    outputs: int
    ends: placement.Spec
    """On an explicit mesh, where the leaf lies when its axes are merged; otherwise empty."""

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns, rows <= cols."""
        return min(self.inputs, self.outputs), max(self.inputs, self.outputs)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the leaf in the order of the stack's."""
        return (*self.axes.batch, *self.axes.inputs, *self.axes.outputs)

    @property
    def in_order(self) -> bool:
        return self.order == tuple(range(self.leaf.ndim))

    @property
    def oriented(self) -> placement.Spec:
        """Where the stack (batch, rows, columns) lies."""
        if self.inputs <= self.outputs or not self.ends:
            return self.merged
        batch, inputs, outputs = self.merged
        return batch, outputs, inputs

    @property
    def merged(self) -> placement.Spec:
        """Where the stack (batch, inputs, outputs) lies."""
        return tuple(self.ends[axes[0]] if axes else () for axes in self.axes) if self.ends else ()


class _Piece(NamedTuple):
    """Some of the matrices of a leaf."""

    member: _Leaf
    start: int
    stop: int


def _least_entries() -> int:
    return LEAST_ENTRIES.get(jax.default_backend(), LEAST_ENTRIES_ELSEWHERE)


def _chunks(members: list[_Leaf], entries: int, devices: int) -> Iterator[list[_Piece]]:
    """Divides the matrices of a bucket into chunks of about equal number."""
    count = sum(member.number for member in members)
    rows, cols = members[0].size
    most = max(1, entries // (rows * cols)) * devices
    each = math.ceil(count / math.ceil(count / most) / devices) * devices
    if _holds_whole_matrices(members[0]):
        each = count
    pieces, room = [], each
    for member in members:
        start = 0
        while start < member.number:
            stop = min(member.number, start + room)
            pieces.append(_Piece(member, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], each
    if pieces:
        yield pieces


def _join(stacks: list[Array]) -> Array:
    """One stack of several, in the widest of their dtypes."""
    return stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)


def _to_stack(piece: _Piece, spec: placement.Spec, previous: Array | None) -> Array:
    """The matrices of a piece as (batch, m, n) with m <= n, laid as ``spec`` says on a mesh."""
    member = piece.member
    leaf = in_turn(member.leaf, previous)
    if member.ends:
        leaf = placement.walk(leaf, member.ends)
    if not member.in_order:
        leaf = jnp.transpose(leaf, member.order)
    shape = (member.number, member.inputs, member.outputs)
    stack = placement.reshape(leaf, shape, member.merged)
    if member.inputs > member.outputs:
        stack = jnp.swapaxes(stack, 1, 2)
    if piece.stop - piece.start < member.number:
        stack = stack[piece.start : piece.stop]
    return placement.walk(stack, spec) if spec else stack


def _from_stack(stack: Array, member: _Leaf) -> Array:
    """The inverse of ``_to_stack`` for all matrices of a leaf: its shape, dtype and sharding."""
    leaf, order = member.leaf, member.order
    if member.inputs > member.outputs:
        stack = jnp.swapaxes(stack, 1, 2)
    if member.ends:
        stack = placement.walk(stack, member.merged)
    ends = tuple(member.ends[axis] for axis in order) if member.ends else ()
    split = placement.reshape(stack, [leaf.shape[axis] for axis in order], ends)
    if not member.in_order:
        split = jnp.transpose(split, [order.index(axis) for axis in range(leaf.ndim)])
    return place_like(split, leaf).astype(leaf.dtype)


# ---------------------------------------------------------------------------------------------
# Meshes
# ---------------------------------------------------------------------------------------------


def _mesh_axes(x: Array, chosen: Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes over which work on ``x`` is divided; empty inside ``shard_map``."""
    mesh = jax.typeof(x).sharding.mesh
    for name in chosen or ():
        if mesh.axis_names and name not in mesh.axis_names:
            raise ValueError(f"axis_names: the mesh has axes {mesh.axis_names}, none is {name!r}")
    names = placement.explicit_axes(x) or placement.axes_of_kind(mesh, AxisType.Auto)
    return tuple(name for name in names if chosen is None or name in chosen)


def _devices(x: Array, names: Sequence[str]) -> int:
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[name] for name in names)


def _holds_whole_matrices(member: _Leaf) -> bool:
    """Whether devices hold different matrices of a stacked leaf already."""
    return bool(member.ends and member.merged[0])


def _by_place(members: list[_Leaf], devices: int) -> Iterator[tuple[list[_Leaf], placement.Spec]]:
    """Divides a bucket by where its leaves lie on an explicit mesh; the places are of stacks.

    Leaves of one place travel together if their matrices fill all devices. The rest is brought to
    one place, where most of its entries lie.
    """
    places: dict[placement.Spec, list[_Leaf]] = {}
    for member in members:
        places.setdefault(member.oriented, []).append(member)
    rest: dict[placement.Spec, list[_Leaf]] = {}
    for spec, alike in places.items():
        if sum(member.number for member in alike) % devices == 0:
            yield alike, spec
        else:
            rest[spec] = alike

    def weight(spec: placement.Spec) -> int:
        # What is replicated can be divided without traffic, so any other place wins over it.
        return sum(member.leaf.size for member in rest[spec]) if any(spec) else 0

    if rest:
        yield [member for alike in rest.values() for member in alike], max(rest, key=weight)


def _run(kernel: Callable[[Array], Array], stack: Array, names: tuple[str, ...]) -> Array:
    """Runs the kernel on a stack, its matrices divided among the devices of some mesh axes."""
    missing = -len(stack) % _devices(stack, names)
    if missing:
        stack = jnp.pad(stack, ((0, missing), (0, 0), (0, 0)))
    if placement.explicit_axes(stack):
        before = placement.spec_of(stack)
        stack = placement.walk(stack, placement.whole_matrices(stack, names))
        done = placement.walk(_apart(kernel, stack), before)
    elif names:
        way = _automatic_way(stack, names)
        for place in way:
            stack = jax.lax.with_sharding_constraint(stack, place)
        done = _apart(kernel, stack)
        for place in reversed(way):
            done = jax.lax.with_sharding_constraint(done, place)
    else:
        done = _apart(kernel, stack)
    return done[: len(done) - missing] if missing else done


def _apart(kernel: Callable[[Array], Array], stack: Array) -> Array:
    """The kernel, its products kept apart from the transposes around it.

    With a transposed layout as part of a product of bfloat16, XLA on CPUs refuses to run it.
    """
    return jax.lax.optimization_barrier(kernel(jax.lax.optimization_barrier(stack)))


def _automatic_way(stack: Array, names: tuple[str, ...]) -> list[NamedSharding]:
    """What to tell the compiler: to whole matrices by way of divided rows, or columns.

    Matrices are put into a stack of divided rows, and cut out of it, without traffic.
    """
    mesh, devices = jax.typeof(stack).sharding.mesh, _devices(stack, names)
    way = [placement.sharding(mesh, (names, (), ()))]
    sides = [side for side in (1, 2) if stack.shape[side] % devices == 0]
    if sides:
        spec = ((), names, ()) if sides[0] == 1 else ((), (), names)
        way.insert(0, placement.sharding(mesh, spec))
    return way
