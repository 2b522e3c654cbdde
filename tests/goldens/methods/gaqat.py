"""Freezing by gradient disorder: every recorded column is a scale, a leaf of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.goldens import adapters
from tests.goldens.golden import Golden

NOT_COMPARED = {"smooth_grads": "an input"}


def run(golden: Golden, **overrides: Any) -> adapters.Errors:
    combiner = adapters.build(golden, **overrides)
    columns = range(golden.arrays["task_grads"].shape[1])
    pair = jnp.stack([jnp.asarray(golden.arrays[n]) for n in ("task_grads", "smooth_grads")], 1)
    sequence = [pair[:, :, column] for column in columns]
    params = [jnp.zeros((), pair.dtype) for _ in columns]

    def step(state: Any, grads: Any) -> Any:
        combined, state = combiner.update(grads, state, params)
        return state, (combined, state.inner_state.disorder, state.frozen)

    _, outs = jax.lax.scan(step, combiner.init(params, 2), sequence)
    combined, disorder, frozen = (jnp.stack(out, axis=1) for out in outs)
    named = {"combined": combined, "disorder": disorder, "frozen": frozen}
    return adapters.compare_named(golden, named)
