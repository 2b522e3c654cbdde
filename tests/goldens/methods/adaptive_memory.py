"""``beta``: one column a leaf, in the order in which the recording lists its leaves."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from tests.goldens.golden import Golden, flatten


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    beta = optax.tree.get(states, "beta")
    columns = flatten(beta) if golden.kwargs.get("scope") == "leaf" else {}
    return {"beta": jnp.stack([columns.get(name, beta) for name in golden.meta["leaves"]], axis=1)}
