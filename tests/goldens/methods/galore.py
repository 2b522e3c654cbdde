"""The recorded projectors are injected, and those in force after each refresh compared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optimkit.wrappers.project_low_rank import ProjectLowRankState
from tests.goldens.golden import Golden, flatten

ARGUMENT = {"apollo": "proj"}


def arguments(golden: Golden) -> dict[str, Any]:
    axes = golden.meta["proj_axis"]

    def projector(gradient: Any, rank: int, axis: int, refresh: Any, path: str) -> Any:
        del gradient, rank
        assert axes[path] in (axis, "both"), f"{path}: side {axis} is projected"
        folder = "proj" if axes[path] == axis else ("proj_in", "proj_out")[axis]
        return jnp.asarray(golden.arrays[f"{folder}/{path}"])[refresh]

    return {**golden.kwargs, ARGUMENT.get(golden.method, "projector"): projector}


def low_rank_states(states: Any) -> ProjectLowRankState:
    """The state of the low-rank wrapper inside a recipe's."""

    def found(node: Any) -> bool:
        return isinstance(node, ProjectLowRankState)

    return next(node for node in jax.tree.leaves(states, is_leaf=found) if found(node))


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    state, gap = low_rank_states(states), golden.kwargs["update_proj_gap"]
    full = state.output_projector is not None
    trees = {"proj_in" if full else "proj": state.projector, "proj_out": state.output_projector}
    return {
        f"{folder}/{name}": projectors[::gap]
        for folder, tree in trees.items()
        for name, projectors in flatten(tree or {}).items()
    }
