"""Balanced factors of recorded ones, and factorized training in both of its forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optimkit as ok
from optimkit.matrices import refactorize, refactorize_params
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, relative_error

STANDS_FOR = {"refactorized_training": ("refactorized", "refactorize_params", "scale_by_adam")}
"""What a protocol that is no factory is made of."""

DESCRIBED = ("learning_rate", "weight_decay", "scaling")

NOT_COMPARED = {
    **{f"{side}{place}": "input" for side in "ab" for place in range(9)},
    "target": "input",
    "noise": "input",
    "lr": "input",
}


def run(golden: Golden) -> dict[str, float]:
    if "weight" not in golden.arrays:
        return balanced(golden)
    inside, loop = training(golden)
    error = relative_error(loop, golden.arrays["weight"])
    return compare_named(golden, {"weight": inside}) | {"weight (loop)": error}


def balanced(golden: Golden) -> dict[str, float]:
    errors = {}
    for place in range(sum(name.startswith("new_a") for name in golden.arrays)):
        a, b = (golden.arrays[f"{side}{place}"] for side in "ab")
        new_a, new_b = (np.asarray(x) for x in refactorize(a, b))
        # The reference's signs are arbitrary: each component gets that of our columns of a.
        signs = np.sign(np.sum(new_a * golden.arrays[f"new_a{place}"], axis=0))
        named = {f"new_a{place}": new_a * signs, f"new_b{place}": new_b * signs[:, None]}
        values = np.diag(np.diag(new_a.T @ new_a))
        errors |= compare_named(golden, named) | {
            f"product{place}": relative_error(new_a @ new_b, a @ b),
            f"gram{place} a": relative_error(new_a.T @ new_a, values),
            f"gram{place} b": relative_error(new_b @ new_b.T, values),
        }
    return errors


def training(golden: Golden) -> tuple[Any, Any]:
    """Weights after each update: jumps inside the transformation, and made by the loop."""
    kwargs = golden.kwargs
    rate, interval, scaling = (kwargs[k] for k in ("learning_rate", "interval", "scaling"))
    target = jnp.asarray(golden.arrays["target"])

    def weight(params: Any) -> Any:
        return scaling * params["a"] @ params["b"]

    def chain(core: Any) -> Any:
        decay = optax.add_decayed_weights(kwargs["weight_decay"])
        return optax.chain(core, decay, optax.scale_by_learning_rate(rate))

    def replay(tx: Any, after: Callable[..., Any]) -> Any:
        def step(carry: Any, given: Any) -> Any:
            (params, state), (noise, number) = carry, given
            residual = jax.lax.stop_gradient(weight(params) - target + noise)
            grads = jax.grad(lambda p: jnp.sum(residual * weight(p)))(params)
            updates, state = tx.update(grads, state, params)
            params, state = after(optax.apply_updates(params, updates), state, number)
            return (params, state), weight(params)

        params = {"a": jnp.asarray(golden.arrays["a0"]), "b": jnp.asarray(golden.arrays["b0"])}
        noise = jnp.asarray(golden.arrays["noise"])
        sequence = (noise, jnp.arange(1, len(noise) + 1))
        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), sequence)[1])()

    adam = ok.scale_by_adam(kwargs["b1"], kwargs["b2"], kwargs["eps"])
    forgets = ok.momentum_reset(adam, interval, moments="after", counts="after")
    inside = ok.refactorized(chain(forgets), interval, reset_state=False)

    loop = chain(adam)

    def rebuilt(params: Any, state: Any, number: Any) -> Any:
        def fresh() -> Any:
            new = refactorize_params(params)
            # The schedule goes on: its count alone is kept.
            return new, (loop.init(new)[0], *state[1:])

        return jax.lax.cond(number % interval == 0, fresh, lambda: (params, state))

    return replay(inside, lambda params, state, number: (params, state)), replay(loop, rebuilt)
