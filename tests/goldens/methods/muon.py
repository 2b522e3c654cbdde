"""The Newton-Schulz function on its own: ``in/<shape>`` under three coefficient tables."""

from __future__ import annotations

import jax.numpy as jnp

from optimkit.matrices.newton_schulz import newton_schulz
from tests.goldens.golden import Golden, relative_error

NOT_COMPARED = {"in": "input"}

TABLES = {
    "keller5": (3.4445, -4.7750, 2.0315),
    "dion5": "dion",
    "polar_express": "polar_express",
}


def run(golden: Golden, **overrides: object) -> dict[str, float]:
    del overrides
    errors = {}
    for name, recorded in golden.arrays.items():
        table, _, shape = name.partition("/")
        if table in TABLES:
            x = jnp.asarray(golden.arrays[f"in/{shape}"])
            errors[name] = relative_error(newton_schulz(x, 5, TABLES[table]), recorded)
    return errors
