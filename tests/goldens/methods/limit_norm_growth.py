"""The limiter over a recorded sequence of updates: what it lets pass, and the norm it keeps."""

from __future__ import annotations

from typing import Any

import jax

from tests.goldens.adapters import arrays_of, build, compare_named
from tests.goldens.golden import Golden, flatten

NOT_COMPARED = {"updates": "input"}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    tx, updates = build(golden, **overrides), arrays_of(golden, "updates")

    def step(state: Any, u: Any) -> Any:
        limited, state = tx.update(u, state)
        return state, (limited, state.norm)

    _, (limited, norm) = jax.lax.scan(step, tx.init(jax.tree.map(lambda u: u[0], updates)), updates)
    named = {f"limited/{name}": value for name, value in flatten(limited).items()}
    named |= {f"stored_norm/{name}": value for name, value in flatten(norm).items()}
    return compare_named(golden, named)
