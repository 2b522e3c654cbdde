"""Weights of pass rates, as they are and over their mean."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, resolve

NOT_COMPARED = {"pass_rate": "input"}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    rates = jnp.asarray(golden.arrays["pass_rate"])
    fn, kwargs = resolve(golden.factory_names[0]), {**golden.kwargs, **overrides}
    named = {
        "weight": fn(rates, **kwargs),
        "weight_mean_normalized": fn(rates, **kwargs, normalize=True),
    }
    return compare_named(golden, named)
