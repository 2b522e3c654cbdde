"""Ghost batch norm over a sequence of batches, then in evaluation.

torch keeps the unbiased variance: its running variance is ours with the batches' part multiplied by
n / (n - 1), n the numbers that a variance is taken over.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.goldens.adapters import build, compare_named
from tests.goldens.golden import Golden

INPUTS = ("x", "scale", "bias")
NOT_COMPARED = dict.fromkeys(INPUTS, "input")


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    layer = build(golden, **overrides)
    batches, scale, bias = (jnp.asarray(golden.arrays[name]) for name in INPUTS)
    params = {"scale": scale, "bias": bias}
    stats = {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}
    numbers = layer.virtual_batch_size * batches[0, 0, ..., 0].size
    ys, means, variances = [], [], []
    for index, x in enumerate(batches):
        variables = {"params": params, "batch_stats": stats}
        y, renewed = layer.apply(variables, x, False, mutable=["batch_stats"])
        stats = renewed["batch_stats"]
        chunks = (index + 1) * (len(x) // layer.virtual_batch_size)
        start = layer.momentum**chunks  # what is left of the initial 1
        ys.append(y)
        means.append(stats["mean"])
        variances.append(start + (stats["var"] - start) * numbers / (numbers - 1))
    torchs = {"params": params, "batch_stats": {"mean": means[-1], "var": variances[-1]}}
    named = {
        "y": np.stack(ys),
        "running_mean": np.stack(means),
        "running_var": np.stack(variances),
        "eval_y": layer.apply(torchs, batches[0], True),
    }
    return compare_named(golden, named)
