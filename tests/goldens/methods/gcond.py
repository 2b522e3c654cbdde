"""The resolved gradients of every task, the sum before momentum, and the arbitrator's numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.goldens.golden import Golden, flatten

NOT_COMPARED = {
    "params": "an input: the parameters that the trust ratio reads, the same every step"
}


def arguments(golden: Golden) -> dict[str, Any]:
    kwargs = dict(golden.kwargs)
    for name in ("conflict_thresholds", "tie_breaking_weights"):
        kwargs[name] = tuple(kwargs[name])
    return kwargs


def observe(golden: Golden, combined: Any, states: Any) -> dict[str, Any]:
    inner = states.combiner_state
    weak = golden.kwargs["conflict_thresholds"][2]
    least = inner.metrics["min_cosine"]
    resolved = inner.previous_gradient
    projected = jax.tree.map(lambda g: jnp.sum(g, axis=1), resolved)
    return {
        **{f"final/{name}": value for name, value in flatten(combined).items()},
        **{f"resolved_tasks/{name}": value for name, value in flatten(resolved).items()},
        **{f"projected/{name}": value for name, value in flatten(projected).items()},
        "norm_ema": inner.norm_mean,
        "proj_iters": inner.metrics["resolved_pairs"],
        "min_cosine": jnp.where(least < weak, least, 1),
    }
