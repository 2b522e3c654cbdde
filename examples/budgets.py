"""REX against linear decay when there is little time: scikit-learn's digits at five budgets.

    python -m examples.budgets

Each schedule decays to zero within its budget, a share of the full run. Its rate is chosen for
each budget by the mean validation loss of all seeds; the tables show what that rate gives on test
images. ``optimkit.sweep`` trains all rates at once; the length of the schedule is an argument
like any other, so that all budgets of an optimizer share one compiled step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import app, flags, logging
from rich import box
from rich.console import Console
from rich.table import Table

import optimkit as ok
from examples import digits
from examples.lm.report import mean_and_spread, save_figure
from optimkit.sweep import sweep

SHARES = (0.01, 0.05, 0.10, 0.25, 1.0)
SCHEDULES: dict[str, Callable[..., Any]] = {
    "rex": ok.rex_schedule,
    "linear": ok.linear_decay_schedule,
}


def _momentum(schedule: Any) -> optax.GradientTransformation:
    return optax.sgd(schedule, momentum=0.9)


OPTIMIZERS: dict[str, tuple[Callable[..., Any], list[float]]] = {
    "sgd, momentum 0.9": (_momentum, [0.01, 0.03, 0.1, 0.3, 1.0]),
    "adam": (optax.adam, [0.001, 0.003, 0.01, 0.03, 0.1]),
}
"""What to train with, and the rates to try."""


class Cell(NamedTuple):
    """One optimizer, schedule and budget: the best rate, and what it gave for every seed."""

    rate: float
    losses: np.ndarray
    errors: np.ndarray


Results = dict[tuple[str, str], list[Cell]]
"""By optimizer and schedule: one cell a budget."""


def factory_of(optimizer: str, schedule: str) -> Callable[..., Any]:
    """Makes the optimizer from a peak and a length, both of which can be swept."""
    make, curve = OPTIMIZERS[optimizer][0], SCHEDULES[schedule]

    def factory(learning_rate: Any, steps: Any) -> optax.GradientTransformation:
        return make(curve(learning_rate, steps))

    return factory


def measure(optimizer: str, schedule: str, budgets: Sequence[int], seeds: int) -> list[Cell]:
    """Trains every rate at every budget with every seed."""
    factory, rates = factory_of(optimizer, schedule), OPTIMIZERS[optimizer][1]
    data = digits.load()
    test_loss, test_error = (
        jax.jit(jax.vmap(function, in_axes=(0, None)))
        for function in (digits.loss_fn, digits.error_rate)
    )

    def score_fn(params: Any) -> jax.Array:
        return digits.loss_fn(params, data.validation)

    cells = []
    for budget in budgets:
        scores, losses, errors = [], [], []
        for seed in range(seeds):
            found = sweep(
                factory,
                digits.loss_fn,
                digits.init_params(seed),
                data.batches(budget, seed),
                score_fn=score_fn,
                keep_params=True,
                learning_rate=rates,
                steps=[budget],
            )
            scores.append(np.where(found.diverged, np.inf, found.scores))
            losses.append(test_loss(found.params, data.test))
            errors.append(test_error(found.params, data.test))
        best = int(np.argmin(np.mean(scores, axis=0)))
        cells.append(Cell(rates[best], np.array(losses)[:, best], np.array(errors)[:, best]))
    return cells


def table(optimizer: str, results: Results, budgets: Sequence[int]) -> Table:
    """A row for every budget, the schedules side by side."""
    seeds = len(next(iter(results.values()))[0].losses)
    made = Table(title=f"{optimizer}, test images, mean±sd over {seeds} seeds")
    made.box, made.padding, made.pad_edge = box.SIMPLE, (0, 0, 0, 1), False
    headings = [f"{name}\n{what}" for name in SCHEDULES for what in ("rate", "loss", "errors %")]
    for heading in ("steps", *headings, "rex\nlower"):
        made.add_column(heading, justify="right", no_wrap=True)
    for place, budget in enumerate(budgets):
        cells = [results[optimizer, schedule][place] for schedule in SCHEDULES]
        shown = []
        for cell in cells:
            losses, errors = mean_and_spread(cell.losses), mean_and_spread(100 * cell.errors, 1)
            shown += [f"{cell.rate:g}", losses, errors]
        lower = int(np.sum(cells[0].losses < cells[1].losses))
        made.add_row(f"{budget}", *shown, f"{lower} of {seeds}")
    return made


def draw(results: Results, budgets: Sequence[int], path: Path) -> None:
    """The test loss of both schedules over the budget, a panel for each optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(OPTIMIZERS), 4.5), layout="constrained")
    for axes, optimizer in zip(figure.subplots(1, len(OPTIMIZERS)), OPTIMIZERS, strict=True):
        for schedule, marker in zip(SCHEDULES, "os", strict=True):
            losses = np.array([cell.losses for cell in results[optimizer, schedule]])
            axes.errorbar(
                budgets, losses.mean(1), losses.std(1), marker=marker, capsize=3, label=schedule
            )
        axes.set(title=optimizer, xlabel="budget (steps)", ylabel="test loss (nats)")
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        "The best rate of each schedule at each budget; bars: standard deviation over seeds"
    )
    save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    """Trains, prints the table, draws the picture."""
    del argv
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    began = time.perf_counter()
    budgets = [max(1, round(share * flags.FLAGS.steps)) for share in SHARES]
    results = {
        (optimizer, schedule): measure(optimizer, schedule, budgets, flags.FLAGS.seeds)
        for optimizer in OPTIMIZERS
        for schedule in SCHEDULES
    }
    for optimizer in OPTIMIZERS:
        Console().print(table(optimizer, results, budgets))
    path = Path(flags.FLAGS.out) / "budgets.png"
    draw(results, budgets, path)
    print(f"{time.perf_counter() - began:.0f} s in all. The picture is {path.resolve()}")


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 1000, "updates of the full budget", lower_bound=1)
    flags.DEFINE_integer("seeds", 5, "runs of every setting", lower_bound=1)
    flags.DEFINE_string("out", "out", "folder of budgets.png")
    app.run(main)
