"""What the authors' class writes beside the combined gradient."""

from __future__ import annotations

from typing import Any

import jax

from optimkit.multitask.sam_gs import clip_combined
from tests.goldens.golden import Golden, flatten


def observe(golden: Golden, combined: Any, states: Any) -> dict[str, Any]:
    num_tasks = next(iter(golden.tree("task_grads").values())).shape[1]
    clipped = jax.vmap(lambda g: clip_combined(jax.tree.map(lambda x: x * num_tasks, g), 1.0))(
        combined
    )
    return {
        **{f"clipped/{name}": value for name, value in flatten(clipped).items()},
        "mean_similarity": states.metrics["task_similarity"],
        "v": states.dissimilarity,
        "equalised": states.metrics["norms_equalized"],
    }
