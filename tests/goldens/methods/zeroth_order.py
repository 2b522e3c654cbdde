"""MeZO's steps with the recorded noise: as a gradient, and as a step of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optimkit.gradients import mezo, spsa
from tests.goldens.adapters import arrays_of, compare_named, parameter_error
from tests.goldens.golden import Golden
from tests.goldens.methods.sharpness_aware import loss, named

RUNS_ALL = True
NOT_COMPARED = {"x": "input", "y": "input", "noise": "input"}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    kwargs = {**golden.kwargs, **overrides}
    then, start = golden.meta["optimkit"]["then"], arrays_of(golden, "params0")
    dtype = jnp.dtype(golden.meta["dtype"])
    x, y = (jnp.asarray(golden.arrays[name], dtype) for name in ("x", "y"))
    key = jax.random.key(0)
    estimate = spsa(loss, **kwargs, return_both=True)
    make = {"eps": kwargs["eps"], "weight_decay": then["weight_decay"]}
    whole = mezo(then["learning_rate"], **make)

    def step(carry: Any, given: Any) -> Any:
        params, other = carry
        x, y, z = given
        (plus, minus), g = estimate(params, key, x, y, direction=z)
        decay = {
            layer: {name: then["weight_decay"] * (name != "bias") for name in leaves}
            for layer, leaves in params.items()
        }
        params = jax.tree.map(
            lambda w, g, d: (w - then["learning_rate"] * (g + d * w)).astype(dtype),
            params,
            g,
            decay,
        )
        value, other = whole.loss_and_step(
            other, key, lambda params: loss(params, x, y), direction=z
        )
        return (params, other), (plus, minus, g, params, value, other)

    given = (x, y, arrays_of(golden, "noise"))
    _, (plus, minus, g, params, value, other) = jax.lax.scan(step, (start, start), given)
    slope = (plus - minus) / (2 * kwargs["eps"])
    found = {"loss_plus": plus, "loss_minus": minus, "projected_grad": slope, **named(grads=g)}
    own = compare_named(golden, {"loss_plus": value})
    return {
        "params": parameter_error(golden, params),
        "params (mezo)": parameter_error(golden, other),
        "loss_plus (mezo)": own["loss_plus"],
        **compare_named(golden, found),
    }
