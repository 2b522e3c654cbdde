"""Rounds of clients with quadratic losses, whose noise was drawn beforehand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, relative_error, resolve

NOT_COMPARED = {
    "A": "input",
    "b": "input",
    "noise": "input",
    "participants": "input",
}


def gradient(params: Any, batch: Any) -> Any:
    matrix, vector, noise = batch
    return matrix @ params - vector + noise


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    arrays = {name: jnp.asarray(array) for name, array in golden.arrays.items()}
    method = resolve(golden.factory_names[0])(gradient, **{**golden.kwargs, **overrides})
    clients, steps = arrays["noise"].shape[1:3]

    def repeated(each: Any) -> Any:
        return jnp.repeat(each[:, None], steps, axis=1)

    @jax.jit
    def rounds(participants: Any, noise: Any) -> Any:
        def one(state: Any, given: Any) -> Any:
            who, noise = given
            batches = (repeated(arrays["A"][who]), repeated(arrays["b"][who]), noise[who])
            state, _ = method.round(state, batches, who)
            return state, state._replace(client_controls=None)

        return jax.lax.scan(one, method.init(arrays["params0"], clients), (participants, noise))

    last, each = rounds(arrays["participants"], arrays["noise"])
    origin = golden.arrays["params0"]
    errors = {"params": relative_error(each.params, golden.arrays["params"], origin)}
    # Without controls the file holds zeros.
    zeros = np.zeros_like(golden.arrays["server_control"])
    control = zeros if each.server_control is None else each.server_control
    controls = last.client_controls
    if controls is None:
        controls = np.zeros_like(golden.arrays["client_controls"])
    named = {"direction": each.direction, "server_control": control, "client_controls": controls}
    return errors | compare_named(golden, named)
