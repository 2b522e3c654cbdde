"""SPAM's clipped gradients, warm-up factors and masks, read off the states; and spike scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.diagnostics import gradient_spike_score
from optimkit.transforms.spike_score import online_spike_score, track_spike_score
from optimkit.wrappers.momentum_reset import reset_warmup_factor
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, flatten


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    kwargs = golden.kwargs
    steps = np.arange(1, golden.meta["steps"] + 1)
    interval, b1 = kwargs["reset_interval"], kwargs["b1"]
    factor = jax.vmap(lambda t: reset_warmup_factor(t, interval, kwargs["warmup_steps"]))
    named = {"warmup_factor": factor(jnp.asarray(steps))}

    # m_t = b1 m_{t-1} + (1-b1) g_t, where a reset step starts from zero.
    for name, mu in flatten(optax.tree.get(states, "mu")).items():
        after = np.asarray(mu).reshape(len(steps), -1)
        before = np.concatenate([np.zeros_like(after[:1]), after[:-1]])
        before[steps % interval == 0] = 0
        clipped = (after - b1 * before) / (1 - b1)
        if f"clipped/{name}" in golden.arrays:  # not recorded for sparse leaves
            named[f"clipped/{name}"] = clipped.reshape(golden.arrays[f"clipped/{name}"].shape)

    index = optax.tree.get(states, "index") if kwargs.get("density", 1.0) < 1 else {}
    for name, positions in flatten(index).items():
        if positions.ndim == 1:
            continue
        recorded = golden.arrays[f"mask/{name}"]
        used = np.zeros((len(steps), recorded[0].size), bool)
        np.put_along_axis(used, np.asarray(positions), True, axis=1)
        last_of_refresh = [np.flatnonzero(steps // interval == r)[-1] for r in range(len(recorded))]
        named[f"mask/{name}"] = used[last_of_refresh].reshape(recorded.shape)
        same = (used[:, None] == recorded.reshape(1, len(recorded), -1)).all(axis=2)
        named["mask_index"] = np.where(same.any(axis=1), same.argmax(axis=1), -1)
    return named


def run(golden: Golden) -> dict[str, float]:
    """The spike scores of a recorded history: the paper's, and the running one."""
    grads = jnp.asarray(golden.arrays["grads"])
    score = gradient_spike_score(grads, **golden.kwargs)
    tx = track_spike_score()

    def step(state: Any, g: Any) -> Any:
        _, state = tx.update(g, state)
        return state, online_spike_score(g, state.magnitude_sum, state.count)

    state, online = jax.lax.scan(step, tx.init(grads[0]), grads)
    spikes = float(state.metrics["spike_count"])
    expected = int(np.sum(golden.arrays["online_score"] > 50))
    named = {"score": score, "count": jnp.sum(score > 50), "online_score": online}
    return compare_named(golden, named) | {"metrics spike_count": abs(spikes - expected)}
