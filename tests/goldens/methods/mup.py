"""Multipliers of rate and decay for recorded shapes; z-loss and learning-rate sensitivity."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import optimkit as ok
from optimkit import nn
from optimkit.diagnostics import lr_sensitivity
from optimkit.transforms.mup import mup_multipliers, mup_weight_decay_multipliers
from tests.goldens.golden import Golden, flatten, nest, relative_error

INPUTS = ("shape", "base_shape", "learning_rates", "final_losses", "loss_init", "logits", "labels")
NOT_COMPARED = dict.fromkeys(INPUTS, "an input")

RENAMED = {"z_loss_coefficient": "coefficient"}
DESCRIBED = tuple(RENAMED)
"""Arguments that the recording of the metrics names otherwise."""


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    named = _multipliers(golden) if golden.tree("shape") else _metrics(golden, **overrides)
    return {name: relative_error(value, golden.arrays[name]) for name, value in named.items()}


def _multipliers(golden: Golden) -> dict[str, Any]:
    shapes, base = (
        nest({name: tuple(map(int, shape)) for name, shape in golden.tree(top).items()})
        for top in ("shape", "base_shape")
    )
    named = {}
    for label in ("adam", "adamw", "adamw_decoupled", "sgd"):
        optimizer = "sgd" if label == "sgd" else "adam"
        decays = mup_weight_decay_multipliers(
            shapes, base, optimizer=optimizer, decoupled=label == "adamw_decoupled"
        )
        rates = mup_multipliers(shapes, base, optimizer=optimizer)
        ones = jax.tree.map(jnp.ones, shapes, is_leaf=lambda node: isinstance(node, tuple))
        tx = ok.scale_by_mup(base, optimizer=optimizer)
        scaled, _ = tx.update(ones, tx.init(ones))
        for leaf, update in flatten(scaled).items():
            assert bool(jnp.all(update == flatten(rates)[leaf])), leaf
        named |= {f"{label}/lr_mult/{leaf}": value for leaf, value in flatten(rates).items()}
        named |= {f"{label}/wd_mult/{leaf}": value for leaf, value in flatten(decays).items()}
    # Where the model does not divide by the growth of its width, the rate of the readout does.
    rates, divided = (
        jax.tree.leaves(mup_multipliers(shapes, base, readout=how)) for how in ("multiplier", "lr")
    )
    readouts = {new for old, new in zip(rates, divided, strict=True) if old != new}
    named["readout_forward_mult"] = readouts.pop()
    assert not readouts
    return {name: value for name, value in named.items() if name in golden.arrays}


def _metrics(golden: Golden, **overrides: Any) -> dict[str, Any]:
    kwargs = {RENAMED.get(k, k): v for k, v in {**golden.kwargs, **overrides}.items()}
    arrays = {name: jnp.asarray(value) for name, value in golden.arrays.items()}
    picked = jnp.take_along_axis(arrays["logits"], arrays["labels"][..., None], axis=-1)[..., 0]
    entropy = jnp.mean(jax.nn.logsumexp(arrays["logits"], axis=-1) - picked)
    return {
        "lr_sensitivity": lr_sensitivity(
            arrays["final_losses"], arrays["loss_init"], arrays["learning_rates"]
        ),
        "cross_entropy": entropy,
        "z_loss_mean": nn.z_loss(arrays["logits"], 1.0),
        "total": entropy + nn.z_loss(arrays["logits"], **kwargs),
    }
