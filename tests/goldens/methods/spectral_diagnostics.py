"""Spectra, ranks and decay of representations; ranks of growing prefixes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from optimkit import diagnostics
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden

NOT_COMPARED = {"activations": "input", "hidden": "input"}
SINGLE = 1e-4
"""What the reference's f32 arithmetic may cost its effective ranks."""


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    kwargs = {**golden.kwargs, **overrides}
    if "hidden" in golden.arrays:
        # The reference works in f32; so do we, on its input.
        ranks, velocity, acceleration = diagnostics.effective_rank_dynamics(
            jnp.asarray(golden.arrays["hidden"]), **kwargs
        )
        return compare_named(
            golden,
            {
                "effective_rank": ranks,
                "velocity": velocity,
                "acceleration": acceleration,
                "velocity_mean": jnp.mean(velocity),
                "acceleration_mean": jnp.mean(acceleration),
            },
        )
    x = jnp.asarray(golden.arrays["activations"])
    alpha, r2 = diagnostics.alpha_req(x, **kwargs)
    spectrum = diagnostics.eigenspectrum(x)
    exact = {
        "eigenvalue_ratios": spectrum,
        "alpha": alpha,
        "r2": r2,
        "rankme_covariance": diagnostics.rankme(x),
        "rankme_singular": diagnostics.rankme(x, variant="singular"),
        "traditional_rank": jnp.sum(spectrum > 1e-12),
    }
    single = {
        "effective_rank": diagnostics.effective_rank(x),
        "log_effective_rank": diagnostics.effective_rank(x, log=True),
    }
    within = compare_named(golden, single)
    return {
        **compare_named(golden, exact),
        **{name: error * golden.tolerance / SINGLE for name, error in within.items()},
    }
