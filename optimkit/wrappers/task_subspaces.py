"""Subspaces for one task after the other: each sees what no earlier task has used."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import widen, zero_count
from optimkit.matrices.frequent_directions import frequent_directions
from optimkit.matrices.side_by_side import map_side_by_side
from optimkit.matrices.subspace import leading_vectors, product
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    hyperparameter_dtype,
    next_count,
    safe_div,
)
from optimkit.protocols import Array, GradientTransformation, PyTree, transformation
from optimkit.wrappers.project_out import side_of, without_span
from optimkit.wrappers.projectors import (
    FROM_GRADIENT,
    first_projector,
    project,
    project_back,
    projector_rank,
)

OVERSAMPLE, POWER_STEPS = 8, 2
"""For projector ``"subspace"``: further columns to search in, passes over the matrix and back."""


class TaskSubspacesState(NamedTuple):
    """What is known of each matrix (..., in, out), whose projected side has d entries.

    ``count``: int32 scalar, steps of this task. ``projector``: (..., d, rank), zero until the
    task's first gradient. ``sketch``: (..., d, r), the directions of this task's gradients, each as
    long as it is frequent. ``history``: (..., d, capacity), directions of earlier tasks, then
    zeros. ``history_count``: int32 (...), how many there were; those that are more than the
    capacity found no room. ``threshold``: scalar. ``inner_state``: of projected gradients.
    """

    count: Array
    projector: PyTree
    sketch: PyTree
    history: PyTree
    history_count: PyTree
    threshold: Array
    inner_state: PyTree


def in_task_subspaces(
    inner: optax.GradientTransformation,
    *,
    proj_rank: int,
    sketch_rank: int,
    sketch_decay: Any,
    update_proj_gap: int,
    threshold: Any,
    history_capacity: int | None,
    projected_axis: Literal["in", "out"],
    projector: Literal["svd", "gram", "subspace"],
) -> GradientTransformation:
    """Runs ``inner`` on gradients in their leading directions outside the history.

    All leaves must be matrices, or stacks of them. The state of ``inner`` must begin with zeros, as
    Adam's does. The other arguments are those of ``optimkit.coso``.

    Raises:
      ValueError: if an argument is out of range.
    """
    side = side_of(projected_axis)
    check_count(proj_rank=proj_rank, sketch_rank=sketch_rank, least=1)
    check_count(update_proj_gap=update_proj_gap, least=1)
    check_range(threshold=threshold, sketch_decay=sketch_decay, ge=0, le=1)
    check_choice(FROM_GRADIENT, projector=projector)
    if history_capacity is not None:
        check_count(history_capacity=history_capacity, least=1)
        if history_capacity < sketch_rank:
            raise ValueError(
                f"history_capacity must be >= sketch_rank, for one task may fill so many columns: "
                f"got {history_capacity} and {sketch_rank}"
            )

    def held(leaf: Array, columns: int | None) -> Array:
        """Empty columns for the projected side of a leaf, no more than it has directions."""
        d = leaf.shape[side - 2]
        width = d if columns is None else min(columns, d)
        return jnp.zeros_like(first_projector(leaf, side, width))

    def init(params: PyTree) -> TaskSubspacesState:
        params = widen(params)

        def columns(number: int | None) -> PyTree:
            return jax.tree.map(lambda leaf: held(leaf, number), params)

        projectors = jax.tree.map(
            lambda leaf: held(leaf, projector_rank(leaf.shape, proj_rank, projector)), params
        )
        low = jax.tree.map(lambda x, p: project(x, [p], [side]), params, projectors)
        return TaskSubspacesState(
            zero_count(),
            projectors,
            columns(sketch_rank),
            columns(history_capacity),
            jax.tree.map(lambda leaf: jnp.zeros_like(held(leaf, 1)[..., 0, 0], jnp.int32), params),
            jnp.asarray(threshold, hyperparameter_dtype()),
            inner.init(low),
        )

    def update(
        updates: PyTree, state: TaskSubspacesState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, TaskSubspacesState]:
        del params
        leaves, structure = jax.tree.flatten(widen(updates))
        projectors, sketches, history = map(structure.flatten_up_to, state[1:4])
        leaves = [without_span(g, h, side) for g, h in zip(leaves, history, strict=True)]

        def renewed() -> tuple[list[Array], list[Array]]:
            oriented = [g if side == 0 else jnp.swapaxes(g, -2, -1) for g in leaves]
            groups = list(zip(oriented, projectors, sketches, strict=True))
            found = map_side_by_side(decomposed, groups, jnp.asarray(sketch_decay), state.count)
            return (
                [without_span(p, h, 0) for (p, _), h in zip(found, history, strict=True)],
                [sketch for _, sketch in found],
            )

        def kept() -> tuple[list[Array], list[Array]]:
            return projectors, sketches

        if update_proj_gap == 1:
            projectors, sketches = renewed()
        else:
            now = state.count % update_proj_gap == 0
            projectors, sketches = jax.lax.cond(now, renewed, kept)
        low = [project(g, [p], [side]) for g, p in zip(leaves, projectors, strict=True)]
        moved, inner_state = inner.update(structure.unflatten(low), state.inner_state, **extra)
        steps = [
            project_back(n, [p], [side], g)
            for n, p, g in zip(structure.flatten_up_to(moved), projectors, leaves, strict=True)
        ]
        return structure.unflatten(steps), state._replace(
            count=next_count(state.count),
            projector=structure.unflatten(projectors),
            sketch=structure.unflatten(sketches),
            threshold=jnp.asarray(threshold, state.threshold.dtype),
            inner_state=inner_state,
        )

    def decomposed(
        g: Array, p: Array, sketch: Array, decay: Array, count: Array
    ) -> tuple[Array, Array]:
        """New projectors and sketches of (batch, d, other); the old ones where it is not finite."""
        method: Any = "svd" if projector == "svd" else "gram"
        directions = frequent_directions(sketch_rank, decay.astype(g.dtype), method=method)
        most = max(p.shape[-1], sketch_rank + 1)
        vectors, values = leading(g, most, count)
        added = directions.insert_directions(sketch, vectors, values)
        finite = jnp.all(jnp.isfinite(vectors), axis=(-2, -1), keepdims=True)
        new = jnp.where(finite, vectors[..., : p.shape[-1]], p)
        return new, jnp.where(finite, added, sketch)

    def leading(g: Array, most: int, count: Array) -> tuple[Array, Array]:
        if projector != "subspace":
            return leading_vectors(g, most, projector)
        key = jax.random.fold_in(jax.random.key(0), count)
        start = jax.random.normal(key, (g.shape[-2], most + OVERSAMPLE), jnp.float32)
        start = jnp.broadcast_to(start.astype(g.dtype), (*g.shape[:-2], *start.shape))
        wide = most + OVERSAMPLE
        vectors, values = leading_vectors(g, wide, "subspace", start=start, power_steps=POWER_STEPS)
        return vectors[..., :most], values[..., :most]

    return transformation(init, update)


def task_ended(state: TaskSubspacesState) -> TaskSubspacesState:
    """The state for the next task: a longer history, and all else as at the start."""
    sketches, structure = jax.tree.flatten(state.sketch)
    extended = [
        _with_task(history, count, sketch, state.threshold)
        for history, count, sketch in zip(
            jax.tree.leaves(state.history),
            jax.tree.leaves(state.history_count),
            sketches,
            strict=True,
        )
    ]
    fresh = jax.tree.map(jnp.zeros_like, state)
    return fresh._replace(
        history=structure.unflatten([history for history, _ in extended]),
        history_count=structure.unflatten([count for _, count in extended]),
        threshold=state.threshold,
    )


def _with_task(
    history: Array, count: Array, sketch: Array, threshold: Array
) -> tuple[Array, Array]:
    """A history (..., d, capacity) with the leading directions of a sketch, and their number."""
    basis, sigma = frequent_directions(sketch.shape[-1]).basis(sketch)
    energy = jnp.square(safe_div(sigma, sigma[..., :1]))
    share = safe_div(jnp.cumsum(energy, -1), jnp.sum(energy, -1, keepdims=True))
    joins = (share < threshold) & (sigma > 0)
    # Column i goes to place count + i; what has no place there is lost.
    place = (count[..., None] + _numbered(joins.shape))[..., None]
    at = place == _numbered((*joins.shape, history.shape[-1]))
    at = (at & joins[..., None]).astype(history.dtype)
    new = without_span(basis.astype(history.dtype), history, 0)
    return history + product(new, at), count + jnp.sum(joins, -1, dtype=count.dtype)


def _numbered(shape: tuple[int, ...]) -> Array:
    """The numbers of the places along the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
