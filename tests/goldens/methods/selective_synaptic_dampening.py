"""Both importances from the data, and the dampened parameters."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from optimkit.gradients import fisher_importance, selective_synaptic_dampening
from tests.goldens.adapters import arrays_of, compare_named
from tests.goldens.golden import Golden, flatten, relative_error
from tests.goldens.methods.sharpness_aware import model, named

NOT_COMPARED = dict.fromkeys(("x_full", "y_full", "x_forget", "y_forget"), "input")


def loss(params: Any, batch: Any) -> Any:
    x, labels = batch
    log_p = jax.nn.log_softmax(model(params, x))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    kwargs = {**golden.kwargs, **overrides}
    params = arrays_of(golden, "params0")
    found = re.search(r"batch size (\d+)", golden.meta["notes"])
    assert found
    size, importance = int(found[1]), {}
    for name in ("full", "forget"):
        x, y = (jnp.asarray(golden.arrays[f"{part}_{name}"]) for part in "xy")
        batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
        importance[f"importance_{name}"] = fisher_importance(loss, params, batches)
    new = selective_synaptic_dampening(params, **importance, **kwargs)
    moved = {
        name: relative_error(w[None], golden.arrays[f"params/{name}"][None], origin)
        for (name, w), origin in zip(
            sorted(flatten(new).items()),
            [value for _, value in sorted(golden.tree("params0").items())],
            strict=True,
        )
    }
    return {
        "params": max(moved.values()),
        **compare_named(golden, named(**importance)),
    }
