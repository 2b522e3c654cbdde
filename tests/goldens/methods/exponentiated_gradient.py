"""The samplers: a chain of steps on the recorded scores and noise, and a step without noise."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, relative_error, resolve

NOT_COMPARED = dict.fromkeys(("x0", "score", "noise", "anneal"), "input")


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    step = functools.partial(resolve(golden.factory_names[0]), **{**golden.kwargs, **overrides})
    x0, score, noise, anneal = (
        jnp.asarray(golden.arrays[name]) for name in ("x0", "score", "noise", "anneal")
    )

    def move(x: Any, inputs: Any) -> Any:
        score, noise, anneal = inputs
        x = step(x, score, noise, anneal=anneal)
        return x, x

    last, samples = jax.jit(lambda: jax.lax.scan(move, x0, (score, noise, anneal)))()
    denoised = step(last, score[-1], jnp.zeros_like(last))
    moved = relative_error(samples, golden.arrays["x"], golden.arrays["x0"])
    return {"x": moved, **compare_named(golden, {"denoised": denoised})}
