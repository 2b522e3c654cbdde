"""Three predictors from recorded checkpoints; regimes and acceptance from recorded activations."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from optimkit.controllers import (
    accept,
    activation_similarity,
    activation_variance,
    calibrate_thresholds,
    loss_curvature,
    predict_adam_momentum,
    predict_linear,
    predict_quadratic,
    regime_from_similarity,
)
from tests.goldens.adapters import arrays_of, compare_named
from tests.goldens.golden import Golden, flatten, relative_error

NOT_COMPARED = {
    "K": "input",
    "checkpoint0": "input",
    "checkpoint1": "input",
    "checkpoint2": "input",
    "exp_avg": "input",
    "exp_avg_sq": "input",
    "activations": "input",
    "losses": "input",
    "predicted_losses": "input",
}
DESCRIBED = ("percentile_high", "percentile_low")


def predictions(golden: Golden) -> dict[str, float]:
    old, middle, new = (arrays_of(golden, f"checkpoint{i}") for i in range(3))
    mu, nu = arrays_of(golden, "exp_avg"), arrays_of(golden, "exp_avg_sq")
    interval = golden.kwargs["interval"]
    ratio = golden.kwargs["max_acceleration_ratio"]
    adam = {name: golden.kwargs[name] for name in ("eps", "scale")}
    errors: dict[str, float] = {}
    for index, steps in enumerate(golden.arrays["K"].tolist()):
        made = {
            "linear": predict_linear(middle, new, steps, interval),
            "quadratic": predict_quadratic(
                old, middle, new, steps, interval, max_acceleration_ratio=ratio
            ),
            "momentum": predict_adam_momentum(
                new, mu, nu, steps, golden.kwargs["learning_rate"], **adam
            ),
        }
        for kind, tree in made.items():
            for leaf, got in flatten(tree).items():
                recorded = golden.arrays[f"{kind}/{leaf}"][index]
                start = golden.arrays[f"checkpoint2/{leaf}"]
                error = relative_error(got[None], recorded[None], start)
                name = f"{kind}/{leaf}"
                if kind == "momentum":  # the reference works in f32: 1e-6 is agreement
                    name, error = f"{name} / 1000", error / 1000
                errors[name] = max(errors.get(name, 0.0), error)
    return errors


def regimes(golden: Golden) -> dict[str, float]:
    arrays, kwargs = golden.arrays, golden.kwargs
    activations, losses = jnp.asarray(arrays["activations"]), arrays["losses"]
    similarity = jnp.stack(
        [activation_similarity(a, b) for a, b in itertools.pairwise(activations)]
    )
    low, high = kwargs["tau_low"], kwargs["tau_high"]
    criteria: Any = ("strict", "adaptive", "pct")
    accepted = [
        accept(arrays["predicted_losses"], losses, criterion=c, loss_std=np.std(losses))
        for c in criteria
    ]
    errors = compare_named(
        golden,
        {
            "similarity": similarity,
            "variance": activation_variance(activations),
            "regime": regime_from_similarity(similarity, low, high),
            "curvature": loss_curvature(losses),
            "accepted": np.stack(accepted, axis=1),
        },
    )
    if "percentiles" in golden.meta["reference"]:
        ours = calibrate_thresholds(similarity, kwargs["percentile_low"], kwargs["percentile_high"])
        errors["thresholds"] = relative_error(ours, np.array([low, high]))
    return errors


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    return predictions(golden) if "K" in golden.arrays else regimes(golden)
