"""Running extrema, minima, WC-ACC and LCA, by the exact and by the published search."""

from __future__ import annotations

from typing import Any

import numpy as np

from optimkit.diagnostics import continual_metrics, windowed_max_drop
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, relative_error

NOT_COMPARED = {"accuracy": "input", "current_task": "input"}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    kwargs = {**golden.kwargs, **overrides}
    accuracy, task = golden.arrays["accuracy"], golden.arrays["current_task"]
    exact = continual_metrics(accuracy, task, **kwargs)
    published = continual_metrics(accuracy, task, **kwargs, window_search="reference")
    lowest = exact["min_acc_per_task"]
    first = ~np.isnan(accuracy[:, 0])
    drop = windowed_max_drop(accuracy[first, 0], kwargs["forgetting_window"])
    named = {
        "max_forgetting": published["wf_per_task"],
        "max_plasticity": published["wp_per_task"],
        "max_forgetting_paper": exact["wf_per_task"],
        "max_plasticity_paper": exact["wp_per_task"],
        "min_accuracy": np.where(np.isnan(lowest), 1.0, lowest),
        "wc_acc": exact["wc_acc"],
        "lca": exact["lca_per_task"],
    }
    scanned = relative_error(drop, golden.arrays["max_forgetting_paper"][first, 0])
    return {**compare_named(golden, named), "max_forgetting_paper (scan)": scanned}
