"""Masks and drop rates after every step; the densities of ERK at several sparsities."""

from __future__ import annotations

import ast
from typing import Any

import jax
import numpy as np
import optax

from optimkit.transforms import erk_densities
from optimkit.wrappers.dynamic_sparse import drop_rate_at
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, flatten, nest

NOT_COMPARED = {"mask0": "input", "torch_shape": "input"}


def arguments(golden: Golden) -> dict[str, Any]:
    """The inner optimizer as it is written, and the recorded first masks."""
    kwargs = golden.kwargs
    call = ast.parse(kwargs.pop("inner"), mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Attribute)
    positional = [ast.literal_eval(value) for value in call.args]
    named = {str(given.arg): ast.literal_eval(given.value) for given in call.keywords}
    inner = getattr(optax, call.func.attr)(*positional, **named)
    first = golden.tree("mask0")
    masks = nest({name: first.get(name) for name in golden.tree("params0")})
    return {**kwargs, "inner": inner, "sparse_init": masks}


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    kwargs = golden.kwargs
    steps = np.arange(1, golden.meta["steps"] + 1)
    rate = jax.vmap(
        lambda t: drop_rate_at(
            t, kwargs["total_steps"], kwargs["drop_rate"], kwargs["drop_rate_final"]
        )
    )
    named = {f"masks/{name}": masks for name, masks in flatten(states.masks).items()}
    return {**named, "death_rate": rate(steps)}


def run(golden: Golden) -> dict[str, float]:
    """ERK at every recorded density, in both layouts."""
    order, named = golden.meta["layer_order"], {}
    for layout in (1, -1):
        shapes = {n: golden.arrays[f"torch_shape/{n}"].tolist()[::layout] for n in order}
        for name in golden.tree("density"):
            found = erk_densities(shapes, float(name), **golden.kwargs)
            named[f"density/{name}"] = [found[layer] for layer in order]
    return compare_named(golden, named)
