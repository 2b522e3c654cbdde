"""Exact proximal rounds of a tabular policy, and a recorded sequence of parameters."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from optimkit.controllers import accelerate_outer, extrapolate_parameters
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden

NOT_COMPARED = {"reward": "input", "log_ref": "input", "beta": "input", "theta_hat": "input"}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    alpha = {**golden.kwargs, **overrides}["alpha"]
    arrays = {name: jnp.asarray(array) for name, array in golden.arrays.items()}
    init, update = accelerate_outer(alpha, space="logits")
    policy, state, hats, policies = arrays["log_ref"], init(arrays["log_ref"]), [], []
    for _ in range(golden.meta["steps"]):
        hat = jax.nn.log_softmax(policy + arrays["reward"] / arrays["beta"], axis=-1)
        policy, state = update(hat, state)
        hats.append(hat)
        policies.append(policy)
    theta = arrays["theta_hat"]
    init, update = accelerate_outer(alpha)
    state, extrapolated = init(theta[0]), []
    for hat in theta[1:]:
        new, state = update(hat, state)
        extrapolated.append(new)
    moved = [extrapolate_parameters(new, old, alpha) for old, new in itertools.pairwise(theta)]
    named = {"log_hat": hats, "log_policy": policies, "theta_extrapolated": extrapolated}
    errors = compare_named(golden, {name: jnp.stack(each) for name, each in named.items()})
    again = compare_named(golden, {"theta_extrapolated": jnp.stack(moved)})
    return errors | {f"{name} (function)": error for name, error in again.items()}
