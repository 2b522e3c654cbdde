"""Both gradients of a sharpness-aware step, and IGNITE's gradient, norm and multiplier."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optimkit as ok
from optimkit.gradients import ignite_gradient, ignite_multiplier, sam_gradient_parts
from optimkit.gradients.sam import sam_gradient
from tests.goldens.adapters import arrays_of, compare_named, parameter_error
from tests.goldens.golden import Golden, flatten

RUNS_ALL = True
NOT_COMPARED = {"x": "input", "y": "input"}
DESCRIBED = ("multiplier", "multiplier_lr", "threshold")
"""Keywords of the multiplier, which is a function of its own."""


def model(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]


def loss(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(params, x) - y) ** 2)


def named(**trees: Any) -> dict[str, Any]:
    return {
        f"{top}/{name}": value
        for top, tree in trees.items()
        for name, value in flatten(tree).items()
    }


def base_of(golden: Golden) -> Any:
    given = golden.meta["optimkit"]["base_optimizer"]
    if given["name"] == "sgd":  # torch's: coupled decay
        return optax.chain(
            optax.add_decayed_weights(given.get("weight_decay", 0.0)),
            optax.sgd(given["lr"], given.get("momentum")),
        )
    b1, b2 = given.get("betas", (0.9, 0.999))
    return optax.adamw(given["lr"], b1, b2, weight_decay=given["weight_decay"])


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    kwargs = {**golden.kwargs, **overrides}
    batches = (jnp.asarray(golden.arrays["x"]), jnp.asarray(golden.arrays["y"]))
    if "multiplier" in kwargs:
        return run_ignite(golden, kwargs, batches)
    tx, start = base_of(golden), arrays_of(golden, "params0")
    parts = sam_gradient_parts(loss, **kwargs)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        value, grads, sam_grads = parts(params, *batch)
        updates, state = tx.update(sam_grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, grads, sam_grads, params)

    _, (value, grads, sam_grads, params) = jax.lax.scan(step, (start, tx.init(start)), batches)
    whole = sam_gradient(loss, **kwargs)
    wrapped = ok.sam(tx, kwargs["rho"], adaptive=kwargs["adaptive"])

    def step_wrapped(carry: Any, batch: Any) -> Any:
        params, state = carry
        _, again = whole(params, *batch)
        grad_fn = jax.grad(lambda p: loss(p, *batch))
        updates, state = wrapped.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
        return (params, state), (again, params)

    carry = (start, wrapped.init(start))
    _, (again, params_wrapped) = jax.lax.scan(step_wrapped, carry, batches)
    found = named(grads=grads, sam_grads=sam_grads) | {"loss": value}
    repeated = compare_named(golden, named(sam_grads=again))
    return {
        "params": parameter_error(golden, params),
        "params (wrapper)": parameter_error(golden, params_wrapped),
        **{f"{name} (alone)": error for name, error in repeated.items()},
        **compare_named(golden, found),
    }


def run_ignite(golden: Golden, kwargs: dict[str, Any], batches: Any) -> dict[str, float]:
    rho, rate, start = kwargs["rho"], kwargs["multiplier_lr"], arrays_of(golden, "params0")
    fn = ignite_gradient(
        loss, lambda params, x, y: jnp.mean(model(params, x)), rho=rho, r=kwargs["r"]
    )
    dual = ignite_multiplier(
        kwargs["multiplier"], learning_rate=rate, threshold=kwargs["threshold"], rho=rho
    )

    def step(carry: Any, batch: Any) -> Any:
        params, multiplier = carry
        _, combined, norm = fn(params, multiplier, *batch)
        params = jax.tree.map(lambda w, g: w - 0.05 * g, params, combined)
        return (params, dual.update(multiplier, norm)), (multiplier, norm, combined, params)

    _, (multiplier, norm, combined, params) = jax.lax.scan(step, (start, dual.init()), batches)
    found = {"multiplier": multiplier, "output_grad_norm": norm, **named(combined=combined)}
    return {"params": parameter_error(golden, params), **compare_named(golden, found)}
