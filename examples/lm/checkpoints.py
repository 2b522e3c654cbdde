"""Checkpoints of a run, and the way back: a resumed run equals one that was never stopped.

``Resume`` goes first among the hooks and ``CheckpointHook`` last, so that a checkpoint holds only
steps that every other hook has seen.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from examples.lm import report
from examples.lm.config import Config, ConfigError
from optimkit.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, Restored

if TYPE_CHECKING:
    from examples.lm.train import Trainer


class Stopped(Exception):
    """The user asked the run to stop; its state is saved.

    Attributes:
      step: updates made.
      signal: number of the signal that asked.
    """

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.step, self.signal = step, number


def checkpoints_of(config: Config, folder: Path) -> Checkpoints:
    """The checkpoints of a run in its folder.

    Raises:
      ValueError: without ``--out``, for a wrong ``--keep``, or if a run that does not resume finds
        checkpoints: their later steps would be taken for its own.
    """
    if not config.out:
        raise ValueError("needs --out, the folder to keep checkpoints in")
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep)
    saved = checkpoints.latest()
    if saved is not None and not config.resume:
        raise ValueError(
            f"{checkpoints.folder} holds a run up to step {saved}: go on with it with --resume, or "
            "choose another --out"
        )
    return checkpoints


class CheckpointHook(report.Hook):
    """Saves parameters, optimizer state, position and rows every so many steps, and after the last.

    Ctrl-C and SIGTERM let the step finish, save, and end the run with ``Stopped``; a second one
    has its usual effect. A run that is killed loses the steps since its last checkpoint.

    Args:
      checkpoints: where.
      every: steps between two checkpoints, at least 1.
    """

    def __init__(self, checkpoints: Checkpoints, every: int):
        if every < 1:
            raise ValueError(f"must be at least 1, or 0 for no checkpoints, got {every}")
        self.checkpoints, self.every = checkpoints, every
        self.asked: int | None = None
        self.handlers: dict[int, Any] = {}

    def start(self, trainer: Trainer) -> None:
        """Takes over the two signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._ask)

    def step(self, trainer: Trainer, row: report.Row) -> None:
        """Saves if it is time to, or if the run is to stop."""
        last = row.step == trainer.config.steps
        due = last or self.asked is not None or row.step % self.every == 0
        # Nothing can be done with a state that has diverged, and it would push out a good one.
        if due and math.isfinite(row.loss) and math.isfinite(row.gradient_norm):
            self.checkpoints.save(
                row.step,
                metadata=_metadata(trainer),
                params=trainer.params,
                opt_state=trainer.opt_state,
            )
        if self.asked is not None and not last:
            if not due:  # the signal came after the decision
                self.step(trainer, row)
            raise Stopped(row.step, self.asked)

    def finish(self, trainer: Trainer) -> None:
        """Gives the signals back."""
        self._give_back()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._give_back()

    def _give_back(self) -> None:
        while self.handlers:
            number, handler = self.handlers.popitem()
            signal.signal(number, handler)


class Resume(report.Hook):
    """Puts the newest whole checkpoint in place before the first step, and says which it is.

    Damaged ones are skipped, each with a message. Without any checkpoint the run starts from the
    beginning: it may have been killed before its first one.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def start(self, trainer: Trainer) -> None:
        """Restores parameters, optimizer state, step and rows.

        Raises:
          ConfigError: if a setting that shapes the run has changed, or every checkpoint is damaged.
        """
        folder = self.checkpoints.folder
        self._check_settings(trainer)
        try:
            found = self.checkpoints.restore_latest(
                params=trainer.params, opt_state=trainer.opt_state
            )
        except DamagedCheckpoint as error:  # its reasons are in the log already
            steps = ", ".join(map(str, self.checkpoints.steps()))
            raise ConfigError(
                f"--resume: every checkpoint in {folder} is damaged (steps {steps}): put back a "
                "copy, or begin again with another --out"
            ) from error
        except CheckpointError as error:
            raise ConfigError(f"--resume: {error}") from error
        if found is None:
            print(f"no checkpoint in {folder} yet: starting from the beginning", flush=True)
            return
        for step in found.skipped:
            print(f"skipped the checkpoint of step {step}, which is damaged")
        step = found.metadata["next_step"]
        if step > trainer.config.steps:
            raise ConfigError(f"--steps={trainer.config.steps} is less than the {step} steps made")
        print(f"going on from step {step} of {folder}", flush=True)
        put_in_place(trainer, found)

    def _check_settings(self, trainer: Trainer) -> None:
        """Before anything is restored: a changed optimizer is better named than its leaves."""
        for step in reversed(self.checkpoints.steps()):
            try:
                return check_settings(trainer, self.checkpoints, step, "--resume")
            except DamagedCheckpoint:
                continue
            except CheckpointError as error:
                raise ConfigError(f"--resume: {error}") from error


def check_settings(trainer: Trainer, checkpoints: Checkpoints, step: int, flag: str) -> None:
    """Raises a ``ConfigError`` if a setting that shapes the run differs from the saved one."""
    saved, wanted = checkpoints.restore(step).metadata, _metadata(trainer)
    changed = [
        f"--{name}={saved['config'][name]} there and {value} here"
        for name, value in wanted["config"].items()
        if name in saved["config"] and saved["config"][name] != value
    ]
    if saved["data"] != wanted["data"]:
        changed.append("the text, which comes with Python, is another")
    if changed:
        raise ConfigError(
            f"{flag}: the run in {checkpoints.folder} has other settings ("
            + "; ".join(changed)
            + "): give the same ones, or another --out"
        )


def put_in_place(trainer: Trainer, found: Restored) -> None:
    """Hands parameters, optimizer state, step and rows of a checkpoint to a run."""
    trainer.params, trainer.opt_state = found.trees["params"], found.trees["opt_state"]
    trainer.step = found.metadata["next_step"]
    trainer.history.rows[:] = [_row(numbers) for numbers in found.metadata["rows"]]


def _metadata(trainer: Trainer) -> Mapping[str, Any]:
    """The position, what must not change, and the rows so far, in plain JSON.

    The position in the data is the step: a batch depends on the seed and the step alone.
    """
    shaping = [f.name for f in dataclasses.fields(Config) if f.metadata["shapes"]]
    return {
        "next_step": trainer.step,
        "config": {name: getattr(trainer.config, name) for name in shaping},
        "data": trainer.data.digest,
        "rows": [[None if x != x else x for x in row] for row in trainer.history.rows],
    }


def _row(numbers: list[Any]) -> report.Row:
    step, *rest = numbers
    return report.Row(step, *(math.nan if x is None else x for x in rest))
