"""The layers of a tree as MKOR sees them: a kernel, the bias beside it, and their statistics."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import (
    EMBEDDING_WORDS,
    MatrixAxesOverride,
    has_word,
    matrix_axes,
    named_leaves,
)
from optimkit.matrices.kronecker import layer_shape, whole
from optimkit.numerics import compute_dtype
from optimkit.protocols import Array, MatrixAxes, PyTree
from optimkit.transforms.mkor_factors import Pair

Skip: TypeAlias = Sequence[str] | Callable[[str, Any], bool]


class Layer(NamedTuple):
    """A kernel and its bias: a name, places in the order of ``jax.tree.leaves``, and axes."""

    name: str
    kernel: int
    bias: int | None
    axes: MatrixAxes


def find_layers(
    tree: PyTree, skip: Skip = (), override: MatrixAxesOverride = None
) -> tuple[Layer, ...]:
    """The Dense and Conv layers of a tree: kernels, each with the ``bias`` beside it if it fits.

    A layer is named by its path: ``block/dense`` for ``block/dense/kernel``. A leaf of another name
    than ``kernel`` is a layer of its own. Embedding tables, vectors and empty leaves are none.

    Args:
      tree: the parameters, or anything like them.
      skip: layers to leave out: patterns of layer or leaf paths, or ``(leaf path, leaf) -> bool``.
      override: which axes are inputs and outputs, where name and shape do not tell.

    Raises:
      ValueError: for a pattern that matches no layer, or an ambiguous layout.
    """
    named = named_leaves(tree)
    places = {name: index for index, (name, _) in enumerate(named)}
    found: list[tuple[str, Layer]] = []
    for index, (name, leaf) in enumerate(named):
        parent, _, last = name.rpartition("/")
        if np.size(leaf) == 0 or has_word(last, EMBEDDING_WORDS):
            continue
        if callable(skip) and skip(name, leaf):
            continue
        axes = matrix_axes(name, leaf, override)
        if axes is None:
            continue
        bias = None
        if last == "kernel":
            place = places.get(f"{parent}/bias" if parent else "bias")
            wanted = tuple(leaf.shape[a] for a in (*axes.batch, *axes.outputs))
            if place is not None and np.shape(named[place][1]) == wanted:
                bias = place
        layer = (parent or "(root)") if last == "kernel" else name
        found.append((name, Layer(layer, index, bias, axes)))
    if callable(skip):
        return tuple(layer for _, layer in found)
    for pattern in skip:
        if named and not any(_matches(pattern, name, layer) for name, layer in found):
            names = [layer.name for _, layer in found]
            raise ValueError(f"skip: {pattern!r} matches none of the layers {names}")
    return tuple(
        layer
        for name, layer in found
        if not any(_matches(pattern, name, layer) for pattern in skip)
    )


def _matches(pattern: str, name: str, layer: Layer) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for path in (name, layer.name))


def stats_of(
    layer: Layer,
    kernel: Array,
    pair: Pair,
    layer_stats: Mapping[str, Mapping[str, Any]] | None,
    clip: Any,
) -> tuple[Array, Array]:
    """The two vectors of a layer, on every device, limited to ``clip``."""
    if layer_stats is None or layer.name not in layer_stats:
        given = "nothing" if layer_stats is None else sorted(layer_stats)
        raise ValueError(
            f"layer_stats lacks layer {layer.name!r} (it has {given}): call update(gradients, "
            "state, params, layer_stats=collect_layer_stats(...)), or name the layer in skip"
        )
    found = []
    for what, factor in (("a", pair.a), ("g", pair.g)):
        shape = factor.square.shape[:-1]
        if what not in layer_stats[layer.name] or np.shape(layer_stats[layer.name][what]) != shape:
            given = {name: np.shape(x) for name, x in layer_stats[layer.name].items()}
            raise ValueError(
                f"layer_stats[{layer.name!r}] must hold {what!r} of shape {shape}, got {given}"
            )
        v = jnp.asarray(layer_stats[layer.name][what], factor.square.dtype)
        found.append(whole(jnp.clip(v, -clip, clip), kernel))
    return found[0], found[1]


def example_stats(params: PyTree, grads: PyTree) -> dict[str, Any]:
    """Statistics for every layer, as large as its gradient."""
    rng = np.random.default_rng(0)
    stats = {}
    sizes = jax.tree.leaves(grads)
    leaves = jax.tree.leaves(params)
    for layer in find_layers(params):
        kernel = leaves[layer.kernel]
        batch, inputs, outputs = layer_shape(kernel, layer.axes)
        size = jnp.max(jnp.abs(sizes[layer.kernel])).astype(compute_dtype(kernel))
        stats[layer.name] = {
            "a": jnp.asarray(rng.normal(size=(*batch, inputs)), size.dtype),
            "g": size * jnp.asarray(rng.normal(size=(*batch, outputs)), size.dtype),
        }
    return {"layer_stats": stats}
