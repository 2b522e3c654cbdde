"""``gsnr/<leaf>``: the factors, frozen at the first step."""

from __future__ import annotations

from typing import Any

import jax
import optax

from tests.goldens.golden import Golden, flatten


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    del params
    last = jax.tree.map(lambda s: s[-1], optax.tree.get(states, "factor"))
    return {f"gsnr/{name}": factor for name, factor in flatten(last).items()}
