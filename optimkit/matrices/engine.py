"""The matrix engine: one batched kernel for all matrices of a size, spread over the mesh.

Leaves of any layout are seen as stacks of matrices with rows <= cols, stacks of one size and dtype
are joined into a bucket, a kernel runs once a bucket, and every leaf gets its part back. On an
explicit mesh each device computes its share of a bucket's matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optimkit.layout import MatrixAxesOverride, matrix_axes, matrix_shape, path_name
from optimkit.numerics import narrow
from optimkit.protocols import Array, MatrixAxes, PyTree


def leaf_axes(tree: PyTree, override: MatrixAxesOverride = None) -> list[MatrixAxes | None]:
    """How each leaf is seen as matrices, in the order of ``jax.tree.leaves``; None for vectors.

    Raises:
      ValueError: where name and shape of a leaf allow two readings; the message shows the override.
    """
    return [
        matrix_axes(path_name(path), leaf, override)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def map_matrices(
    kernel: Callable[[Array], Array],
    tree: PyTree,
    axes: Sequence[MatrixAxes | None],
    *,
    dtype: Any = None,
    bucket: bool = True,
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
        the same numbers, less memory, more and smaller products.

    Returns:
      A tree like ``tree``: every leaf with its own shape, dtype and, on an explicit mesh, its own
      sharding.

    On one device, inside ``shard_map``, and on automatic meshes nothing is moved by hand.

    >>> import jax.numpy as jnp
    >>> tree = {"wide": jnp.ones((2, 3)), "tall": jnp.ones((3, 2))}
    >>> halved = map_matrices(lambda stack: stack / stack.shape[0], tree, leaf_axes(tree))
    >>> halved["tall"].shape, float(halved["tall"][0, 0])  # one bucket of two matrices
    ((3, 2), 0.5)
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    buckets: dict[Hashable, list[tuple[int, MatrixAxes]]] = {}
    for index, (leaf, seen_as) in enumerate(zip(leaves, axes, strict=True)):
        if seen_as is None or leaf.size == 0:
            continue
        _, inputs, outputs = matrix_shape(leaf.shape, seen_as)
        size = (min(inputs, outputs), max(inputs, outputs))
        key = (size, jnp.dtype(dtype or leaf.dtype)) if bucket else index
        buckets.setdefault(key, []).append((index, seen_as))
    for members in buckets.values():
        stacks = [_to_stack(leaves[i], seen_as, dtype or leaves[i].dtype) for i, seen_as in members]
        joined = _spread(kernel, jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0])
        start = 0
        for (i, seen_as), stack in zip(members, stacks, strict=True):
            part = joined[start : start + stack.shape[0]]
            leaves[i] = _from_stack(part, leaves[i], seen_as)
            start += stack.shape[0]
    return structure.unflatten(leaves)


def _to_stack(leaf: Array, axes: MatrixAxes, dtype: Any) -> Array:
    """A leaf as (batch, m, n) with m <= n, cast, and whole on every device."""
    batch, inputs, outputs = matrix_shape(leaf.shape, axes)
    whole = gather(narrow(leaf, dtype))
    stack = jnp.transpose(whole, (*axes.batch, *axes.inputs, *axes.outputs))
    stack = jnp.reshape(stack, (batch, inputs, outputs))
    return jnp.swapaxes(stack, 1, 2) if inputs > outputs else stack


def _from_stack(stack: Array, leaf: Array, axes: MatrixAxes) -> Array:
    """The inverse of ``_to_stack``: shape, dtype and sharding of ``leaf``."""
    _, inputs, outputs = matrix_shape(leaf.shape, axes)
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    stack = jnp.swapaxes(stack, 1, 2) if inputs > outputs else stack
    whole = jnp.reshape(stack, tuple(leaf.shape[axis] for axis in order))
    whole = jnp.transpose(whole, tuple(order.index(axis) for axis in range(leaf.ndim)))
    sharding = jax.typeof(leaf).sharding
    if _explicit_axes(sharding.mesh):
        whole = jax.reshard(whole, sharding)
    return whole.astype(leaf.dtype)


# ---------------------------------------------------------------------------------------------
# Meshes
# ---------------------------------------------------------------------------------------------


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    """Names of the mesh axes whose use the types of the arrays say; empty without a mesh."""
    return tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )


def gather(x: Array) -> Array:
    """The whole array on every device: axes of a sharded one can be neither merged nor joined."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.reshard(x, NamedSharding(mesh, P())) if _explicit_axes(mesh) else x


def _spread(kernel: Callable[[Array], Array], stack: Array) -> Array:
    """Runs the kernel with the matrices of a replicated stack divided among the devices."""
    mesh, count = jax.typeof(stack).sharding.mesh, stack.shape[0]
    names = _explicit_axes(mesh)
    devices = math.prod(mesh.shape[name] for name in names)
    if devices == 1 or count == 1:
        return kernel(stack)
    padded = jnp.pad(stack, ((0, -count % devices), (0, 0), (0, 0)))
    shares = jax.reshard(padded, NamedSharding(mesh, P(names, None, None)))
    return jax.reshard(kernel(shares), NamedSharding(mesh, P()))[:count]
