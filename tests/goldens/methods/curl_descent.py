"""The signs, and the loss against the teacher at the parameters before each step."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from optimkit import transforms
from tests.goldens.adapters import arrays_of
from tests.goldens.golden import Golden, before_each_step

NOT_COMPARED = {"X": "input", "teacher": "input"}

PHI = {"lin": lambda x: x, "tanh": jnp.tanh, "relu": lambda x: jnp.maximum(x, 0)}


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    kwargs = golden.kwargs
    signs = transforms.rule_flip_mask(
        arrays_of(golden, "params0"), kwargs["flips"], side=kwargs["side"]
    )
    named = {}
    for name, recorded in golden.tree("signs").items():
        layer, kernel = name.split("/")
        ours = signs[layer][kernel]
        named[f"signs/{name}"] = np.broadcast_to(1 if ours is None else ours, recorded.shape)
    nonlinearity = re.search(r"nonlinearity=(\w+)", golden.meta["reference"])
    assert nonlinearity is not None
    phi = PHI[nonlinearity[1]]
    x = jnp.asarray(golden.arrays["X"]).T

    def forward(hidden: Any, output: Any) -> Any:
        return phi(phi(x @ hidden) @ output)

    target = forward(*(golden.arrays[f"teacher/{n}/kernel"] for n in ("hidden", "output")))
    before = before_each_step(golden, params)
    losses = [
        jnp.mean(jnp.square(forward(hidden, output) - target)) / 2  # over outputs, too
        for hidden, output in zip(before["hidden/kernel"], before["output/kernel"], strict=True)
    ]
    named["loss"] = jnp.stack(losses)
    return named
