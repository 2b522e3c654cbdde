"""Several finished models from one main line: branches that decay, and a longer main line.

A main line runs at ``constant`` or in the stable phase of ``wsd_schedule`` and saves checkpoints.
``--branch_from=STEP --cooldown=N`` makes a finished model of STEP + N steps in a folder of its own
below the main line's; ``--extend=STEPS`` makes the main line longer. No step is made twice.

    run="python -m examples.lm.train --out=out/line --checkpoint_every=90 --keep=100 \
        --schedule=wsd_schedule --schedule_args=warmup_steps=20,stable_steps=1e9,decay_steps=0"
    $run --steps=180
    $run --branch-from=90 --cooldown=10       # a model of 100 steps, in out/line/branch_90_10
    $run --branch-from=180 --cooldown=20      # one of 200 steps
    $run --extend=180
    $run --branch-from=360 --cooldown=40      # one of 400 steps
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from examples.lm import report
from examples.lm.checkpoints import check_settings, put_in_place
from examples.lm.config import Config, ConfigError, settings
from optimkit import wsd_branch
from optimkit.checkpoint import CheckpointError, Checkpoints

if TYPE_CHECKING:
    from examples.lm.train import Trainer

MAIN_LINES = ("constant", "wsd_schedule")
"""Schedules with a phase at the peak, from which a branch can decay."""


def main_line(config: Config) -> Checkpoints:
    """The checkpoints of the main line."""
    if not config.out:
        raise ConfigError("--branch_from and --extend need --out, the folder of the main line")
    return Checkpoints(Path(config.out) / "checkpoints", keep=max(1, config.keep))


def folder_of(config: Config) -> Path:
    """Where a run writes: ``--out``, or a folder in it for each branch."""
    branch = f"branch_{config.branch_from}_{config.cooldown}" if config.branch_from else ""
    return Path(config.out) / branch


def resolved(config: Config) -> Config:
    """The settings with the last step that ``--branch_from`` or ``--extend`` asks for.

    Resolved settings resolve to themselves, so that a stopped run can be gone on with.

    Raises:
      ConfigError: if the three settings do not go together.
    """
    for name in ("branch_from", "cooldown", "extend"):
        if (value := getattr(config, name)) < 0:
            raise ConfigError(f"--{name} must not be negative, got {value}")
    if bool(config.branch_from) != bool(config.cooldown):
        raise ConfigError(
            "--branch_from=STEP and --cooldown=STEPS go together, got "
            f"{config.branch_from} and {config.cooldown}"
        )
    if config.branch_from and config.extend:
        raise ConfigError("--extend makes the main line longer, so it takes no --branch_from")
    if config.branch_from:
        return dataclasses.replace(config, steps=config.branch_from + config.cooldown)
    if config.extend:
        saved = main_line(config).latest()
        if saved is None:
            raise ConfigError(f"--extend: there is no saved run in {Path(config.out).absolute()}")
        return dataclasses.replace(config, steps=saved + config.extend, extend=0, resume=True)
    return config


def branch_schedule(config: Config, keywords: dict[str, Any]) -> optax.Schedule:
    """The schedule of a branch; ``keywords`` are the main line's, its peak among them."""
    if config.schedule not in MAIN_LINES:
        raise ConfigError(
            f"--branch_from needs a main line with --schedule={' or '.join(MAIN_LINES)}, "
            f"got {config.schedule}"
        )
    with settings("--branch_from"):
        return wsd_branch(
            {"warmup_steps": 0, **keywords},
            trunk_step=config.branch_from,
            decay_steps=config.cooldown,
        )[0]


class Branch(report.Hook):
    """Puts the main line's state at one saved step in place before the first step.

    The rows of the main line come too, so that the branch's curves begin where the run began.
    """

    def __init__(self, checkpoints: Checkpoints, step: int):
        self.checkpoints, self.step_from = checkpoints, step

    def start(self, trainer: Trainer) -> None:
        """Restores parameters, optimizer state, step and rows.

        Raises:
          ConfigError: if the step was never saved or is damaged, or a setting that shapes the run
            has changed.
        """
        folder, saved = self.checkpoints.folder, self.checkpoints.steps()
        if self.step_from not in saved:
            raise ConfigError(
                f"--branch_from: step {self.step_from} is not saved in {folder}, which has "
                f"{', '.join(map(str, saved)) or 'none'}; --checkpoint_every and --keep of the "
                "main line say which are"
            )
        try:
            check_settings(trainer, self.checkpoints, self.step_from, "--branch_from")
            found = self.checkpoints.restore(
                self.step_from, params=trainer.params, opt_state=trainer.opt_state
            )
        except CheckpointError as error:
            raise ConfigError(f"--branch_from: {error}") from error
        print(
            f"branching from step {self.step_from} of {folder}: {trainer.config.cooldown} steps of "
            "decay",
            flush=True,
        )
        put_in_place(trainer, found)


class Extended(report.Hook):
    """Says where a longer run ends, and refuses one whose rate is zero by now. After ``Resume``."""

    def start(self, trainer: Trainer) -> None:
        """Looks at the rates of the steps to come.

        Raises:
          ConfigError: if they are all zero.
        """
        first, last = trainer.step, trainer.config.steps
        rates = jax.vmap(trainer.schedule)(jnp.arange(first, last))
        if not float(jnp.max(jnp.abs(rates), initial=0)):
            raise ConfigError(
                f"--extend: {trainer.config.schedule} is 0 from step {first} to {last}; a main "
                "line that is to be made longer must not decay: give it a stable phase without "
                "end, such as stable_steps=1e9"
            )
        print(
            f"extending from step {first} to {last}; after a kill, go on with --resume "
            f"--steps={last}",
            flush=True,
        )
