"""The adapted rate of every step."""

from __future__ import annotations

from typing import Any

import jax

import optimkit as ok
from tests.goldens.golden import Golden


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    return {"lr": jax.vmap(ok.get_learning_rate)(states)}
