"""Fused kernels as what they are: several matrices side by side, cut along their outputs."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from optimkit.layout import named_leaves
from optimkit.matrices import placement
from optimkit.protocols import Array, MatrixAxes, PyTree

SplitOutputs: TypeAlias = Mapping[str, Sequence[int]] | None
"""``{path pattern: sizes}``: how many outputs each part of a fused kernel has, in order."""


def cut_outputs(
    tree: PyTree, axes: Sequence[MatrixAxes | None], split_outputs: SplitOutputs
) -> tuple[list[Array], list[MatrixAxes | None], Callable[[Sequence[Array]], PyTree]]:
    """The leaves of a tree with the named ones cut into parts, and the way back.

    Args:
      tree: arrays of any layout.
      axes: how each leaf is seen as matrices, in the order of ``jax.tree.leaves``.
      split_outputs: ``{pattern: sizes}`` for kernels that hold several matrices, such as queries,
        keys and values in one. The sizes add up to the one output axis of the leaf.

    Returns:
      The parts, how each is seen as matrices, and a function from such parts to the tree.

    Raises:
      ValueError: for a pattern that matches no leaf, a leaf that is no matrix or has several output
        axes, or sizes that do not add up.

    >>> import jax.numpy as jnp
    >>> tree = {"qkv": {"kernel": jnp.ones((4, 8))}}
    >>> parts, _, join = cut_outputs(tree, [MatrixAxes((), (0,), (1,))], {"qkv/*": (4, 2, 2)})
    >>> [part.shape for part in parts], join(parts)["qkv"]["kernel"].shape
    ([(4, 4), (4, 2), (4, 2)], (4, 8))
    """
    leaves, structure = jax.tree.flatten(tree)
    parts: list[list[Array]] = []
    seen: list[MatrixAxes | None] = []
    sizes_of = check_split(tree, axes, split_outputs)
    for leaf, seen_as, sizes in zip(leaves, axes, sizes_of, strict=True):
        if sizes is None or seen_as is None:
            parts.append([leaf])
        else:
            whole_axis = _off_axis(jnp.asarray(leaf), seen_as)
            ends = list(itertools.accumulate(sizes))[:-1]
            parts.append(list(jnp.split(whole_axis, ends, axis=seen_as.outputs[0])))
        seen += [seen_as] * len(parts[-1])

    def join(done: Sequence[Array]) -> PyTree:
        rest, whole = iter(done), []
        for leaf, seen_as, cut in zip(leaves, axes, parts, strict=True):
            found = [next(rest) for _ in cut]
            if len(cut) > 1 and seen_as is not None:
                joined = jnp.concatenate(found, axis=seen_as.outputs[0])
                whole.append(placement.place_like(joined, jnp.asarray(leaf)))
            else:
                whole.append(found[0])
        return structure.unflatten(whole)

    return [part for cut in parts for part in cut], seen, join


def check_split(
    tree: PyTree, axes: Sequence[MatrixAxes | None], split_outputs: SplitOutputs
) -> list[tuple[int, ...] | None]:
    """The sizes into which each leaf is cut, None for one that is not.

    Raises:
      ValueError: as ``cut_outputs`` does.
    """
    named = named_leaves(tree)
    names = [name for name, _ in named]
    for pattern in split_outputs or {}:
        # An empty tree has nothing to match (optax.tree_map_params inits on one).
        if names and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"split_outputs: {pattern!r} matches none of the leaves {names}")
    return [
        _sizes(name, leaf, seen_as, split_outputs)
        for (name, leaf), seen_as in zip(named, axes, strict=True)
    ]


def _sizes(
    name: str, leaf: Array, axes: MatrixAxes | None, split_outputs: SplitOutputs
) -> tuple[int, ...] | None:
    """The sizes of the first pattern that matches, checked; None for none."""
    for pattern, given in (split_outputs or {}).items():
        if not fnmatch.fnmatchcase(name, pattern) or jnp.ndim(leaf) == 0:
            continue
        sizes, shape = tuple(given), jnp.shape(leaf)
        if axes is None or len(axes.outputs) != 1:
            raise ValueError(
                f"split_outputs names leaf {name!r} of shape {shape}, which is not seen as "
                f"matrices with one output axis but as {axes}"
            )
        outputs = shape[axes.outputs[0]]
        if sum(sizes) != outputs or any(size < 1 for size in sizes):
            raise ValueError(
                f"split_outputs for leaf {name!r} of shape {shape}: the sizes {sizes} must be "
                f"positive and add up to its {outputs} outputs"
            )
        return sizes
    return None


def _off_axis(leaf: Array, axes: MatrixAxes) -> Array:
    """The leaf with its output axis whole on every device of an explicit mesh."""
    if not placement.explicit_axes(leaf):
        return leaf
    spec = [list(names) for names in placement.spec_of(leaf)]
    mesh = jax.typeof(leaf).sharding.mesh
    moved, spec[axes.outputs[0]] = spec[axes.outputs[0]], []
    home = axes.inputs[0]
    for name in reversed(moved):
        parts = mesh.shape[name]
        for other in spec[home]:
            parts *= mesh.shape[other]
        if leaf.shape[home] % parts == 0:
            spec[home].append(name)
    return placement.walk(leaf, tuple(map(tuple, spec)))
