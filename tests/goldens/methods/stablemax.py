"""The loss, each example's loss, log-probabilities and the gradient of the loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optimkit import nn
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden

NOT_COMPARED = {"logits": "input", "labels": "input"}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    kwargs = {**golden.kwargs, **overrides}
    logits, labels = (jnp.asarray(golden.arrays[name]) for name in ("logits", "labels"))

    def loss(x: jax.Array) -> jax.Array:
        return nn.stablemax_cross_entropy(x, labels, **kwargs)

    value, gradient = jax.value_and_grad(loss)(logits)
    named = {
        "loss": value,
        "grad_logits": gradient,
        "per_example": nn.stablemax_cross_entropy(logits, labels, **kwargs, reduction="none"),
        "log_probs": nn.log_stablemax(logits),
    }
    return compare_named(golden, named)
