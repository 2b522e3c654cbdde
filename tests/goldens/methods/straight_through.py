"""Each family's values and derivatives, for the recorded random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optimkit import gradients
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden

NOT_COMPARED = {
    **dict.fromkeys(("a", "uniform", "cotangent", "logistic_noise"), "input"),
    **dict.fromkeys(("rf_uniform", "rf_target", "rf_coef"), "input"),
}


def run(golden: Golden) -> dict[str, float]:
    given = {name: jnp.asarray(value) for name, value in golden.arrays.items()}
    a, u, key = given["a"], given["uniform"], jax.random.key(0)

    def both(name: str, gradient: str, fn: Callable[[Any], Any]) -> dict[str, Any]:
        value, pull = jax.vjp(fn, a)
        return {name: value, gradient: pull(given["cotangent"])[0]}

    def flip(slope: Any) -> Callable[[Any], Any]:
        return lambda a: gradients.straight_through_bernoulli(key, a, slope=slope, uniform=u)

    p = jax.nn.sigmoid(a)
    b = (given["rf_uniform"] < p[None]).astype(a.dtype)
    target, coef = given["rf_target"], given["rf_coef"]
    loss = jnp.sum(coef[None] * (b - target[None]) ** 2, axis=(1, 2))
    exact = p * (1 - p) * coef * ((1 - target) ** 2 - target**2)
    plain, best = (
        gradients.reinforce_neuron_grad(a, b, loss, baseline=kind) for kind in (None, "optimal")
    )
    running = gradients.OptimalBaseline.init(a)
    named = {
        **both("st_forward", "st_grad_sigmoid", flip("sigmoid")),
        **both("st_forward", "st_grad_identity", flip("identity")),
        **both(
            "st_threshold_forward",
            "st_threshold_grad_clipped",
            lambda a: gradients.straight_through_threshold(a, slope="clip"),
        ),
        **both("sts_forward", "sts_grad", lambda a: gradients.sts_neuron(key, a, uniform=u)),
        **both(
            "noisy_rectifier_forward",
            "noisy_rectifier_grad",
            lambda a: gradients.noisy_rectifier(key, a, sample=given["logistic_noise"]),
        ),
        "rf_loss": loss,
        "rf_grad_nobaseline": plain,
        "rf_grad_optimal_baseline": best,
        "rf_optimal_baseline": running.update(b - p[None], loss, decay=0.0).value,
        "rf_exact_grad": exact,
    }
    return compare_named(golden, named)
