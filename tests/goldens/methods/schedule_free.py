"""y, x, z, the rate and the sum of weights; the quadratic recomputes its gradients at our y."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optimkit as ok
from tests.goldens.adapters import build
from tests.goldens.golden import Golden, flatten

NOT_COMPARED = {
    "quad": "A, b and noise are inputs: they define the gradient A y - b + noise[t]",
    "lr": "input: the table of rates",
}


def evaluations(params: Any, states: Any) -> Any:
    """x after every step."""
    return jax.vmap(ok.schedule_free_eval_params)(states, params)


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    (state,) = states
    named = {
        **{f"eval_params/{name}": x for name, x in flatten(evaluations(params, states)).items()},
        **{f"z/{name}": z for name, z in flatten(state.z).items()},
        "scheduled_lr": state.learning_rate,
        "weight_sum": state.weight_sum,
    }
    back = jax.vmap(ok.schedule_free_train_params)(states, evaluations(params, states))
    named |= {f"params/{name}": y for name, y in flatten(back).items()}
    return named | (own_path(golden) if golden.tree("quad") else {})


def own_path(golden: Golden) -> dict[str, Any]:
    """The quadratic case with gradients taken where we are, not where the recording was."""
    quad = {name: jnp.asarray(value) for name, value in golden.tree("quad").items()}
    tx = build(golden)
    start = jnp.asarray(golden.tree("params0")["w"])

    def step(carry: Any, noise: Any) -> Any:
        y, state = carry
        gradient = quad["A"] @ y - quad["b"] + noise
        updates, state = tx.update(gradient, state, y)
        y = optax.apply_updates(y, updates)
        return (y, state), (gradient, y, ok.schedule_free_eval_params(state, y))

    _, (gradients, y, x) = jax.lax.scan(step, (start, tx.init(start)), quad["noise"])
    return {"grads/w": gradients, "params/w": y, "eval_params/w": x}
