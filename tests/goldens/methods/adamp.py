"""``branch/<leaf>``: 0 no projection, 1 channel view, 2 layer view."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import matrix_axes
from optimkit.transforms.radial import project_radial_leaf
from tests.goldens.golden import Golden, before_each_step


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    kwargs, named = golden.kwargs, {}
    for name, weights in before_each_step(golden, params).items():
        axes = matrix_axes(name, weights[0])
        if axes is None:
            named[f"branch/{name}"] = np.zeros(len(weights))
            continue

        def decide(g: Any, w: Any, axes: Any = axes) -> Any:
            decision = project_radial_leaf(
                g,
                w,
                w,
                delta=kwargs["delta"],
                eps=kwargs["eps"],
                wd_ratio=kwargs["wd_ratio"],
                inputs=axes.inputs,
                outputs=axes.outputs,
            )
            return decision.branch

        gradients = jnp.asarray(golden.tree("grads")[name])
        named[f"branch/{name}"] = jax.vmap(decide)(gradients, weights).reshape(len(weights))
    return named
