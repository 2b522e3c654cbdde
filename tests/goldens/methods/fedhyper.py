"""The server's rounds over recorded mean deltas, and the client's steps with their rates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.goldens.adapters import arrays_of, build, compare_named
from tests.goldens.golden import Golden, relative_error

NOT_COMPARED = {
    "params0": "input",
    "mean_delta": "input",
    "global_update": "input: the extra argument of every step",
    "local_lr": "of no meaning outside server_local, where it is compared",
}


def extras(golden: Golden) -> dict[str, Any]:
    """What every step of a client is given beside its gradient."""
    return {"global_update": arrays_of(golden, "global_update")}


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    after = optax.tree.get(states, "scale")  # for the next step
    return {"lr": golden.kwargs["learning_rate"] * jnp.concatenate([jnp.ones(1), after[:-1]])}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    ours = build(golden, **overrides)
    origin = jnp.asarray(golden.arrays["params0"])
    is_rate = golden.factory_names == ["fedhyper_server_local"]

    @jax.jit
    def rounds(deltas: Any) -> Any:
        def step(carry: Any, delta: Any) -> Any:
            params, state = carry
            out, state = ours.update(delta, state)
            params = params + (delta if is_rate else out)
            return (params, state), (params, state.alignment, out)

        return jax.lax.scan(step, (origin, ours.init(origin)), deltas)[1]

    params, alignment, out = rounds(jnp.asarray(golden.arrays["mean_delta"]))
    errors = {"params": relative_error(params, golden.arrays["params"], np.asarray(origin))}
    errors |= compare_named(golden, {"agg": alignment})
    if is_rate:
        return errors | compare_named(golden, {"local_lr": out})
    return errors
