"""Forecasts, the search's posterior, and the controller's reply to every message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from optimkit.controllers import (
    AutoLRSController,
    drop_outliers,
    exponential_forecast,
    gp_lcb_suggest,
    gp_posterior,
)
from optimkit.controllers.suggest import to_unit
from tests.goldens.adapters import compare_named
from tests.goldens.golden import Golden, relative_error

NOT_COMPARED = {
    "losses": "input",
    "lrs": "input",
    "kinds": "input: which message the client sends",
    "grid_u": "input",
}


def forecast(golden: Golden) -> dict[str, float]:
    losses, kwargs = golden.arrays["losses"], golden.kwargs
    fitted = exponential_forecast(losses, **kwargs)
    kept_x, kept_y = drop_outliers(losses, is_training=kwargs["is_training"])
    return compare_named(golden, {**fitted._asdict(), "kept_x": kept_x, "kept_y": kept_y})


def search(golden: Golden) -> dict[str, float]:
    """Our own fit of the kernel: the file has the reference's with its noise set to zero."""
    lrs, losses, kwargs = golden.arrays["lrs"], golden.arrays["losses"], golden.kwargs
    bounds = kwargs["min_lr"], kwargs["max_lr"]
    mean, std = gp_posterior(to_unit(lrs, *bounds), losses, golden.arrays["grid_u"])
    errors = compare_named(golden, {"mean": mean, "std": std})
    ours = to_unit(gp_lcb_suggest(lrs, losses, **kwargs), *bounds)
    theirs = to_unit(golden.arrays["next_lr"], *bounds)
    # Theirs is refined between random points: 0.02 in u is agreement, 1e-3 the tolerance.
    return errors | {"next_lr / 20": abs(float(ours - theirs)) / 20}


class Scripted(AutoLRSController):
    """Tries listed rates, a list a stage, in place of a search."""

    script: Sequence[Sequence[float]] = ()

    def suggest(self, lrs: Sequence[float], losses: Sequence[float]) -> float:
        return self.script[self.stage - 1][len(lrs)]


def said(command: Any) -> str:
    prefix = {"snapshot": "ckpt,", "restore": "restore,", "continue": ""}
    if command.kind in prefix:
        return prefix[command.kind] + str(command.lr)
    return {"evaluate": "evaluate", "stage_done": "save"}[command.kind]


def replies(golden: Golden) -> dict[str, float]:
    controller: Any = Scripted(**golden.kwargs, strict=True)
    controller.script = golden.meta["suggestions"]
    methods = {"startBO": "start", "loss": "step", "val_loss": "val"}
    wrong = 0
    sent = zip(golden.arrays["kinds"], golden.arrays["losses"], strict=True)
    for index, (kind, loss) in enumerate(sent):
        if index == len(golden.arrays["losses"]) // 2:  # a restart changes nothing
            controller = Scripted.from_dict(controller.to_dict())
            controller.script = golden.meta["suggestions"]
        command = getattr(controller, methods[str(kind)])(loss)
        wrong += said(command) != str(golden.arrays["replies"][index])
    told = np.array([[lr, predicted] for _, lr, predicted in controller.history])
    return {"replies": float(wrong), "tells": relative_error(told, golden.arrays["tells"])}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    runners = {"forecast": forecast, "gp": search, "controller": replies}
    return runners[golden.meta["kind"]](golden)
