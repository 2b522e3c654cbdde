"""Stable-SPAM's gradients after each of its two pieces, and the scale of its decays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.optimizers.stable_spam import momentum_decay_scale
from optimkit.transforms.tracked_max import clip_by_tracked_max
from tests.goldens.adapters import arrays_of
from tests.goldens.golden import Golden, flatten


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    kwargs, grads = golden.kwargs, arrays_of(golden, "grads")
    restart = kwargs["reset_interval"] if kwargs["reset_style"] == "reference" else None
    clip = clip_by_tracked_max(kwargs["gamma3"], count_restart=restart)

    def step(state: Any, g: Any) -> Any:
        clipped, state = clip.update(g, state)
        return state, clipped

    _, clipped = jax.lax.scan(step, clip.init(jax.tree.map(lambda g: g[0], grads)), grads)
    named = {f"clipped/{name}": value for name, value in flatten(clipped).items()}
    if kwargs["b1"] == 0:  # then the first moment is the gradient that Adam saw
        mu = flatten(optax.tree.get(states, "mu"))
        named |= {f"normalized/{name}": value for name, value in mu.items()}
    if kwargs.get("total_steps") is not None:
        counts = jnp.arange(golden.meta["steps"])
        named["decay_scale"] = momentum_decay_scale(
            counts, kwargs["total_steps"], kwargs["eta_min"]
        )
    return named
