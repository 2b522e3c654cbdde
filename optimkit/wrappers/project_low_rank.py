"""Low-rank projection: the wrapped transformation sees, and keeps, a subspace of each matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.leaves import (
    check_match,
    check_real,
    narrow_like,
    widen,
    zero_count,
)
from optimkit.numerics import check_choice, check_count, check_range, compute_dtype, next_count
from optimkit.protocols import (
    Array,
    GradientTransformation,
    LeafSelector,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam
from optimkit.wrappers.projectors import (
    FROM_KEY,
    PROJ_TYPES,
    PROJECTORS,
    ProjectorFn,
    ProjectorRule,
    ProjType,
    first_projector,
    project_back,
    project_leaves,
    projected_sides,
    projector_rank,
    select_matrices,
)
from optimkit.wrappers.refresh_schedule import ON_REFRESH, RefreshSchedule, renew

ResidualFn = Callable[[Array, Array, Array, int | None], Array]
"""``(residual, inner update N, projected gradient R, projected side) -> residual``."""


class ProjectLowRankState(NamedTuple):
    """``inner_state`` knows the projected gradients only; ``count`` is an int32 scalar.

    ``projector``: (d, rank) in the place of each projected leaf, a 0-d zero in that of another, or
    of one whose projector is made anew in each step. ``output_projector``: that of the outputs
    where both sides are projected, else None. ``residual_state``: state of what the residual
    passes, else None.
    """

    count: Array
    projector: PyTree
    output_projector: PyTree
    inner_state: PyTree
    residual_state: PyTree


def project_low_rank(
    inner: optax.GradientTransformation,
    *,
    rank: int = 128,
    update_proj_gap: int | None = 200,
    scale: Any = 1.0,
    proj_type: ProjType = "std",
    lowrank_leaves: LeafSelector = None,
    projector: str | ProjectorFn = "svd",
    projector_oversample: int = 8,
    projector_power_iters: int = 1,
    stagger: bool = False,
    moments_on_refresh: Literal["keep", "rotate", "reset"] = "keep",
    residual: ResidualFn | None = None,
    residual_transform: optax.GradientTransformation | None = None,
    residual_scale: Any = 1.0,
    store_projector: bool = True,
    seed: int = 0,
) -> GradientTransformation:
    r"""Runs ``inner`` on the coordinates of each matrix in a subspace of few directions.

    .. math::

        R = P^T G, \qquad N = \operatorname{inner}(R), \qquad
        U = s P N + T\bigl(\rho(G - s_r P R, N, R)\bigr)

    or :math:`R = G P`, whichever side is projected (``proj_type``); P holds the ``rank`` leading
    singular vectors of a recent gradient. The second term, without which U stays in the subspace,
    is there with ``residual`` or ``residual_transform`` only. Leaves that are not projected go to
    ``inner`` as they are: one transformation, and one count, for the whole tree.

    Args:
      inner: any transformation. Its arrays for a projected leaf have the shape of R. Parameters are
        handed to it projected, too: weight decay belongs outside, where it acts on all of them.
      rank: columns of P, >= 1; clamped to the smaller side.
      update_proj_gap: T; P is renewed at steps 1, 1 + T, 1 + 2T, ... (from 1) from the gradient of
        that step. None: never (see ``refresh_projectors``); P is then unit vectors at first.
      scale: s, on what comes back, >= 0. A Python 0 leaves that term out.
      proj_type: ``"std"`` projects the smaller side (of a square kernel the inputs),
        ``"reverse_std"`` the larger, ``"right"`` the inputs, ``"left"`` the outputs of (in, out)
        kernels; ``"full"`` both, so that R is rank x rank.
      lowrank_leaves: which leaves are projected (None, tree of bools, ``(path, leaf) -> bool``, or
        patterns). Default: all of rank two, embeddings and heads included. A chosen leaf of more
        axes is a stack of (in, out) matrices, each with a projector of its own.
      projector: ``"svd"``, ``"gram"``, ``"subspace"`` (a randomised range finder at first, then
        subspace iteration from the last P), ``"random"``, ``"gaussian"``: see
        ``optimkit.wrappers.compute_projector``. Or ``(gradient, rank, side, refresh_index, path)
        -> P``.
      projector_oversample: for ``"subspace"``, random columns beside those that are kept.
      projector_power_iters: for ``"subspace"``, passes over the matrix and back, >= 1.
      stagger: leaf i of n projected ones is renewed at the steps k (from 0) with
        ``(k + i T // n) % T == 0``, and all at the first: no later step pays for all of them.
      moments_on_refresh: what a refresh does to the float arrays that ``inner`` keeps in R's shape.
        ``"keep"``: nothing, though their coordinates now belong to another basis, as GaLore has it.
        ``"rotate"``: :math:`M \leftarrow P_{new}^T P_{old} M`, with squared entries for second
        moments (``nu``). ``"reset"``: zeros. Counts run on.
      residual: :math:`\rho`, ``(residual, N, R, side) -> residual``; the side is None for
        ``"full"``. Default, if there is a ``residual_transform``: the residual itself.
      residual_transform: T, a transformation that sees the residuals of projected leaves alone.
      residual_scale: :math:`s_r`, >= 0; a Python 0 makes the whole gradient the residual.
      store_projector: False draws P anew in every step from the seed, in place of 4 d rank bytes;
        for ``"random"`` and ``"gaussian"``.
      seed: of random projectors; each leaf and each refresh draws afresh.

    Returns:
      A transformation. For a projected (d, D) leaf it keeps 4 d rank bytes beside what ``inner``
      keeps for an array of D rank entries.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, a chosen leaf is no
        matrix, or a projector function returns another shape.

    A refresh runs under ``lax.cond`` with a scalar predicate: nothing is decomposed, and nothing
    compiled, in the steps between. Under ``vmap`` over the state it runs in every step. A gradient
    of zeros gives unit vectors; a non-finite one leaves P as it was. On a mesh a refresh divides
    the matrices among the devices; other steps add up the parts of R where the projected side is
    sharded, and move nothing else.

    >>> import jax.numpy as jnp, optax
    >>> tx = project_low_rank(optax.trace(0.9), rank=1)
    >>> params = {"kernel": jnp.zeros((2, 3))}
    >>> state = tx.init(params)
    >>> grads = {"kernel": jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
    >>> updates, state = tx.update(grads, state, params)
    >>> updates["kernel"].tolist(), state.inner_state.trace["kernel"].shape
    ([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], (1, 3))

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    ICML 2024, arXiv 2403.03507.
    """
    check_count(rank=rank, projector_power_iters=projector_power_iters, least=1)
    check_count(projector_oversample=projector_oversample, seed=seed)
    if update_proj_gap is not None:
        check_count(update_proj_gap=update_proj_gap, least=1)
    check_range(scale=scale, residual_scale=residual_scale, ge=0)
    check_choice(PROJ_TYPES, proj_type=proj_type)
    check_choice(ON_REFRESH, moments_on_refresh=moments_on_refresh)
    if not callable(projector):
        check_choice(PROJECTORS, projector=projector)
    if not store_projector and projector not in FROM_KEY:
        raise ValueError(
            f"store_projector=False needs projector 'random' or 'gaussian', got {projector!r}"
        )
    inner = optax.with_extra_args_support(inner)
    through = optax.with_extra_args_support(residual_transform or optax.identity())
    has_residual = residual is not None or residual_transform is not None
    schedule = RefreshSchedule(
        ProjectorRule(projector, rank, projector_oversample, projector_power_iters, seed),
        every=update_proj_gap,
        stagger=stagger,
        moments=moments_on_refresh,
        stored=store_projector,
    )

    def sides_of(tree: PyTree) -> list[tuple[int, ...]]:
        """The projected sides of each leaf, none for one that is not projected."""
        chosen = jax.tree.leaves(select_matrices(lowrank_leaves, tree))
        return [
            projected_sides(np.shape(leaf), proj_type) if is_low else ()
            for leaf, is_low in zip(jax.tree.leaves(tree), chosen, strict=True)
        ]

    def first_projectors(tree: PyTree, *, store: bool) -> list[list[Array]]:
        """Per leaf, one projector a side."""
        return [
            [
                first_projector(leaf, side, projector_rank(leaf.shape, rank, projector))
                if store
                else jnp.zeros((), compute_dtype(leaf))
                for side in sides
            ]
            for leaf, sides in zip(jax.tree.leaves(tree), sides_of(tree), strict=True)
        ]

    def as_trees(held: Sequence[Sequence[Array]], tree: PyTree) -> tuple[PyTree, PyTree]:
        """The fields ``projector`` and ``output_projector``."""
        leaves, structure = jax.tree.flatten(tree)
        columns = [
            structure.unflatten(
                [
                    own[column] if len(own) > column else jnp.zeros((), compute_dtype(leaf))
                    for own, leaf in zip(held, leaves, strict=True)
                ]
            )
            for column in range(2 if proj_type == "full" else 1)
        ]
        return columns[0], columns[1] if len(columns) > 1 else None

    def init_projectors(params: PyTree) -> tuple[PyTree, PyTree]:
        params = widen(params)
        return as_trees(first_projectors(params, store=store_projector), params)

    def residuals_alone(tree: PyTree, sides: Sequence[tuple[int, ...]]) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(
            [x if own else optax.MaskedNode() for x, own in zip(leaves, sides, strict=True)]
        )

    def init(params: PyTree) -> ProjectLowRankState:
        check_real(params, "parameter")
        params = widen(params)
        held, sides = first_projectors(params, store=True), sides_of(params)
        return ProjectLowRankState(
            zero_count(),
            *init_projectors(params),
            inner.init(project_leaves(params, held, sides)),
            through.init(residuals_alone(params, sides)) if residual_transform else None,
        )

    def update(
        updates: PyTree,
        state: ProjectLowRankState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ProjectLowRankState]:
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        expected = jax.eval_shape(init_projectors, updates)
        check_match(state[1:3], expected, what="state", like="the gradient's")
        grads = widen(updates)
        leaves, structure = jax.tree.flatten(grads)
        all_sides = sides_of(grads)
        stored = [structure.flatten_up_to(tree) for tree in state[1:3] if tree is not None]
        held = [
            [column[index] for column in stored] if sides else []
            for index, sides in enumerate(all_sides)
        ]
        if not store_projector:
            held = first_projectors(grads, store=True)
        held, inner_state = renew(
            schedule, state.count, grads, all_sides, held, inner.init, state.inner_state
        )
        low = project_leaves(grads, held, all_sides)
        moved, inner_state = inner.update(
            low,
            inner_state,
            None if params is None else project_leaves(widen(params), held, all_sides),
            **extra,
        )
        steps, coordinates = structure.flatten_up_to(moved), structure.flatten_up_to(low)

        def back(index: int, x: Array) -> Array:
            return project_back(x, held[index][::-1], all_sides[index][::-1], leaves[index])

        def rest(index: int) -> Array:
            left, sides = leaves[index], all_sides[index]
            if not _is_zero(residual_scale):
                left = left - residual_scale * back(index, coordinates[index])
            if residual is None:
                return left
            side = sides[0] if len(sides) == 1 else None
            return residual(left, steps[index], coordinates[index], side)

        residuals, residual_state = None, state.residual_state
        if has_residual:
            residuals = residuals_alone(grads, all_sides)
            residuals = structure.unflatten(
                [rest(i) if own else optax.MaskedNode() for i, own in enumerate(all_sides)]
            )
            if residual_transform is not None:
                residuals, residual_state = through.update(residuals, residual_state, **extra)
            residuals = structure.flatten_up_to(residuals)

        def whole(index: int) -> Array:
            if not all_sides[index]:
                return steps[index]
            parts = [] if residuals is None else [residuals[index]]
            if not _is_zero(scale) or not parts:
                parts.append(scale * back(index, steps[index]))
            return sum(parts[1:], start=parts[0])

        result = structure.unflatten([whole(index) for index in range(len(leaves))])
        projectors = state[1:3] if not store_projector else as_trees(held, grads)
        state = ProjectLowRankState(
            next_count(state.count), *projectors, inner_state, residual_state
        )
        return narrow_like(result, updates), state

    return transformation(init, update)


def _is_zero(scale: Any) -> bool:
    return isinstance(scale, (int, float)) and scale == 0


RECORD = Method(
    factory=project_low_rank,
    kind="wrapper",
    summary="run another transformation in a subspace of each matrix",
    example={"rank": 2, "update_proj_gap": 2},
    example_made={"inner": lambda: scale_by_adam(eps_form="before_bias_correction")},
    traced=("scale", "residual_scale"),
    static=(
        "inner",
        "rank",
        "update_proj_gap",
        "proj_type",
        "lowrank_leaves",
        "projector",
        "projector_oversample",
        "projector_power_iters",
        "stagger",
        "moments_on_refresh",
        "residual",
        "residual_transform",
        "store_projector",
        "seed",
    ),
    position="any",
    communication="matrix",
    response="bounded",
    state_bytes=0.1,  # 12 rank / d for a square matrix, here of 256 x 256
    moved_bytes=12,
    paper='Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", '
    "ICML 2024, arXiv 2403.03507",
    reference="jiaweizzhao/GaLore@2cc66f8:galore_torch/adamw.py:AdamW",
    licence="Apache-2.0",
)
