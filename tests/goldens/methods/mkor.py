"""MKOR: statistics of each step, factors and flags after it; the optimizer behind, by its name."""

from __future__ import annotations

import ast
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.mkor import ScaleByMkorState
from optimkit.transforms.momentum import dampened_trace
from tests.goldens.golden import Golden

NOT_COMPARED = {"stats": "input: mean input and summed output gradient of each layer"}


def arguments(golden: Golden) -> dict[str, Any]:
    kwargs = dict(golden.kwargs)
    if isinstance(kwargs.get("inner"), str):
        kwargs["inner"] = behind(kwargs["inner"])
    return kwargs


def behind(text: str) -> optax.GradientTransformation:
    """``sgd({...})`` or ``adam({...})`` with torch's arguments and meaning."""
    name, _, rest = text.partition("(")
    options = dict(ast.literal_eval(rest.rstrip(")") or "{}"))
    rate = options.pop("lr")
    decay = optax.add_decayed_weights(options.pop("weight_decay", 0.0))
    if name == "sgd":
        inner: Any = dampened_trace(options.pop("momentum", 0.0), first="copy")
    else:
        b1, b2 = options.pop("betas", (0.9, 0.999))
        inner = {"adam": scale_by_adam}[name](b1, b2, options.pop("eps", 1e-8))
    assert not options, f"{text}: {sorted(options)} are not translated"
    return optax.chain(decay, inner, optax.scale_by_learning_rate(rate))


def layers(golden: Golden) -> list[str]:
    return list(dict.fromkeys(name.rpartition("/")[0] for name in golden.tree("stats")))


def extras_each_step(golden: Golden) -> dict[str, Any]:
    stats = golden.tree("stats")
    if not stats:
        return {}
    return {
        "layer_stats": {
            layer: {
                "a": jnp.asarray(stats[f"{layer}/mean_act"]),
                "g": jnp.asarray(stats[f"{layer}/sum_outgrad"]),
            }
            for layer in layers(golden)
        }
    }


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    del params
    if not golden.tree("stats"):
        return {}  # LAMB alone
    state = next(s for s in states if isinstance(s, ScaleByMkorState))
    named: dict[str, Any] = {}
    flags = []
    for layer in layers(golden):
        at = [_at(tree, layer) for tree in state[1:]]
        inputs, outputs, reset_inputs, reset_outputs = (node["kernel"] for node in at)
        if inputs is None:  # skipped: never refreshed, so the flags stay as they began
            flags.append(jnp.ones((golden.meta["steps"], 2), bool))
            continue
        if at[0].get("bias") is not None:
            border = at[0]["bias"]
            top = jnp.concatenate([inputs, border[:, :-1, None]], axis=2)
            inputs = jnp.concatenate([top, border[:, None, :]], axis=1)
        named[f"precond/{layer}/A_inv"], named[f"precond/{layer}/G_inv"] = inputs, outputs
        flags.append(jnp.stack([jnp.asarray(reset_inputs), jnp.asarray(reset_outputs)], axis=1))
    if "reset_flags_after_step" in golden.arrays:
        recorded = golden.arrays["reset_flags_after_step"].shape[1]
        if recorded < len(flags):
            flags = [f for f, name in zip(flags, layers(golden), strict=True)
                     if f"precond/{name}/A_inv" in named]  # fmt: skip
        named["reset_flags_after_step"] = jnp.stack(flags, axis=1)
    if "stabilised" in golden.arrays:
        named["stabilised"] = stabilised(golden, named)
    return named


def stabilised(golden: Golden, named: dict[str, Any]) -> np.ndarray:
    """Whether each factor was too large when its refresh began."""
    due = np.arange(golden.meta["steps"]) % golden.kwargs["inv_freq"] == 0
    columns = []
    for what in ("A_inv", "G_inv"):
        (after,) = (np.asarray(x) for name, x in named.items() if name.endswith(what))
        before = np.concatenate([np.eye(after.shape[-1])[None], after[:-1]])
        fired = np.max(np.abs(before), axis=(1, 2)) > golden.kwargs["threshold"]
        columns.append(due & fired)
    return np.stack(columns, axis=1)


def _at(tree: Any, layer: str) -> dict[str, Any]:
    for part in layer.split("/"):
        tree = tree[part]
    return tree
