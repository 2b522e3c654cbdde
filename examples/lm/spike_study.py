"""Optimizers with gradient spikes and without, on the same batches: a table and a picture.

The frame of ``examples.demo`` and ``examples.four_bit``: train every entry under both conditions,
at the rates that a sweep found, and say what the numbers say.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from rich.console import Console
from rich.table import Table

from examples.lm import report
from examples.lm.config import Config, ConfigError, DivergedError
from examples.lm.model import Linear
from examples.lm.spikes import spike_steps
from examples.lm.train import Trainer, build_optimizer, build_schedule

CONDITIONS = ("spikes", "no spikes")
"""With spiked gradients, and without."""

COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73")  # told apart by colour-blind readers too
STYLES = ("-", "--", "-.", ":")
SMOOTH = 10
AFTER = 3  # updates in which the harm of a spike is looked for
SAME = 0.01  # relative difference below which two losses count as the same

Tried = Mapping[str, Mapping[float, float]]
"""Condition -> rate -> final training loss of seed 0."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    Attributes:
      label: what it is called.
      optimizer: its name in the catalog, or adamw.
      variants: its other arguments -> what the sweep found with them. The best under spikes is
        used, at the best rate for each condition.
      max_norm: clips the global norm of the gradient first; 0: does not.
    """

    label: str
    optimizer: str
    variants: Mapping[str, Tried]
    max_norm: float = 0.0

    @property
    def opt_args(self) -> str:
        """The best variant."""
        return min(self.variants, key=lambda text: min(self.variants[text]["spikes"].values()))

    def rate(self, condition: str) -> float:
        """The best rate."""
        tried = self.variants[self.opt_args][condition]
        return min(tried, key=lambda rate: tried[rate])


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
      title: what is trained, in a few words.
      config: what all runs share; its spikes are those of the condition with spikes.
      entries: what is compared; the first is the baseline.
      authors: labels of those that were made for spikes.
      linear: what makes the projections.
      picture: name of the picture.
    """

    title: str
    config: Config
    entries: Sequence[Entry]
    authors: Sequence[str]
    picture: str
    linear: Linear = nnx.Linear


def settings(
    study: Study, entry: Entry, condition: str, *, rate: float, opt_args: str, seed: int = 0
) -> Config:
    """One run: the rate rises for a twelfth of the steps and then falls along a cosine."""
    steps = study.config.steps
    warmup = max(1, steps // 12)
    return dataclasses.replace(
        study.config,
        optimizer=entry.optimizer,
        opt_args=opt_args,
        learning_rate=rate,
        schedule="wsd_schedule",
        schedule_args=f"warmup_steps={warmup},stable_steps=0,decay_steps={steps - warmup},"
        "decay='cosine'",
        seed=seed,
        spike_seed=seed,
        spike_rate=study.config.spike_rate if condition == "spikes" else 0.0,
        val_every=steps,
    )


def train(study: Study, entry: Entry, config: Config) -> Trainer:
    """Trains one model, with the entry's clip between the spikes and the optimizer."""
    tx = build_optimizer(config, build_schedule(config))
    if entry.max_norm:
        tx = optax.chain(optax.clip_by_global_norm(entry.max_norm), tx)
    shown = f"{entry.label}, {'spikes' if config.spike_rate else 'no spikes'}"
    trainer = Trainer(config, [report.ProgressBar(f"{shown:<26}")], tx=tx, linear=study.linear)
    try:
        trainer.run()
    except DivergedError as error:
        print(f"{shown}: {error}", file=sys.stderr)  # a result like any other
    return trainer


def sweep(study: Study) -> None:
    """Measures every rate of every variant again, and prints the losses as they are recorded."""
    for entry in study.entries:
        for opt_args, tried in entry.variants.items():
            found: dict[str, dict[float, float]] = {condition: {} for condition in CONDITIONS}
            for condition in CONDITIONS:
                for rate in tried[condition]:
                    config = settings(study, entry, condition, rate=rate, opt_args=opt_args)
                    loss = final_loss(train(study, entry, config))
                    found[condition][rate] = round(loss, 3)
            print(f"{entry.label}, {opt_args!r}: {found}", flush=True)


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------

Runs = Mapping[tuple[str, str], Trainer]
"""The finished runs of one seed, by label and condition."""


def compare(study: Study, seed: int) -> Runs:
    """Trains every entry under both conditions at its best rates, one after the other."""
    runs = {}
    for condition in CONDITIONS:
        for entry in study.entries:
            rate, opt_args = entry.rate(condition), entry.opt_args
            config = settings(study, entry, condition, rate=rate, opt_args=opt_args, seed=seed)
            runs[entry.label, condition] = train(study, entry, config)
    return runs


def final_loss(run: Trainer) -> float:
    """Mean of the last 20 training losses; infinite if the run diverged.

    No byte is seen much more than once, so these are losses on new text, and not of one moment,
    which may be just after a spike.
    """
    loss = run.history.final_loss
    return loss if math.isfinite(loss) else math.inf


def spikes_of(study: Study, run: Trainer) -> np.ndarray:
    """Where the runs of this seed have spikes, bool ``(steps, leaves)``."""
    leaves, config = len(jax.tree.leaves(run.params)), study.config
    return spike_steps(run.config.spike_seed, config.steps, leaves, config.spike_rate)


def worst_rise(loss: np.ndarray, spiked: np.ndarray) -> float:
    """The largest rise of the loss within three updates after a spike, over all spikes.

    Args:
      loss: of each batch before its update.
      spiked: whether the update has a spike anywhere.
    """
    rises = [
        float(np.max(loss[step + 1 : step + 1 + AFTER]) - loss[step])
        for step in np.flatnonzero(spiked)
        if step + 1 < len(loss)
    ]
    return max(rises, default=math.nan)


def table(study: Study, seeds: Sequence[Runs]) -> Table:
    """What each method reached, and what it cost: means over the seeds."""
    steps = study.config.steps
    made = Table(title=f"{study.title}, {steps} steps, {len(seeds)} seed(s)")
    for heading in (
        "optimizer",
        "rate",
        "final loss\nwith spikes",
        "worst rise\nafter a spike",
        "rate",
        "final loss\nwithout",
        "step (ms)",
        "bytes/param",
    ):
        made.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for entry in study.entries:
        plain = seeds[0][entry.label, "no spikes"].history
        rises = [_rise(study, runs, entry, "spikes") for runs in seeds]
        made.add_row(
            entry.label,
            f"{entry.rate('spikes'):g}",
            _mean([final_loss(runs[entry.label, "spikes"]) for runs in seeds]),
            _mean(rises),
            f"{entry.rate('no spikes'):g}",
            _mean([final_loss(runs[entry.label, "no spikes"]) for runs in seeds]),
            f"{1e3 * plain.step_time:.1f}",
            f"{plain.bytes_per_parameter:.2f}",
        )
    noise = max(_rise(study, runs, study.entries[0], "no spikes") for runs in seeds)
    made.caption = (
        "Losses in nats a byte, means of the last 20 training steps. Worst rise: largest rise of "
        f"the loss within {AFTER} updates after a spike; the change of batches alone gives "
        f"{noise:.2f} at the same steps. Step: median, without spikes. bytes/param: the live "
        "arrays of the optimizer state."
    )
    return made


def _rise(study: Study, runs: Runs, entry: Entry, condition: str) -> float:
    run = runs[entry.label, condition]
    return worst_rise(run.history.column("loss"), np.any(spikes_of(study, run), axis=1))


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def conclusion(study: Study, losses: Sequence[Mapping[tuple[str, str], float]]) -> list[str]:
    """What the final losses say, and whether it is what the authors of the methods found.

    Args:
      study: what was compared.
      losses: for each seed, by label and condition.
    """
    labels = [entry.label for entry in study.entries]
    said, means = [], {}
    for condition in CONDITIONS:
        mean = {x: statistics.fmean(seed[x, condition] for seed in losses) for x in labels}
        order = sorted(labels, key=mean.__getitem__)
        means[condition] = mean
        name = "With spikes" if condition == "spikes" else "Without"
        said.append(f"{name}, best first: {', '.join(f'{x} {mean[x]:.3f}' for x in order)}.")
    baseline, others = labels[0], [x for x in labels if x not in study.authors]

    def ordered(seed: Mapping[tuple[str, str], float]) -> bool:
        value = {x: seed[x, "spikes"] for x in labels}
        rest = [x for x in labels if x != baseline]
        return max(value[x] for x in study.authors) < min(value[x] for x in others) and (
            value[baseline] > max(value[x] for x in rest)
        )

    held = sum(map(ordered, losses))
    said.append(
        f"The authors' order with spikes ({' and '.join(study.authors)} ahead of the others, "
        f"{baseline} last) held in {held} of {len(losses)} seed(s)."
    )
    for label in study.authors:
        ahead = ", ".join(
            f"of {x} in {sum(seed[label, 'spikes'] < seed[x, 'spikes'] for seed in losses)}"
            for x in others
        )
        gain, cost = (
            means[condition][label] / means[condition][baseline] - 1 for condition in CONDITIONS
        )
        verdict = "no real difference" if abs(cost) <= SAME else "a difference"
        said.append(
            f"{label}: with spikes ahead {ahead} of {len(losses)} seed(s); against {baseline} "
            f"{100 * gain:+.1f} % of loss with spikes, {100 * cost:+.1f} % without ({verdict}: the "
            f"line is {100 * SAME:g} %)."
        )
    return said


def draw(study: Study, runs: Runs, path: Path) -> None:
    """The training losses with spikes, marked, and without: two panels on one scale."""
    figure, panels = report.figure_with_axes(2, width=13, height=5.5)
    top, bottom = -math.inf, math.inf
    for axis, condition in zip(panels, CONDITIONS, strict=True):
        for entry, colour, style in zip(study.entries, COLOURS, STYLES, strict=False):
            history = runs[entry.label, condition].history
            step, loss = history.column("step"), history.column("loss")
            # Each point is the mean of the last steps: single batches differ more than methods do.
            window = min(SMOOTH, len(loss))
            smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
            label = f"{entry.label}, rate {entry.rate(condition):g}"
            axis.plot(step[window - 1 :], smooth, style, color=colour, label=label)
            top, bottom = max(top, float(smooth[0])), min(bottom, float(np.nanmin(smooth)))
        with_spikes = condition == "spikes"
        axis.set(
            title="Gradient spikes" if with_spikes else "No spikes",
            ylabel=f"training loss (nats per byte), mean of {SMOOTH} steps",
        )
    first = runs[study.entries[0].label, "spikes"]
    spiked = 1 + np.flatnonzero(spikes_of(study, first).any(axis=1))
    low = bottom - 0.12 * (top - bottom)
    for axis in panels:
        axis.set_ylim(low, top + 0.05 * (top - bottom))
    config = study.config
    panels[0].plot(
        spiked,
        np.full(len(spiked), low + 0.04 * (top - bottom)),
        "|",
        color="#d55e00",
        markersize=9,
        label=f"a step with a spike (x{config.spike_factor:g})",
    )
    for axis in panels:
        axis.legend()
    share = 100 * config.spike_rate
    figure.suptitle(
        f"{study.title}, {first.history.parameters / 1e6:.2f}M parameters; left: the gradient of "
        f"each array times {config.spike_factor:g} in {share:g} % of the steps"
    )
    report.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def define_flags(steps: int, values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags of the programs."""
    flags.DEFINE_integer("steps", steps, "updates of each run", lower_bound=2, flag_values=values)
    flags.DEFINE_integer(
        "seeds", 1, "seeds: weights, batches and spikes", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("out", "out", "folder of the picture", flag_values=values)
    flags.DEFINE_boolean(
        "sweep", False, "measure the recorded losses again, and stop", flag_values=values
    )


def main(study: Study, values: flags.FlagValues = flags.FLAGS) -> None:
    """Trains, prints the table and what it says, draws the picture."""
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    began = time.perf_counter()
    path = Path(values.out) / study.picture
    config = dataclasses.replace(study.config, steps=values.steps)
    study = dataclasses.replace(study, config=config)
    try:
        if values.sweep:
            sweep(study)
            return
        count = len(study.entries) * len(CONDITIONS) * values.seeds
        print(f"Training {count} models of {config.steps} steps.", flush=True)
        seeds = [compare(study, seed) for seed in range(values.seeds)]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    Console(width=None if sys.stdout.isatty() else 110).print(table(study, seeds))
    losses = [{key: final_loss(run) for key, run in runs.items()} for runs in seeds]
    print(*conclusion(study, losses), sep="\n")
    draw(study, seeds[0], path)
    print(f"{time.perf_counter() - began:.0f} s in all. The curves are in {path.resolve()}")
