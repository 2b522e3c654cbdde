"""Projectors: which subspace a matrix is projected on, and the products that go in and out of it.

A projector is a (d, rank) array for one side of a matrix: side 0 has d inputs, side 1 d outputs
(kernels are (in, out)). Leaves of more axes are stacks of matrices in their last two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import named_leaves, select_leaves
from optimkit.matrices import placement
from optimkit.matrices.side_by_side import map_side_by_side, whole_matrices
from optimkit.matrices.subspace import (
    canonical_signs,
    leading_vectors,
    orthonormal_columns,
    product,
    range_finder,
)
from optimkit.numerics import check_choice, check_count, compute_dtype
from optimkit.protocols import Array, LeafSelector, PyTree

OneSided: TypeAlias = Literal["std", "reverse_std", "left", "right"]
ProjType: TypeAlias = Literal["std", "reverse_std", "left", "right", "full"]
ProjectorFn: TypeAlias = Callable[[Array, int, int, Array, str], Array]
"""``(gradient, rank, side, refresh_index, path) -> projector``; the index may be traced."""

ONE_SIDED = ("std", "reverse_std", "left", "right")
PROJ_TYPES = (*ONE_SIDED, "full")
FROM_GRADIENT = ("svd", "gram", "subspace")
FROM_KEY = ("random", "gaussian")
PROJECTORS = (*FROM_GRADIENT, *FROM_KEY)


def projected_sides(shape: Sequence[int], proj_type: str) -> tuple[int, ...]:
    """The sides of an (..., in, out) kernel that are projected: 0 for inputs, 1 for outputs.

    ``"std"`` projects the smaller side, and the inputs of a square matrix; ``"reverse_std"`` the
    other one; ``"right"`` the inputs and ``"left"`` the outputs (the authors' kernels are
    (out, in)); ``"full"`` both.

    >>> [projected_sides(shape, "std") for shape in ((8, 12), (14, 8), (5, 5))]
    [(0,), (1,), (0,)]
    """
    rows, cols = shape[-2:]
    if proj_type in ("right", "left"):
        return (0,) if proj_type == "right" else (1,)
    if proj_type == "full":
        return (0, 1)
    return (0,) if (rows <= cols) == (proj_type == "std") else (1,)


def select_matrices(lowrank_leaves: LeafSelector, tree: PyTree) -> PyTree:
    """A tree of bools: which leaves are projected; by default all of rank two. Empty ones are not.

    Raises:
      ValueError: for a chosen leaf that is no matrix.
    """
    chosen = select_leaves(
        lowrank_leaves, tree, default=lambda _, leaf: np.ndim(leaf) == 2, argument="lowrank_leaves"
    )
    for (name, leaf), is_low in zip(named_leaves(tree), jax.tree.leaves(chosen), strict=True):
        if is_low and np.ndim(leaf) < 2:
            raise ValueError(
                f"lowrank_leaves: leaf {name!r} of shape {np.shape(leaf)} is no matrix"
            )
    return jax.tree.map(lambda is_low, leaf: is_low and np.size(leaf) > 0, chosen, tree)


def projector_rank(shape: Sequence[int], rank: int, projector: str | ProjectorFn) -> int:
    """The columns of a projector: ``rank``, and no more than the smaller side has directions.

    Gaussian columns need not be orthogonal, so that there may be any number of them.
    """
    return rank if projector == "gaussian" else min(rank, *shape[-2:])


def compute_projector(
    g2d: Array,
    rank: int,
    axis: int,
    method: str = "svd",
    *,
    key: Array | None = None,
    previous: Array | None = None,
    oversample: int = 8,
    power_iters: int = 1,
) -> jax.Array:
    """The projector (..., d, rank) of one matrix, or a stack of them, along one of its sides.

    Args:
      g2d: shape (..., in, out).
      rank: columns, >= 1; clamped to the smaller side, except for ``"gaussian"``.
      axis: the projected side: 0 the inputs, 1 the outputs.
      method: ``"svd"``: leading singular vectors. ``"gram"``: the same from the eigenvectors of the
        smaller Gram matrix, some four times as fast; directions below 3e-4 of the largest singular
        value are lost in f32. ``"subspace"``: a randomised range finder, or subspace iteration from
        ``previous``; faster still, and not quite the leading vectors. ``"random"``: orthonormal
        and random. ``"gaussian"``: entries of variance 1/rank, not orthonormal.
      key: a random key, for the last three.
      previous: for ``"subspace"``, an earlier projector (..., d, rank) to go on from.
      oversample: for ``"subspace"``, random columns beside those that are kept.
      power_iters: for ``"subspace"``, passes over the matrix and back, >= 1.

    Returns:
      A projector, f32 at least. Its columns are orthonormal (not Gaussian ones), in falling order
      of the singular values, and the entry of largest magnitude in each is positive.

    Raises:
      ValueError: for an unknown method, a count out of range, or a missing key.

    >>> p = compute_projector(jnp.diag(jnp.array([1.0, -3.0])), 1, 0)
    >>> p[:, 0].tolist()
    [0.0, 1.0]
    """
    check_choice(PROJECTORS, method=method)
    check_count(rank=rank, power_iters=power_iters, least=1)
    check_count(oversample=oversample)
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0, the inputs, or 1, the outputs, got {axis!r}")
    if key is None and method not in ("svd", "gram"):
        raise ValueError(f"method {method!r} draws random numbers: it needs key")
    x = jnp.asarray(g2d, compute_dtype(g2d))
    x = x if axis == 0 else jnp.swapaxes(x, -2, -1)
    rank = projector_rank(x.shape, rank, method)
    if method in FROM_KEY:
        return _drawn(key, (*x.shape[:-1], rank), method, x.dtype)
    start = None
    if method == "subspace":
        drawn = _random_columns(key, x.shape, rank + oversample, x.dtype)
        start = _start(x, drawn, previous, previous is None)
    return _leading(x, rank, method, start, power_iters)


def _drawn(key: Any, shape: Sequence[int], method: str, dtype: Any) -> jax.Array:
    """A random projector of the given shape. Drawn in f32: every dtype gets the same numbers."""
    drawn = jax.random.normal(key, shape, jnp.float32).astype(dtype)
    if method == "random":
        return canonical_signs(orthonormal_columns(drawn))
    return drawn / shape[-1] ** 0.5


def _random_columns(key: Any, shape: Sequence[int], width: int, dtype: Any) -> jax.Array:
    width = min(width, *shape[-2:])
    return jax.random.normal(key, (shape[-2], width), jnp.float32).astype(dtype)


def _start(x: Array, drawn: Array, previous: Array | None, first: Any) -> jax.Array:
    """Where subspace iteration starts: ``previous`` beside random columns, or those alone.

    One draw serves all matrices of a stack.
    """
    drawn = jnp.broadcast_to(drawn, (*x.shape[:-2], *drawn.shape))
    if previous is None:
        return drawn
    rank = previous.shape[-1]
    kept = jnp.where(first, drawn[..., :rank], previous)
    return jnp.concatenate([kept, drawn[..., rank:]], axis=-1)


def _leading(x: Array, rank: int, method: Any, start: Array | None, power_iters: int) -> jax.Array:
    """Leading left singular vectors of (..., d, other), or nearly."""
    if start is None:
        return leading_vectors(x, rank, method)[0]
    found = range_finder(x, start.shape[-1], start=start, power_steps=power_iters)
    inner, _ = leading_vectors(product(jnp.swapaxes(found, -2, -1), x), rank, "gram")
    return canonical_signs(product(found, inner))


# ---------------------------------------------------------------------------------------------
# Many at once
# ---------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One side of a projected leaf, for which a new projector is wanted.

    ``number`` is the place of the leaf in its tree, ``refresh`` says how many refreshes were before
    this one (int32), ``previous`` is the projector (..., d, rank) in force.
    """

    number: int
    path: str
    gradient: Array
    axis: int
    previous: Array
    refresh: Array


class ProjectorRule(NamedTuple):
    """How projectors are chosen; the names are those of ``project_low_rank``."""

    projector: str | ProjectorFn
    rank: int
    oversample: int = 8
    power_iters: int = 1
    seed: int = 0


def new_projectors(rule: ProjectorRule, sides: Sequence[Side]) -> list[Array]:
    """New projectors for several sides; matrices of one size go through one batched kernel.

    On a mesh each device decomposes its share of the matrices. Where a projector comes out
    non-finite, because the gradient was, the previous one stays.

    Raises:
      ValueError: if a projector function returns another shape than (..., d, rank).
    """
    found: dict[int, Array] = {}
    groups: dict[Hashable, list[int]] = {}
    for place, side in enumerate(sides):
        if callable(rule.projector):
            found[place] = jnp.asarray(
                rule.projector(side.gradient, rule.rank, side.axis, side.refresh, side.path)
            )
        elif rule.projector in FROM_KEY:
            previous = side.previous
            found[place] = _drawn(_key(rule, side), previous.shape, rule.projector, previous.dtype)
        else:
            x = _oriented(side)
            groups.setdefault((x.shape[-2:], x.dtype, side.previous.shape[-1]), []).append(place)
    for places in groups.values():
        new = _together(rule, [sides[place] for place in places])
        found |= dict(zip(places, new, strict=True))
    return [_settled(found[place], side) for place, side in enumerate(sides)]


def _key(rule: ProjectorRule, side: Side) -> jax.Array:
    leaf = jax.random.fold_in(jax.random.key(rule.seed), 2 * side.number + side.axis)
    return jax.random.fold_in(leaf, side.refresh)


def _oriented(side: Side) -> Array:
    """The gradient with its projected side first."""
    return side.gradient if side.axis == 0 else jnp.swapaxes(side.gradient, -2, -1)


def _settled(new: Array, side: Side) -> Array:
    """The new projector where it is finite, in dtype and place of the old one."""
    previous = side.previous
    if new.shape != previous.shape:
        raise ValueError(
            f"projector gave shape {new.shape} for side {side.axis} of leaf {side.path!r} of shape "
            f"{side.gradient.shape}; it must give {previous.shape}"
        )
    new = placement.place_like(new.astype(previous.dtype), previous)
    return jnp.where(jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True), new, previous)


def _together(rule: ProjectorRule, sides: Sequence[Side]) -> list[Array]:
    """New projectors of sides that all have one size, from their gradients."""
    warm = rule.projector == "subspace"
    first, rank = sides[0], sides[0].previous.shape[-1]
    if not warm:

        def leading(x: Array) -> list[Array]:
            return [_leading(x, rank, rule.projector, None, rule.power_iters)]

        return [new for [new] in map_side_by_side(leading, [[_oriented(side)] for side in sides])]
    shape, dtype = _oriented(first).shape, first.previous.dtype
    drawn = _random_columns(_key(rule, first), shape, rank + rule.oversample, dtype)

    def iterated(x: Array, previous: Array, drawn: Array, refresh: Array) -> list[Array]:
        start = _start(x, drawn, previous, refresh == 0)
        return [_leading(x, rank, rule.projector, start, rule.power_iters)]

    groups = [[_oriented(side), side.previous] for side in sides]
    found = map_side_by_side(iterated, groups, drawn, jnp.asarray(first.refresh))
    return [new for [new] in found]


# ---------------------------------------------------------------------------------------------
# In and out of the subspace
# ---------------------------------------------------------------------------------------------


def first_projector(leaf: Array, axis: int, rank: int) -> jax.Array:
    """Unit vectors (..., d, rank): what a projector is before the first refresh."""
    dtype = compute_dtype(leaf)
    # Made from the leaf, so that each layer of a stack lies where the leaf has it.
    zeros = whole_matrices(jnp.zeros_like(leaf, dtype=dtype))[..., :1, :1]
    eye = jnp.eye(leaf.shape[axis - 2], rank, dtype=dtype)
    return zeros + jnp.expand_dims(eye, tuple(range(leaf.ndim - 2)))


def project(x: Array, projectors: Sequence[Array], sides: Sequence[int]) -> Array:
    """The coordinates of (..., in, out) in the subspace: :math:`P^T X`, :math:`X P` or both."""
    for p, side in zip(projectors, sides, strict=True):
        equation = "...dk,...dr->...rk" if side == 0 else "...kd,...dr->...kr"
        x = _einsum(equation, x, p, side, gathered=True, names=_names(x, side))
    return x


def project_leaves(
    tree: PyTree, projectors: Sequence[Sequence[Array]], sides: Sequence[Sequence[int]]
) -> PyTree:
    """A tree in the subspaces of its leaves; those without a projected side as they are."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(project, leaves, projectors, sides))


def project_back(x: Array, projectors: Sequence[Array], sides: Sequence[int], like: Array) -> Array:
    """The inverse way, to the shape (and on an explicit mesh, the place) of ``like``."""
    for p, side in zip(projectors, sides, strict=True):
        equation = "...rk,...dr->...dk" if side == 0 else "...kr,...dr->...kd"
        x = _einsum(equation, x, p, side, gathered=False, names=_names(like, side))
    return x


def _names(x: Array, side: int) -> tuple[str, ...]:
    """The mesh axes that divide one side of a leaf."""
    return placement.spec_of(x)[side - 2] if placement.explicit_axes(x) else ()


def _einsum(
    equation: str, x: Array, p: Array, side: int, *, gathered: bool, names: tuple[str, ...]
) -> Array:
    """A product along one side; on an explicit mesh devices keep their parts of that side."""
    if not placement.explicit_axes(x):
        return jnp.einsum(equation, x, p, precision="highest")
    spec = list(placement.spec_of(x))
    p = placement.walk(p, (*spec[:-2], names, ()))
    spec[side - 2] = () if gathered else names
    place = placement.sharding(jax.typeof(x).sharding.mesh, tuple(spec))
    return jnp.einsum(equation, x, p, precision="highest", out_sharding=place)
