"""The factor of every step; and the baseline with the gradients that it makes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optimkit.gradients import gradient_snr, optimal_baseline
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden

NOT_COMPARED = {"rewards": "input", "scores": "input"}


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    return {"scale": optax.tree.get(states, "factor")}


def run(golden: Golden) -> dict[str, float]:
    scores, rewards = (jnp.asarray(golden.arrays[name]) for name in ("scores", "rewards"))
    weights = jnp.sum(jnp.square(scores), axis=-1)
    baseline = optimal_baseline(rewards, weights, leave_one_out=False)
    others = optimal_baseline(rewards, weights)
    grads = ((rewards - others)[..., None] * scores).reshape(-1, scores.shape[-1])
    found, plugin = gradient_snr(grads), gradient_snr(grads, debias=False)

    def second_moment(baseline: Any) -> Any:
        return jnp.mean(jnp.square(rewards - baseline) * weights)

    named = {
        "score_sq_norm": weights,
        "baseline": baseline,
        "baseline_leave_one_out": others,
        "advantage": rewards - others,
        "per_sample_grads": grads,
        "mean_grad": jnp.mean(grads, axis=0),
        "grad_mean_sq_norm": plugin.signal,
        "variance_of_mean": found.noise,
        "signal": found.signal,
        "snr": found.snr,
        "snr_plugin": plugin.snr,
        "lr_scale": found.scale,
        "lr_scale_plugin": plugin.scale,
        "second_moment_zero_mean_optimal": jnp.stack(
            [
                second_moment(0.0),
                second_moment(jnp.mean(rewards, axis=1, keepdims=True)),
                second_moment(baseline[:, None]),
            ]
        ),
    }
    return compare_named(golden, named)
