"""Sparse momentum: the wrapped transformation sees, stores and moves a random subset of entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import is_hidden_matrix, named_leaves, select_leaves
from optimkit.leaves import check_match, check_real, zero_count
from optimkit.matrices.placement import gather, place_like
from optimkit.numerics import check_count, check_range, due, next_count
from optimkit.protocols import (
    Array,
    GradientTransformation,
    LeafSelector,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.masks import leaf_masks
from optimkit.wrappers.momentum_reset import momentum_reset

SparseMaskFn = Callable[[PyTree, Array, Array], PyTree]
"""``(params, refresh_index, key) -> tree of bool masks``, None where the leaf is dense."""


class SparseMomentumState(NamedTuple):
    """``inner_state`` knows the kept entries only; ``count`` is an int32 scalar.

    ``index`` holds the sorted positions of the kept entries in the place of each sparse leaf, and a
    0-d zero in that of a dense one.
    """

    count: Array
    index: PyTree
    inner_state: PyTree


def kept_entries(size: int, density: float) -> int:
    """How many entries of a leaf are kept: ``int(density * size)``, and at least one."""
    return max(1, int(density * size))


def gather_entries(x: Array, index: Array) -> Array:
    """The entries of ``x`` at flat positions; positions past the end read zero."""
    # Positions in a flattened leaf mean nothing to one shard of it.
    return gather(x).reshape(-1).at[index].get(mode="fill", fill_value=0)


def scatter_entries(kept: Array, index: Array, like: Array) -> Array:
    """The inverse of ``gather_entries``: the entries at their places, zeros elsewhere."""
    flat = jnp.zeros(like.size, kept.dtype)
    flat = flat.at[index].set(
        kept, mode="drop", unique_indices=True, indices_are_sorted=True, wrap_negative_indices=False
    )
    return place_like(flat.reshape(like.shape), like)


def random_index(key: Array, size: int, count: int) -> Array:
    """``count`` distinct positions out of ``size``, sorted."""
    drawn = jax.random.choice(key, size, (count,), replace=False)
    return jnp.sort(drawn).astype(jnp.int32)


def mask_index(mask: Array, count: int) -> Array:
    """The positions of a mask's True entries, ``count`` of them.

    Where the mask has fewer, the rest lie past the end; where it has more, the last are left out.
    """
    flat = jnp.reshape(mask, -1)
    found = jnp.nonzero(flat, size=count, fill_value=flat.size)[0]
    return jnp.where(found < flat.size, found, flat.size + jnp.arange(count)).astype(jnp.int32)


def sparse_momentum(
    inner: optax.GradientTransformation,
    density: float = 0.5,
    interval: int = 500,
    *,
    sparse_leaves: LeafSelector = None,
    sparse_mask_fn: SparseMaskFn | None = None,
    seed: int = 0,
) -> GradientTransformation:
    """Runs ``inner`` on a random subset of each matrix's entries; the others do not move.

    Of a sparse leaf of n entries, k = int(density n) (at least 1) are kept: the inner
    transformation sees their gradients as a vector of length k, stores k values where it would
    store n, and its updates go back to their places. The subset is drawn at step 1 and drawn anew
    at steps D, 2D, ... (from 1).

    Args:
      inner: any elementwise transformation. Its moments belong to the entries kept so far, so it
        must forget them whenever the subset changes: ``momentum_reset(..., interval,
        moments="before")`` with the same ``interval``. What is not sparse it sees as it is.
      density: share of entries kept, in (0, 1].
      interval: D, steps between two draws; 0: one draw for the whole run.
      sparse_leaves: which leaves are sparse (None, tree of bools, ``(path, leaf) -> bool``, or
        patterns). Default: matrices of rank 2 other than embeddings and heads, which is what the
        authors pick by module name.
      sparse_mask_fn: ``(params, refresh_index, key) -> tree of bool masks``, None where a leaf is
        dense, in place of the random draw; refresh r is used at steps t with t // D = r. Masks
        should have exactly k True entries: further ones are left out.
      seed: of the random draws; each leaf and each refresh draws afresh.

    Returns:
      A transformation; for k entries it keeps 4 k bytes beside what ``inner`` keeps for them. With
      an Adam core that is 3 bytes a parameter at density 0.25, where Adam keeps 8.

    Raises:
      ValueError: if an argument is out of range, a gradient or mask has another shape, a pattern
        matches no leaf, or a sparse leaf has 2^30 entries or more.

    A sparse leaf that is sharded is gathered to every device in each step.

    >>> import jax.numpy as jnp, optax
    >>> tx = sparse_momentum(momentum_reset(optax.trace(0.9), 10), 0.25, 10)
    >>> params = {"kernel": jnp.zeros((4, 4))}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"kernel": jnp.ones((4, 4))}, state, params)
    >>> int(updates["kernel"].sum()), state.inner_state.inner_state.trace["kernel"].shape
    (4, (4,))

    Reference: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
    ICLR 2025, arXiv 2501.06842. The authors draw later masks by coin flips of probability
    ``density``; an exact number keeps shapes fixed.
    """
    check_range(density=density, gt=0, le=1)
    check_count(interval=interval)
    inner = optax.with_extra_args_support(inner)

    def is_sparse_by_default(name: str, leaf: Any) -> bool:
        return np.ndim(leaf) == 2 and is_hidden_matrix(name, leaf)

    def empty_index(leaf: Array, chosen: bool) -> Array:
        if not chosen or np.size(leaf) == 0:
            return zero_count()
        if np.size(leaf) >= 2**30:
            raise ValueError(
                f"sparse_leaves: a leaf of shape {np.shape(leaf)} has 2^30 entries or more, "
                "which int32 positions cannot number; leave it dense"
            )
        return jnp.zeros(kept_entries(np.size(leaf), density), jnp.int32)

    def init(params: PyTree) -> SparseMomentumState:
        chosen = select_leaves(
            sparse_leaves, params, default=is_sparse_by_default, argument="sparse_leaves"
        )
        index = jax.tree.map(empty_index, params, chosen)
        kept = jax.tree.map(
            lambda p, i: jnp.zeros(i.shape, jnp.result_type(p)) if i.ndim else p, params, index
        )
        return SparseMomentumState(zero_count(), index, inner.init(kept))

    def draw(params: PyTree, index: PyTree, refresh: Array) -> PyTree:
        """The positions of refresh number ``refresh``; ``index`` says how many of which leaf."""
        key = jax.random.fold_in(jax.random.key(seed), refresh)
        flat, structure = jax.tree.flatten(index)
        leaves = named_leaves(params)
        masks: list[Any] = [None] * len(flat)
        if sparse_mask_fn is not None:
            given = sparse_mask_fn(params, refresh, key)
            masks = leaf_masks(given, params, what="sparse_mask_fn")

        def one(number: int, old: Array) -> Array:
            if not old.ndim:
                return old
            (name, leaf), mask = leaves[number], masks[number]
            if sparse_mask_fn is None:
                return random_index(jax.random.fold_in(key, number), leaf.size, old.size)
            if not np.ndim(mask):
                raise ValueError(f"sparse_mask_fn: {name!r} is sparse, but gets no mask of its own")
            return mask_index(mask, old.size)

        return structure.unflatten([one(number, old) for number, old in enumerate(flat)])

    def update(
        updates: PyTree,
        state: SparseMomentumState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, SparseMomentumState]:
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        step = next_count(state.count)
        refresh = step // interval if interval else jnp.zeros((), jnp.int32)
        index = jax.lax.cond(
            due(step, interval) | (step == 1),
            lambda: draw(updates if params is None else params, state.index, refresh),
            lambda: state.index,
        )

        def kept(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda i, x: gather_entries(x, i) if i.ndim else x, index, tree)

        moved, inner_state = inner.update(
            kept(updates),
            state.inner_state,
            None if params is None else kept(params),
            **extra,
        )
        updates = jax.tree.map(
            lambda i, u, g: scatter_entries(u, i, g) if i.ndim else u, index, moved, updates
        )
        return updates, SparseMomentumState(step, index, inner_state)

    return transformation(init, update)


RECORD = Method(
    factory=sparse_momentum,
    kind="wrapper",
    summary="keep and move a random subset of each matrix's entries",
    example={"density": 0.25, "interval": 3},
    example_made={"inner": lambda: momentum_reset(scale_by_adam(), 3)},
    static=("inner", "density", "interval", "sparse_leaves", "sparse_mask_fn", "seed"),
    position="any",
    communication="gather",
    response="bounded",
    state_bytes=3,
    moved_bytes=18,
    paper='Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", '
    "ICLR 2025, arXiv 2501.06842",
    reference="TianjinYellow/SPAM-Optimizer@e8185fbe695fdc449953b4a1f96121df5bf0d268:"
    "galore_torch/SPAM.py:AdamW",
    licence="",
)
