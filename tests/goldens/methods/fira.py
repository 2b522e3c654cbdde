"""Projectors as for GaLore; and the limiter's norm after each step."""

from __future__ import annotations

from typing import Any

import jax

from optimkit.transforms.limit_norm_growth import LimitNormGrowthState
from tests.goldens.golden import Golden
from tests.goldens.methods import galore
from tests.goldens.methods.galore import arguments as arguments


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    def is_limiter(node: Any) -> bool:
        return isinstance(node, LimitNormGrowthState)

    kept = galore.low_rank_states(states).residual_state
    limiters = [x for x in jax.tree.leaves(kept, is_leaf=is_limiter) if is_limiter(x)]
    norms = jax.tree_util.tree_leaves_with_path([limiter.norm for limiter in limiters])
    return galore.observe(golden, params, states) | {
        "limiter_norm/" + "/".join(key.key for key in path[1:]): norm for path, norm in norms
    }
