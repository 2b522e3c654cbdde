"""O-DICE: the projection, the combined gradient, and Adam on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.multitask import orthogonal_gradient, project_orthogonal
from optimkit.numerics import tree_vdot
from tests.goldens import adapters
from tests.goldens.golden import Golden, flatten

NOT_COMPARED = {
    "forward_grad": "an input",
    "backward_grad": "an input",
    "base_grad": "an input: the linear part, which is not projected",
}

LEARNING_RATE = 0.01


def run(golden: Golden, **overrides: Any) -> adapters.Errors:
    forward, backward, base = (
        adapters.arrays_of(golden, name) for name in ("forward_grad", "backward_grad", "base_grad")
    )
    kwargs = {**golden.kwargs, **overrides}
    kept = jax.vmap(lambda p, s: project_orthogonal(p, s, **kwargs))(forward, backward)
    removed = jax.tree.map(jnp.subtract, backward, kept)
    coefficient = jax.vmap(lambda r, p: tree_vdot(r, p) / tree_vdot(p, p))(removed, forward)
    combined = jax.tree.map(lambda a, b, c: a + b + c, base, forward, kept)

    # The combiner, and the linear part added to its result, give the same.
    combiner = orthogonal_gradient(**kwargs)
    stacked = jax.tree.map(lambda *pair: jnp.stack(pair, axis=1), forward, backward)
    params = adapters.arrays_of(golden, "params0")
    state = combiner.init(params, 2)
    again = jax.vmap(lambda g: combiner.update(g, state)[0])(stacked)
    again = jax.tree.map(jnp.add, base, again)

    tx = optax.adam(LEARNING_RATE)

    def step(carry: Any, grads: Any) -> Any:
        params, inner = carry
        updates, inner = tx.update(grads, inner, params)
        params = optax.apply_updates(params, updates)
        return (params, inner), params

    _, trained = jax.lax.scan(step, (params, tx.init(params)), again)
    named = {f"combined/{name}": value for name, value in flatten(combined).items()}
    errors = adapters.compare_named(golden, {**named, "parallel_coef": coefficient})
    combiners = {f"combined/{name}": value for name, value in flatten(again).items()}
    for name, error in adapters.compare_named(golden, combiners).items():
        errors[f"{name} (combiner)"] = error
    return errors | {"params": adapters.parameter_error(golden, trained)}
