"""Averagers fed the recorded parameters, and merged checkpoints with their weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.checkpoint import average_checkpoints, checkpoint_weights
from optimkit.wrappers import sqrt_decay_weights, weighted_running_average
from tests.goldens.adapters import build, compare_named
from tests.goldens.golden import Golden, relative_error

NOT_COMPARED = {"params": "input: what the averager is fed", "checkpoints": "input"}

DESCRIBED = ("weights", "beta", "switch_step", "decay_steps")
"""Keywords in the files that describe the reference's schedule of weights, and not ours."""


def merged(golden: Golden) -> dict[str, float]:
    checkpoints = list(golden.arrays["checkpoints"])
    named: dict[str, Any] = {}
    for scheme in ("sma", "wma", "ema", "ema_recursive"):
        weights = checkpoint_weights(len(checkpoints), scheme=scheme, **golden.kwargs)
        named[f"weights_{scheme}"] = weights
        named[f"merged_{scheme}"] = average_checkpoints(checkpoints, scheme=scheme, **golden.kwargs)
        custom = average_checkpoints(checkpoints, scheme="custom", weights=weights.tolist())
        np.testing.assert_allclose(custom, named[f"merged_{scheme}"], rtol=1e-12)
    return compare_named(golden, named)


def averager_of(golden: Golden) -> Any:
    if golden.factory_names != ["weighted_running_average"]:
        return build(golden)
    schedule = {k: v for k, v in golden.kwargs.items() if k != "weights"}
    return weighted_running_average(sqrt_decay_weights(**schedule))


def run(golden: Golden) -> dict[str, float]:
    if "checkpoints" in golden.arrays:
        return merged(golden)
    averager = averager_of(golden)
    params = jnp.asarray(golden.arrays["params"])

    @jax.jit
    def feed(params: Any) -> Any:
        def step(state: Any, p: Any) -> Any:
            state = averager.update(p, state)
            return state, (state.value, state.average)

        return jax.lax.scan(step, averager.init(params[0]), params)[1]

    value, average = feed(params)
    named = {"ema": value, "average": value, "running": average}
    errors = compare_named(golden, named)
    if "latest" in golden.arrays:  # NaN before the first window is full; ours is the running mean
        recorded = golden.arrays["latest"]
        full = np.isfinite(recorded).all(axis=(1, 2))
        errors["latest"] = relative_error(np.asarray(value)[full], recorded[full])
    return errors
