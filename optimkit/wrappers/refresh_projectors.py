"""An explicit refresh, for those who decide themselves when the subspace is renewed."""

from __future__ import annotations

from typing import Any

import jax

from optimkit.layout import named_leaves
from optimkit.leaves import check_real, check_structure, widen
from optimkit.numerics import check_choice, check_count
from optimkit.protocols import PyTree
from optimkit.wrappers.project_low_rank import ProjectLowRankState
from optimkit.wrappers.projectors import (
    PROJ_TYPES,
    PROJECTORS,
    ProjectorFn,
    ProjectorRule,
    ProjType,
    Side,
    new_projectors,
    projected_sides,
    projector_rank,
)


def refresh_projectors(
    state: PyTree,
    grads: PyTree,
    *,
    proj_type: ProjType = "std",
    projector: str | ProjectorFn = "svd",
    projector_oversample: int = 8,
    projector_power_iters: int = 1,
    seed: int = 0,
) -> PyTree:
    """Renews the projectors in a state from a gradient; everything else stays, moments too.

    With ``update_proj_gap=None`` nothing but this renews them. Under a ``jit`` of its own, called
    when it is due, the memory that a decomposition needs is not part of the training step.

    Args:
      state: a state with one of ``project_low_rank`` in it, however deep: that of ``galore``,
        ``fira`` or ``apollo``, or of a chain.
      grads: a gradient of the parameters that the state was made for.
      proj_type: as the state was made with, and so are the others.
      projector: how projectors are chosen; of ``"random"`` ones, each step count draws afresh.
      projector_oversample: for ``"subspace"``.
      projector_power_iters: for ``"subspace"``.
      seed: of random projectors.

    Returns:
      The state with new projectors.

    Raises:
      ValueError: if there is no such state in it, its projectors belong to other gradients or to
        another ``proj_type``, or an argument is out of range.

    >>> import jax.numpy as jnp, optimkit as ok
    >>> tx = ok.galore(0.1, rank=1, update_proj_gap=None)
    >>> params = {"kernel": jnp.zeros((2, 3))}
    >>> grads = {"kernel": jnp.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])}
    >>> state = refresh_projectors(tx.init(params), grads)
    >>> [round(float(p), 3) for p in state[0].projector["kernel"][:, 0]]  # (1, 3) over its norm
    [0.316, 0.949]
    """
    check_choice(PROJ_TYPES, proj_type=proj_type)
    check_count(projector_power_iters=projector_power_iters, least=1)
    check_count(projector_oversample=projector_oversample, seed=seed)
    if not callable(projector):
        check_choice(PROJECTORS, projector=projector)
    check_real(grads, "gradient")
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_low_rank) if _is_low_rank(node)]
    if not found:
        raise ValueError("refresh_projectors found no state of project_low_rank")
    grads = widen(grads)

    def renew(node: Any) -> Any:
        if not _is_low_rank(node):
            return node
        check_structure(grads, node.projector, what="gradient", like="the state")
        trees = [tree for tree in (node.projector, node.output_projector) if tree is not None]
        columns = [jax.tree.leaves(tree) for tree in trees]
        asked, places = [], []
        for number, (name, leaf) in enumerate(named_leaves(grads)):
            held = [column[number] for column in columns]
            if not held[0].ndim:
                continue
            sides = projected_sides(leaf.shape, proj_type)
            for place, (previous, axis) in enumerate(zip(held, sides, strict=False)):
                rank = projector_rank(leaf.shape, previous.shape[-1], projector)
                wanted = (*leaf.shape[:-2], leaf.shape[axis - 2], rank)
                if len(sides) != len(held) or previous.shape != wanted:
                    raise ValueError(
                        f"refresh_projectors: leaf {name!r} of shape {leaf.shape} has projectors "
                        f"{[p.shape for p in held]}, which do not fit proj_type={proj_type!r}"
                    )
                asked.append(Side(number, name, leaf, axis, previous, node.count))
                places.append((place, number))
        rank = max((side.previous.shape[-1] for side in asked), default=1)
        rule = ProjectorRule(projector, rank, projector_oversample, projector_power_iters, seed)
        for (place, number), new in zip(places, new_projectors(rule, asked), strict=True):
            columns[place][number] = new
        structure = jax.tree.structure(node.projector)
        renewed = [structure.unflatten(column) for column in columns]
        return node._replace(
            projector=renewed[0], output_projector=renewed[1] if len(renewed) > 1 else None
        )

    return jax.tree.map(renew, state, is_leaf=_is_low_rank)


def _is_low_rank(node: Any) -> bool:
    return isinstance(node, ProjectLowRankState)
