"""``lr`` of torch's ReduceLROnPlateau, whose patience is one less than optax's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from tests.goldens.golden import Golden, relative_error


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    kwargs = {**golden.kwargs, **overrides}
    tx = optax.contrib.reduce_on_plateau(**{**kwargs, "patience": kwargs["patience"] + 1})
    updates = {"w": jnp.ones(1)}
    state, scales = tx.init(updates), []
    for loss in golden.arrays["loss"]:
        _, state = tx.update(updates, state, value=loss)
        scales.append(float(state.scale))
    rates = golden.arrays["lr"]
    return {"lr": relative_error(jnp.asarray(scales) * rates[0], rates)}


NOT_COMPARED = {"loss": "input"}
