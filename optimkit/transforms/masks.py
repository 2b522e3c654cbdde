"""Masks of sparse layers: which entries of a weight are active at first, and how many.

A tree of masks is like the parameters: a bool array in the place of a sparse leaf, one True (or
None) in that of a dense one. All functions are pure.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import VECTOR_WORDS, named_leaves, select_leaves
from optimkit.leaves import check_structure
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import Array, LeafSelector, PyTree

METHODS = ("uniform", "ERK")


def erk_densities(
    shapes: Mapping[str, Sequence[int]], density: float, *, power_scale: float = 1.0
) -> dict[str, float]:
    r"""Densities of layers that give small and narrow ones more: Erdős-Rényi for kernels.

    .. math:: d_l = \min\Big(1, \epsilon \Big(\frac{\sum_i s_i}{\prod_i s_i}\Big)^{p}\Big)

    with the epsilon that leaves as many entries of all layers together as ``density`` says. Every
    axis of a kernel counts, so it does not matter in which order they stand.

    Args:
      shapes: ``{name: shape}`` of the sparse layers.
      density: share of all their entries that stays, in (0, 1].
      power_scale: p, >= 0; with 0 all layers have the same density.

    Returns:
      ``{name: density}``; 1 for layers that the formula would give more.

    Raises:
      ValueError: if an argument is out of range, or a layer has no entries.

    >>> found = erk_densities({"wide": (100, 100), "narrow": (100, 10)}, 0.1)
    >>> {name: round(value, 4) for name, value in found.items()}
    {'wide': 0.071, 'narrow': 0.3903}

    Reference: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv
    1911.11134.
    """
    check_range(density=density, gt=0, le=1)
    check_range(power_scale=power_scale, ge=0)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for name, size in sizes.items():
        if size == 0 or not len(shapes[name]):
            raise ValueError(f"shapes: {name!r} has shape {tuple(shapes[name])}, with no entries")
    raw = {name: (sum(shapes[name]) / sizes[name]) ** power_scale for name in shapes}
    free = dict.fromkeys(shapes)  # layers that are not dense, in order
    eps = 0.0
    while free:
        budget = sum(
            density * n if name in free else (density - 1) * n for name, n in sizes.items()
        )
        eps = budget / sum(raw[name] * sizes[name] for name in free)
        largest = max(raw[name] for name in free)
        if eps * largest <= 1:
            break
        free = {name: None for name in free if raw[name] != largest}
    return {name: float(eps * raw[name]) if name in free else 1.0 for name in shapes}


def leaf_masks(masks: PyTree, tree: PyTree, *, what: str, whole: bool = True) -> list[Any]:
    """The masks of a tree in the order of its leaves; None where a leaf has none.

    Args:
      masks: a tree like ``tree``, of arrays and None.
      tree: the parameters.
      what: the user's argument, for messages.
      whole: whether one number may stand for all entries of a leaf.

    Raises:
      ValueError: if the structure is another one, or a mask has another shape than its leaf.
    """
    structure = jax.tree.structure(tree)
    try:
        flat = structure.flatten_up_to(masks)
    except ValueError:
        check_structure(masks, tree, what=what, like="the parameters")
        raise
    for (name, leaf), mask in zip(named_leaves(tree), flat, strict=True):
        if mask is None or np.shape(mask) == np.shape(leaf) or (whole and np.shape(mask) == ()):
            continue
        raise ValueError(
            f"{what}: the mask of {name!r} has shape {np.shape(mask)}, the leaf {np.shape(leaf)}"
        )
    return flat


def init_masks(
    params: PyTree,
    density: float | Mapping[str, float],
    *,
    method: Literal["uniform", "ERK"] = "uniform",
    power_scale: float = 1.0,
    key: Array,
    sparse_leaves: LeafSelector = None,
) -> PyTree:
    """Random masks: every entry of a sparse leaf is active with the probability of its density.

    Args:
      params: arrays, or anything with their shapes.
      density: share of active entries, in (0, 1]; or ``{name: density}``, such as
        ``erk_densities`` gives: then the leaves that it names are the sparse ones.
      method: ``"uniform"``, one density for all, or ``"ERK"``, see ``erk_densities``.
      power_scale: of ERK.
      key: random key; every leaf draws for itself.
      sparse_leaves: which leaves are sparse (None, tree of bools, ``(path, leaf) -> bool``, or
        patterns). Default: rank two or more, but no biases or scales of stacked layers. Leaves of
        rank 0 or without entries are always dense.

    Returns:
      A tree like ``params``: bool arrays, one byte an entry, and one True for a dense leaf. The
      number of active entries is random; its mean is the density.

    Raises:
      ValueError: if an argument is out of range, or names no leaf.

    >>> params = {"kernel": jnp.zeros((100, 100)), "bias": jnp.zeros(100)}
    >>> masks = init_masks(params, 0.2, key=jax.random.key(0))
    >>> round(float(masks["kernel"].mean()), 1), bool(masks["bias"])
    (0.2, True)
    """
    check_choice(METHODS, method=method)
    leaves, structure = named_leaves(params), jax.tree.structure(params)
    if isinstance(density, Mapping):
        densities = _named_densities(density, params, sparse_leaves)
    else:
        check_range(density=density, gt=0, le=1)
        chosen = jax.tree.leaves(
            select_leaves(
                sparse_leaves, params, default=_sparse_by_default, argument="sparse_leaves"
            )
        )
        shapes = {
            name: np.shape(leaf)
            for (name, leaf), sparse in zip(leaves, chosen, strict=True)
            if sparse and _can_be_sparse(leaf)
        }
        densities = dict.fromkeys(shapes, density)
        if method == "ERK":
            densities = erk_densities(shapes, density, power_scale=power_scale)

    def draw(name: str, leaf: Array) -> Array:
        if name not in densities:
            return jnp.ones((), bool)
        uniform = jax.random.uniform(leaf_key(key, name), np.shape(leaf), jnp.float32)
        return mask_like(uniform < densities[name], name, leaf)

    return structure.unflatten([draw(name, leaf) for name, leaf in leaves])


def _sparse_by_default(name: str, leaf: Any) -> bool:
    return np.ndim(leaf) >= 2 and name.rsplit("/", 1)[-1].lower() not in VECTOR_WORDS


def _named_densities(density: Mapping[str, float], params: PyTree, chosen: Any) -> dict[str, float]:
    """Densities by the name of a leaf, checked; also from a nested tree of numbers."""
    if chosen is not None:
        raise ValueError("sparse_leaves: leave it out, for the densities name the sparse leaves")
    densities, leaves = dict(named_leaves(density)), dict(named_leaves(params))
    for name, value in densities.items():
        check_range(**{f"density of {name!r}": value}, gt=0, le=1)
        # An empty tree has nothing to name (optax.tree_map_params inits on one).
        if leaves and name not in leaves:
            raise ValueError(f"density: {name!r} is none of the leaves {sorted(leaves)}")
    return {n: d for n, d in densities.items() if n in leaves and _can_be_sparse(leaves[n])}


def _can_be_sparse(leaf: Any) -> bool:
    return np.ndim(leaf) > 0 and np.size(leaf) > 0


def leaf_key(key: Array, name: str) -> Array:
    """A random key for one leaf, whatever other leaves there are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def mask_like(mask: Array, name: str, leaf: Array) -> Array:
    """A mask as a bool array that lies where its leaf lies.

    Raises:
      ValueError: for a leaf that int32 cannot count.
    """
    if np.size(leaf) >= 2**31:
        raise ValueError(
            f"sparse_leaves: {name!r} of shape {np.shape(leaf)} has 2^31 entries or more, which "
            "int32 cannot count; leave it dense"
        )
    return jnp.ones_like(leaf, bool) & jnp.asarray(mask).astype(bool)


def apply_masks(tree: PyTree, masks: PyTree) -> PyTree:
    """Zeros where a mask is False; leaves without a mask, or with one True, as they are.

    Raises:
      ValueError: if the masks have another structure or other shapes.

    >>> apply_masks({"a": jnp.ones(3), "b": jnp.ones(1)}, {"a": jnp.arange(3) > 0, "b": None})["a"]
    Array([0., 1., 1.], dtype=float32)
    """
    flat, structure = jax.tree.flatten(tree)
    found = leaf_masks(masks, tree, what="masks")
    return structure.unflatten(
        [x if m is None else jnp.where(m, x, 0) for x, m in zip(flat, found, strict=True)]
    )
