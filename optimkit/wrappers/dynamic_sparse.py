"""Dynamic sparse training: weights outside a mask are zero, and the masks move while one trains."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import named_leaves
from optimkit.leaves import (
    check_match,
    check_real,
    narrow_like,
    require_params,
    widen,
    zero_count,
)
from optimkit.numerics import as_float, check_choice, check_count, check_range, due, next_count
from optimkit.protocols import (
    PARAMETER_FIELDS,
    Array,
    GradientTransformation,
    LeafSelector,
    Method,
    PyTree,
    transformation,
)
from optimkit.schedules.shapes import half_cosine
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.masks import METHODS, init_masks, leaf_masks, mask_like
from optimkit.transforms.move_masks import GROWTHS, Growth, update_masks
from optimkit.wrappers.inner_moments import inner_moments, mask_moments, momentum_of


class DynamicSparseState(NamedTuple):
    """``count``: int32 scalar. ``inner_state``: state of the wrapped one, dense.

    ``masks``: bool, True = active, in the place of each sparse leaf, and one True in that of a
    dense one. ``fired``: the same, entries ever active; None unless growth needs it.
    """

    count: Array
    masks: PyTree
    fired: PyTree | None
    inner_state: PyTree


def drop_rate_at(step: Any, total_steps: int, first: Any = 0.5, final: Any = 0.005) -> Array:
    """The share of active weights that a 1-based step drops: half a cosine from first to final.

    >>> [round(float(drop_rate_at(t, total_steps=100)), 4) for t in (0, 50, 100)]
    [0.5, 0.2525, 0.005]
    """
    return final + (first - final) * half_cosine(as_float(step) / total_steps)


def dynamic_sparse(
    inner: optax.GradientTransformation,
    *,
    density: float = 0.2,
    sparse_init: Literal["uniform", "ERK"] | PyTree = "uniform",
    growth: Growth = "random",
    drop: Literal["magnitude"] = "magnitude",
    drop_rate: Any = 0.5,
    drop_rate_final: Any = 0.005,
    total_steps: int,
    update_every: int = 400,
    sparse_leaves: LeafSelector = None,
    frozen: PyTree | None = None,
    mask_inner_moments: bool | None = None,
    exact_growth: bool = False,
    seed: int = 0,
) -> GradientTransformation:
    r"""Trains a sparse subnetwork whose mask moves: small weights make room for others.

    .. math::

        w \leftarrow (w + u) \odot M; \qquad \text{every n steps } M \leftarrow
            \text{keep the larger weights, grow as many others}, \quad w \leftarrow w \odot M

    The share of active weights that is dropped falls by half a cosine, see ``drop_rate_at``; what
    is dropped and grown, leaf by leaf, says ``update_masks``.

    Args:
      inner: a whole optimizer, with its rate. It sees dense gradients, taken at the masked weights.
      density: share of active entries, in (0, 1].
      sparse_init: the first masks: ``"uniform"`` or ``"ERK"`` (see ``init_masks``), or
        ``{name: density}``, or a tree of masks like the parameters, None where a leaf is dense.
      growth: ``"random"``, ``"random_unfired"``, ``"gradient"``, ``"momentum"`` or ``"none"``, see
        ``update_masks``. Momentum is the inner state's ``mu / (sqrt(nu) + 1e-8)`` after this step,
        or its ``trace`` or ``mu`` alone.
      drop: ``"magnitude"``: the smallest weights.
      drop_rate: share of active weights dropped at the start, in [0, 1].
      drop_rate_final: the same after ``total_steps``, where the cosine has its minimum; later it
        rises again.
      total_steps: length of the cosine, >= 1: the steps of the whole run.
      update_every: n; masks move at steps n, 2n, ... (from 1). 0: they never do.
      sparse_leaves: which leaves are sparse (None, tree of bools, ``(path, leaf) -> bool``, or
        patterns). Default: rank two or more, but no biases or scales of stacked layers. Explicit
        densities or masks say it themselves.
      frozen: a tree like the parameters, of bool arrays or single bools, True = frozen, None = not:
        for weights of earlier tasks. The inner transformation sees no gradient of them; they stay
        as they are, bit for bit, whatever mask and weight decay say, and are neither dropped nor
        grown. (The authors' code may drop them, and fills them in again after the task.)
      mask_inner_moments: zero the inner moments outside the masks. None: fields named ``trace``,
        as the authors do, but not Adam's moments; True: all moments; False: none.
      exact_growth: let random growth take exactly as many entries as were dropped.
      seed: of the random masks; each leaf and each step draws afresh.

    Returns:
      An optimizer that needs ``params``. ``state.masks`` takes one byte an entry of a sparse leaf
      (and ``fired`` another, with ``"random_unfired"``) beside what ``inner`` keeps, which is
      dense: masks alone save no memory.

    Raises:
      ValueError: if an argument is out of range or unknown, params are missing, a gradient, mask or
        frozen tree has another structure or shape, or ``inner`` keeps no momentum to grow by.
      TypeError: for complex or integer leaves.

    Weights outside the masks become exact zeros with the first update; start from
    ``apply_masks(params, state.masks)`` so that the first gradient is one of the sparse network.
    Grown weights start at 0, but one that was dropped and grown in the same step keeps its value.
    With masked momentum (``trace``) growth by momentum prefers just those. With a zero gradient
    (dead units) growth by gradient takes the first entries in order. Updates and masks are stored
    before they are used: a CPU takes 9 bytes a f32 parameter of temporary memory around SGD, 13
    around Adam. Inside ``shard_map`` each device must hold whole leaves.

    For a next task, build a new one with ``frozen`` = the entries used so far and another seed:
    with the same one, the entries to grow would be those that are frozen. An old task is evaluated
    with ``apply_masks`` and the masks of its time.

    >>> import jax.numpy as jnp, optax
    >>> masks = {"w": jnp.array([True, True, False, False])}
    >>> tx = dynamic_sparse(optax.sgd(0.1), sparse_init=masks, growth="gradient", total_steps=2,
    ...                     drop_rate_final=0.5, update_every=2)
    >>> params = {"w": jnp.array([1.0, 0.1, 0.0, 0.0])}; state = tx.init(params)
    >>> for _ in range(2):
    ...     grads = {"w": jnp.array([0.0, 0.0, 1.0, 2.0])}
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> state.masks["w"].tolist(), params["w"].tolist()
    ([True, False, False, True], [1.0, 0.0, 0.0, 0.0])

    Reference: Yildirim et al., "Continual Learning with Dynamic Sparse Training: Exploring
    Algorithms for Effective Model Updates", CPAL 2024, arXiv 2308.14831. The authors' initial masks
    and random growth draw each entry on its own, so that numbers vary; ``exact_growth`` fixes them.
    """
    check_range(density=density, gt=0, le=1)
    check_range(drop_rate=drop_rate, drop_rate_final=drop_rate_final, ge=0, le=1)
    check_count(least=1, total_steps=total_steps)
    check_count(update_every=update_every)
    check_choice(GROWTHS, growth=growth)
    check_choice(("magnitude",), drop=drop)
    if isinstance(sparse_init, str):
        check_choice(METHODS, sparse_init=sparse_init)
    elif sparse_leaves is not None:
        raise ValueError("sparse_leaves: leave it out, for sparse_init says which are sparse")
    inner = optax.with_extra_args_support(inner)

    def first_masks(params: PyTree) -> PyTree:
        if not jax.tree.leaves(params):
            return params
        key = jax.random.fold_in(jax.random.key(seed), 0)
        if isinstance(sparse_init, str):
            method: Any = sparse_init
            return init_masks(params, density, method=method, key=key, sparse_leaves=sparse_leaves)
        if _are_densities(sparse_init):
            return init_masks(params, dict(named_leaves(sparse_init)), key=key)
        given = leaf_masks(sparse_init, params, what="sparse_init")
        for mask, (name, _) in zip(given, named_leaves(params), strict=True):
            if mask is not None and np.ndim(mask) == 0 and not mask:
                raise ValueError(f"sparse_init: one False for all of {name!r} leaves nothing of it")
        return jax.tree.structure(params).unflatten(
            [
                mask_like(mask, name, leaf) if np.ndim(mask) else jnp.ones((), bool)
                for mask, (name, leaf) in zip(given, named_leaves(params), strict=True)
            ]
        )

    def frozen_leaves(params: PyTree) -> list[Any]:
        if frozen is None or not jax.tree.leaves(params):
            return [None] * len(jax.tree.leaves(params))
        return leaf_masks(frozen, params, what="frozen")

    def scores(grads: PyTree, masks: PyTree, inner_state: PyTree, params: PyTree) -> PyTree | None:
        """What entries grow by; for a dense leaf anything of its shape."""
        if growth != "momentum":
            return grads if growth == "gradient" else None
        fields = inner_moments(inner, inner_state, params)
        columns = zip(named_leaves(params), jax.tree.leaves(masks), strict=True)
        return jax.tree.structure(params).unflatten(
            [momentum_of(name, fields) if m.ndim else p for (name, p), m in columns]
        )

    def hide_moments(inner_state: PyTree, masks: PyTree, params: PyTree) -> PyTree:
        def chosen(field: str) -> bool:
            return field not in PARAMETER_FIELDS if mask_inner_moments else field == "trace"

        if mask_inner_moments is False:
            return inner_state
        return mask_moments(inner, inner_state, params, masks, chosen)

    def init(params: PyTree) -> DynamicSparseState:
        check_real(params, "parameter")
        masks, wide = first_masks(params), widen(params)
        frozen_leaves(params)
        inner_state = inner.init(wide)
        scores(wide, masks, inner_state, wide)  # a missing momentum shows before training starts
        fired = jax.tree.map(jnp.copy, masks) if growth == "random_unfired" else None
        return DynamicSparseState(zero_count(), masks, fired, inner_state)

    def update(
        updates: PyTree,
        state: DynamicSparseState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, DynamicSparseState]:
        params = require_params(params, "dynamic_sparse")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        leaf_masks(state.masks, params, what="state.masks")
        structure, stopped = jax.tree.structure(params), frozen_leaves(params)

        def release(tree: PyTree) -> PyTree:
            """Zeros in the place of frozen entries."""
            flat = zip(jax.tree.leaves(tree), stopped, strict=True)
            return structure.unflatten(
                [x if s is None else jnp.where(jnp.asarray(s, bool), 0, x) for x, s in flat]
            )

        step = next_count(state.count)
        wide, grads = widen(params), release(widen(updates, params))
        moved, inner_state = inner.update(grads, state.inner_state, wide, **extra)

        def move_masks() -> tuple[PyTree, PyTree | None]:
            seen = hide_moments(inner_state, state.masks, wide)
            masks = update_masks(
                state.masks,
                jax.tree.map(jnp.add, wide, moved),
                scores(grads, state.masks, seen, wide),
                drop_rate_at(step, total_steps, drop_rate, drop_rate_final),
                growth=growth,
                key=jax.random.fold_in(jax.random.key(seed), step),
                fired=state.fired,
                frozen=None if frozen is None else structure.unflatten(stopped),
                exact_growth=exact_growth,
            )
            both = None if state.fired is None else jax.tree.map(jnp.logical_or, state.fired, masks)
            return masks, both

        masks, fired = state.masks, state.fired
        if update_every:
            masks, fired = jax.lax.cond(due(step, update_every), move_masks, lambda: (masks, fired))
        # A grown weight was zero before; one that stays active moves as the inner one says.
        moving = jax.tree.map(jnp.logical_and, state.masks, masks)

        def land(p: Array, u: Array, m: Array) -> Array:
            return jnp.where(m, u, -p) if m.ndim else u

        landed = release(jax.tree.map(land, wide, moved, moving))
        return narrow_like(landed, params), DynamicSparseState(
            step, masks, fired, hide_moments(inner_state, moving, wide)
        )

    return transformation(init, update)


def _are_densities(sparse_init: PyTree) -> bool:
    """Whether all leaves are numbers, and none a bool or an array."""
    leaves = jax.tree.leaves(sparse_init)
    return bool(leaves) and all(
        np.ndim(x) == 0 and not jnp.issubdtype(jnp.result_type(x), jnp.bool_) for x in leaves
    )


RECORD = Method(
    factory=dynamic_sparse,
    kind="wrapper",
    summary="train a sparse subnetwork whose masks drop and grow weights",
    example={"density": 0.5, "growth": "gradient", "total_steps": 20, "update_every": 2},
    example_made={"inner": lambda: optax.chain(scale_by_adam(), optax.scale_by_learning_rate(0.1))},
    traced=("drop_rate", "drop_rate_final"),
    static=(
        "inner",
        "density",
        "sparse_init",
        "growth",
        "drop",
        "total_steps",
        "update_every",
        "sparse_leaves",
        "frozen",
        "mask_inner_moments",
        "exact_growth",
        "seed",
    ),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=9,
    moved_bytes=30,
    paper='Yildirim et al., "Continual Learning with Dynamic Sparse Training: Exploring '
    'Algorithms for Effective Model Updates", CPAL 2024, arXiv 2308.14831',
    reference="muratonuryildirim/CL-with-DST@bdc9b12dbae40d5a687ef73b522e7c92e7b387cb:"
    "core.py:Masking",
    licence="MIT",
)
