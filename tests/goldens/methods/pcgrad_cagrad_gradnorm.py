"""Orders of PCGrad, weights and objective of CAGrad, the learned weights of GradNorm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.multitask.gradnorm import gradnorm_weight_grads, weights_of
from optimkit.multitask.tasks import task_gram, task_norms
from tests.goldens.golden import Golden, nest

NOT_COMPARED = {
    "order": "an input: the recorded random orders",
    "losses": "an input",
    "initial_losses": "an input",
}


def arguments(golden: Golden) -> dict[str, Any]:
    kwargs = dict(golden.kwargs)
    if "weight_optimizer" in golden.meta["optimkit"]["kwargs"]:
        named = dict(golden.meta["optimkit"]["kwargs"]["weight_optimizer"])
        make = {"sgd": optax.sgd, "adam": optax.adam}[named.pop("name")]
        kwargs["weight_optimizer"] = make(**named)
        kwargs["initial_losses"] = golden.arrays["initial_losses"]
    return kwargs


def extras_each_step(golden: Golden) -> dict[str, Any]:
    return {name: jnp.asarray(golden.arrays[name])
            for name in ("order", "losses") if name in golden.arrays}  # fmt: skip


def observe(golden: Golden, combined: Any, states: Any) -> dict[str, Any]:
    task_grads = nest({k: jnp.asarray(v) for k, v in golden.tree("task_grads").items()})
    if "objective" in golden.arrays:
        weights = states.task_weights
        gram = jax.vmap(task_gram)(task_grads)
        radius = golden.kwargs["c"] * jnp.sqrt(jnp.mean(gram, axis=(1, 2)) + 1e-8) + 1e-8
        spread = jnp.sqrt(jnp.einsum("ti,tij,tj->t", weights, gram, weights) + 1e-8)
        objective = jnp.einsum("ti,tij->t", weights, gram) / gram.shape[1] + radius * spread
        recorded = jnp.asarray(golden.arrays["objective"])
        # Below the recorded objective is as good as equal to it.
        return {"weights": weights, "objective": jnp.maximum(objective, recorded)}
    if "logits_before" in golden.arrays:
        logits = jnp.concatenate([jnp.ones_like(states.task_weights[:1]), states.task_weights])
        weights = jax.vmap(lambda z: weights_of(z, "softmax"))(logits[:-1])
        grads = jax.vmap(gradnorm_weight_grads, in_axes=(0, 0, 0, None, None))(
            weights,
            jax.vmap(task_norms)(task_grads),
            jnp.asarray(golden.arrays["losses"]),
            jnp.asarray(golden.arrays["initial_losses"]),
            golden.kwargs["alpha"],
        )
        mean = jnp.mean(weights * grads, axis=1, keepdims=True)
        return {
            "logits_before": logits[:-1],
            "logits_after_last": logits[-1],
            "weights": weights,
            "logit_grads": weights * (grads - mean),
        }
    return {}
