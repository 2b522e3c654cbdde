"""What lies between recorded norms and schedule: the median, and the rates before scaling."""

from __future__ import annotations

from typing import Any

from optimkit.schedules.refined import bound_minimizer, median_filter_norms
from tests.goldens.golden import Golden

NOT_COMPARED = {"grad_norms": "input"}


def observe(golden: Golden, values: Any, states: Any) -> dict[str, Any]:
    kwargs = golden.kwargs
    smoothed = median_filter_norms(kwargs["grad_norms"], kwargs["filter_fraction"])
    weights = smoothed ** -kwargs["power"]
    # The authors' function divides by the last weight, which the scaling to maximum 1 undoes.
    return {"smoothed": smoothed, "raw": bound_minimizer(weights) / weights[-1]}
