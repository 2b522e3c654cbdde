"""Eight-bit states: the maps, codes and largest magnitudes, and what codes stand for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optimkit as ok
from optimkit.transforms import dequantize_blockwise, dynamic_map, quantize_blockwise
from tests.goldens import adapters
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, flatten
from tests.goldens.methods import galore

RUNS_ALL = True


def arguments(golden: Golden) -> dict[str, Any]:
    return galore.arguments(golden) if _is_low_rank(golden) else golden.kwargs


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    if _is_low_rank(golden):
        return {}  # blocks of another order have other codes
    return _stored(golden, states[0])


def run(golden: Golden) -> dict[str, float]:
    if golden.kind != "trajectory":
        return code_books(golden)
    errors = adapters.run_trajectory(golden)
    if not _is_low_rank(golden):
        return errors
    # A tenth of the distance is agreement where blocks are of another order.
    loose = {f"{name} of our order / 20": error / 20 for name, error in errors.items()}
    return loose | low_rank_in_torch_order(golden)


def code_books(golden: Golden) -> dict[str, float]:
    """The two code books, and arrays written with them."""
    named = {"map/signed": dynamic_map(True), "map/unsigned": dynamic_map(False)}
    for case, signed in (("x_256", True), ("x_64", True), ("y_256", False)):
        how = {"signed": signed, "block_size": int(case[2:])}
        q = quantize_blockwise(golden.arrays[case[0]], **how)
        named[f"codes/{case}"], named[f"absmax/{case}"] = q
        named[f"dequant/{case}"] = dequantize_blockwise(q, **how)
    return compare_named(golden, named)


def low_rank_in_torch_order(golden: Golden) -> dict[str, float]:
    """GaLore around moments that are turned before they are cut into blocks."""
    kwargs = arguments(golden)
    assert kwargs["weight_decay"] == 0
    moments = ok.quantize_state(
        ok.scale_by_adam(kwargs["b1"], kwargs["b2"], kwargs["eps"]),
        block_size=kwargs["state_block_size"],
        min_size=kwargs["state_min_size"],
        block_axis="flat",
    )
    same = ("rank", "update_proj_gap", "scale", "proj_type", "projector")
    tx = optax.chain(
        ok.project_low_rank(turned(moments), **{name: kwargs[name] for name in same}),
        optax.scale_by_learning_rate(kwargs["learning_rate"]),
    )
    params, states = adapters.replay(golden, tx)
    stored = _stored(golden, states[0].inner_state, suffix="_torch")
    named = stored | galore.observe(golden, params, states)
    return {"params": adapters.parameter_error(golden, params)} | compare_named(golden, named)


def turned(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that sees the transpose of every matrix: torch's orientation."""
    inner = optax.with_extra_args_support(inner)

    def turn(tree: Any) -> Any:
        return jax.tree.map(jnp.transpose, tree)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = inner.update(turn(updates), state, turn(params), **extra)
        return turn(updates), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(turn(params)), update)


def _is_low_rank(golden: Golden) -> bool:
    return golden.factory_names == ["galore"]


def _stored(golden: Golden, state: Any, suffix: str = "") -> dict[str, Any]:
    """Codes and largest magnitudes at the last step; the moments themselves where no codes are."""
    coded = golden.meta.get("quantized_leaves", golden.meta.get("lowrank_leaves"))
    named = {}
    for short, field in (("m", "mu"), ("v", "nu")):
        codes = flatten(optax.tree.get(state.inner_state, field))
        absmax = flatten(optax.tree.get(state.absmax, field))
        for name in codes:
            folder = f"{short}_codes{suffix}" if name in coded else short
            named[f"{folder}/{name}"] = codes[name][-1]
            named[f"{short}_absmax/{name}"] = absmax[name][-1]
    return {name: np.asarray(value) for name, value in named.items()}


NOT_COMPARED = {"x": "an input", "y": "an input"}
