"""Finished models at three budgets: WSD-S against repeated cosine, on the language model.

    python -m examples.lm.finished_models

Four ways to a good model after 100, 200 and 400 steps, all with one peak rate:

``cosine each``     a run of its own for every budget: what the others are measured against.
``repeated cosine`` one run, whose cosine starts again after every budget.
``wsd_s``           one run, which decays briefly before every budget and goes on from there.
``wsd branches``    one main line at the peak; for every budget a branch of it decays.

The table has the validation loss at each budget, and the updates that all budgets took together.
The peak of 3e-3 is better than 1e-2 for every arm and budget; it was not tuned further.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from examples.lm import report
from examples.lm.branches import Branch, main_line
from examples.lm.checkpoints import CheckpointHook
from examples.lm.config import Config
from examples.lm.train import run

DECAY = 0.1
"""Share of a cycle, or of a branch's budget, that decays."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all arms share: increasing budgets, and a run as long as the last one."""

    budgets: tuple[int, ...]
    config: Config

    def scheduled(self, schedule: str, arguments: str, **changes: object) -> Config:
        """The run with a schedule that ramps up first and ends at a tenth of the peak."""
        ends = f"warmup_steps={self.warmup},end_value={0.1 * self.config.learning_rate}"
        both = {"schedule": schedule, "schedule_args": f"{ends},{arguments}", **changes}
        return dataclasses.replace(self.config, **both)

    @property
    def warmup(self) -> int:
        """Steps of the first ramp."""
        return max(1, self.budgets[0] // 10)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One arm with one seed: the run that is finished at each budget, and all updates made."""

    finished: list[report.History]
    updates: int

    def losses(self, budgets: Sequence[int]) -> list[float]:
        """The validation loss at each budget."""
        pairs = zip(self.finished, budgets, strict=True)
        return [history.rows[budget - 1].val_loss for history, budget in pairs]


def cosine_each(plan: Plan) -> Outcome:
    """A run for every budget."""
    runs = [
        run(plan.scheduled("cyclic_cosine_schedule", f"budgets=[{budget}]", steps=budget))
        for budget in plan.budgets
    ]
    return Outcome(runs, sum(plan.budgets))


def repeated_cosine(plan: Plan) -> Outcome:
    """One run with a cosine for every budget."""
    one = run(plan.scheduled("cyclic_cosine_schedule", f"budgets={list(plan.budgets)}"))
    return Outcome([one] * len(plan.budgets), plan.budgets[-1])


def wsd_s(plan: Plan) -> Outcome:
    """One run with a short decay for every budget."""
    arguments = f"budgets={list(plan.budgets)},decay_fraction={DECAY}"
    one = run(plan.scheduled("wsd_s_schedule", arguments))
    return Outcome([one] * len(plan.budgets), plan.budgets[-1])


def wsd_branches(plan: Plan) -> Outcome:
    """A main line, and a branch of it for every budget."""
    cooldowns = [max(1, round(DECAY * budget)) for budget in plan.budgets]
    points = [budget - n for budget, n in zip(plan.budgets, cooldowns, strict=True)]
    every = math.gcd(*points)
    arguments = "stable_steps=1e9,decay_steps=0,decay='inverse'"
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        line = plan.scheduled(
            "wsd_schedule", arguments, steps=points[-1], out=folder, keep=points[-1] // every
        )
        run(line, [CheckpointHook(main_line(line), every)])
        runs = [
            run(
                dataclasses.replace(line, branch_from=point, cooldown=cooldown),
                [Branch(main_line(line), point)],
            )
            for point, cooldown in zip(points, cooldowns, strict=True)
        ]
    return Outcome(runs, points[-1] + sum(cooldowns))


ARMS: dict[str, Callable[[Plan], Outcome]] = {
    "cosine each": cosine_each,
    "repeated cosine": repeated_cosine,
    "wsd_s": wsd_s,
    "wsd branches": wsd_branches,
}


def plan_of(first_budget: int, rate: float, seed: int) -> Plan:
    """Budgets of one, two and four times the first, on a model of 0.11M parameters."""
    budgets = (first_budget, 2 * first_budget, 4 * first_budget)
    config = Config(
        learning_rate=rate,
        opt_args="b2=0.95,weight_decay=0.1",
        steps=budgets[-1],
        batch_size=8,
        seq_len=64,
        width=64,
        depth=2,
        heads=2,
        seed=seed,
        val_every=max(1, first_budget // 5),
    )
    return Plan(budgets, config)


def table(outcomes: dict[str, list[Outcome]], plan: Plan) -> Table:
    """A row an arm, a column a budget."""
    seeds = len(next(iter(outcomes.values())))
    made = Table(title=f"Validation loss (nats a byte), mean±sd, seeds: {seeds}")
    made.add_column("arm", no_wrap=True)
    for budget in plan.budgets:
        made.add_column(f"{budget} steps", justify="right")
    made.add_column("below", justify="right")
    made.add_column("updates", justify="right")
    losses = {
        arm: np.array([outcome.losses(plan.budgets) for outcome in runs])
        for arm, runs in outcomes.items()
    }
    for arm, of_seeds in losses.items():
        below = np.sum(of_seeds < losses["repeated cosine"], axis=0)
        shown = "" if arm == "repeated cosine" else ", ".join(map(str, below))
        spread = map(report.mean_and_spread, of_seeds.T)
        made.add_row(arm, *spread, shown, str(outcomes[arm][0].updates))
    made.caption = (
        f"Peak rate {plan.config.learning_rate:g}, AdamW; decays to a tenth of it. Below: the "
        "seeds whose loss is below repeated cosine's, budget by budget"
    )
    return made


def draw(outcomes: dict[str, list[Outcome]], plan: Plan, path: Path) -> None:
    """Validation losses and rates of the first seed, a panel for each arm."""
    figure, axes = report.figure_with_axes(len(outcomes), width=4 * len(outcomes))
    lowest = min(o.losses(plan.budgets)[-1] for runs in outcomes.values() for o in runs)
    for axis, (arm, runs) in zip(axes, outcomes.items(), strict=True):
        rates = axis.twinx()
        rates.set_yticks([])
        for history in runs[0].finished:  # an arm with one run draws it on top of itself
            step, loss = history.column("step"), history.column("val_loss")
            measured = ~np.isnan(loss)
            axis.plot(step[measured], loss[measured], color="#0072b2")
            rates.plot(step, history.column("rate"), color="#999999", linewidth=1)
        axis.plot(plan.budgets, runs[0].losses(plan.budgets), "o", color="#d55e00")
        rates.set_ylim(0, 3 * plan.config.learning_rate)
        axis.set(title=arm, ylim=(lowest - 0.1, lowest + 1.5))
    axes[0].set_ylabel("validation loss (nats per byte)")
    figure.suptitle("Finished models (dots) at three budgets; grey: the rate; first seed")
    report.save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    """Trains, prints the table, draws the picture."""
    del argv
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    began, values = time.perf_counter(), flags.FLAGS
    plan, outcomes = plan_of(values.budget, values.learning_rate, 0), {}
    for arm, train in ARMS.items():
        outcomes[arm] = [
            train(plan_of(values.budget, values.learning_rate, seed))
            for seed in range(values.seeds)
        ]
        print(f"{arm}: done after {time.perf_counter() - began:.0f} s", flush=True)
    Console().print(table(outcomes, plan))
    path = Path(values.out) / "finished_models.png"
    draw(outcomes, plan, path)
    print(f"{time.perf_counter() - began:.0f} s in all. The picture is {path.resolve()}")


if __name__ == "__main__":
    flags.DEFINE_integer("budget", 100, "steps of the first budget, see above", lower_bound=20)
    flags.DEFINE_float("learning_rate", 3e-3, "peak rate of all arms")
    flags.DEFINE_integer("seeds", 3, "runs of each arm", lower_bound=1)
    flags.DEFINE_string("out", "out", "folder of finished_models.png")
    app.run(main)
