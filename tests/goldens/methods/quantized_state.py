"""Eight-bit states: the maps, codes and largest magnitudes, and what codes stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import optax

from optimkit.transforms import dequantize_blockwise, dynamic_map, quantize_blockwise
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, flatten


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    state = states[0]
    named = {}
    for short, field in (("m", "mu"), ("v", "nu")):
        codes = flatten(optax.tree.get(state.inner_state, field))
        absmax = flatten(optax.tree.get(state.absmax, field))
        for name in codes:
            # The arrays of the last step.
            plain = name not in golden.meta["quantized_leaves"]
            named[f"{short}/{name}" if plain else f"{short}_codes/{name}"] = codes[name][-1]
            named[f"{short}_absmax/{name}"] = absmax[name][-1]
    return {name: np.asarray(value) for name, value in named.items()}


def run(golden: Golden) -> dict[str, float]:
    """The two code books, and arrays written with them."""
    named = {"map/signed": dynamic_map(True), "map/unsigned": dynamic_map(False)}
    for case, signed in (("x_256", True), ("x_64", True), ("y_256", False)):
        how = {"signed": signed, "block_size": int(case[2:])}
        q = quantize_blockwise(golden.arrays[case[0]], **how)
        named[f"codes/{case}"], named[f"absmax/{case}"] = q
        named[f"dequant/{case}"] = dequantize_blockwise(q, **how)
    return compare_named(golden, named)


NOT_COMPARED = {"x": "an input", "y": "an input"}
