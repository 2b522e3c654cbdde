"""What a run leaves behind: rows of numbers, and the hooks that show, write and draw them."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from examples.lm.train import Trainer


class Row(NamedTuple):
    """One update: the loss of its batch before it, and what was measured around it."""

    step: int  # updates made, this one included
    loss: float  # nats a byte
    rate: float
    gradient_norm: float
    step_time: float  # seconds; the first includes the compilation
    val_loss: float = math.nan  # after the update, where it was measured


@dataclasses.dataclass
class History:
    """Every row of a run, and what it cost in memory."""

    parameters: int
    optimizer_bytes: int
    rows: list[Row] = dataclasses.field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        """One field of all rows, as an array."""
        return np.array([getattr(row, name) for row in self.rows])

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last 20 steps: one batch is too noisy to compare."""
        return float(self.column("loss")[-20:].mean())

    @property
    def val_loss(self) -> float:
        """The last validation loss."""
        return next(
            (r.val_loss for r in reversed(self.rows) if not math.isnan(r.val_loss)), math.nan
        )

    @property
    def step_time(self) -> float:
        """Median seconds a step, without the first two: they compile and warm up."""
        return statistics.median(row.step_time for row in self.rows[2:] or self.rows)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of live optimizer state for each parameter."""
        return self.optimizer_bytes / self.parameters


class Hook:
    """Something that happens around the steps of a run; derive from it and override what you need.

    A hook may read and replace ``trainer.params``, ``trainer.opt_state`` and ``trainer.step``,
    which are the whole state of a run: ``start`` is the place to restore a checkpoint, ``step``
    the place to save one. The next step donates the arrays, so copy what you keep.
    """

    def start(self, trainer: Trainer) -> None:
        """Called once, before the first step."""

    def step(self, trainer: Trainer, row: Row) -> None:
        """Called after every update; raise to stop the run."""

    def finish(self, trainer: Trainer) -> None:
        """Called once at the end, also when the run failed."""


class ProgressBar(Hook):
    """A live bar with loss, rate and gradient norm; ten plain lines where there is no terminal."""

    def __init__(self, label: str = "train"):
        self.label = label
        self.console = Console()

    def start(self, trainer: Trainer) -> None:
        """Opens the bar."""
        columns = (
            TextColumn(f"{self.label:<13}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bar.start()
        self.task = self.bar.add_task("compiling ...", total=trainer.config.steps)

    def step(self, trainer: Trainer, row: Row) -> None:
        """Moves the bar, or prints every tenth part of the run."""
        steps = trainer.config.steps
        text = f"loss {row.loss:.3f}  rate {row.rate:.2e}  gradient {row.gradient_norm:.2f}"
        self.bar.update(self.task, completed=row.step, description=text)
        if not self.console.is_terminal and (row.step == 1 or row.step % max(1, steps // 10) == 0):
            print(f"{self.label:<13} step {row.step}/{steps}  {text}", flush=True)

    def finish(self, trainer: Trainer) -> None:
        """Closes the bar."""
        self.bar.stop()


class CsvLog(Hook):
    """Writes ``metrics.csv``, a line a step, flushed, so that a crash loses nothing.

    A resumed run starts with the rows it had: later ones, of steps that are made again, go.
    """

    def __init__(self, folder: Path):
        self.path = folder / "metrics.csv"

    def start(self, trainer: Trainer) -> None:
        """Creates the file with its header and the rows so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".csv.new")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(self._cells(row) for row in trainer.history.rows)
        unfinished.replace(self.path)  # at no moment is there less in it than there was
        self.file = self.path.open("a", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)

    def step(self, trainer: Trainer, row: Row) -> None:
        """Writes one line; an unmeasured validation loss is an empty cell."""
        self.writer.writerow(self._cells(row))
        self.file.flush()

    @staticmethod
    def _cells(row: Row) -> list[object]:
        return ["" if math.isnan(x) and f == "val_loss" else x for f, x in row._asdict().items()]

    def finish(self, trainer: Trainer) -> None:
        """Closes the file."""
        self.file.close()


class TensorBoardLog(Hook):
    """Writes every field of a row as a TensorBoard scalar, if tensorboardX is installed."""

    def __init__(self, folder: Path):
        try:
            module: Any = importlib.import_module("tensorboardX")
        except ImportError:
            raise ValueError("needs tensorboardX: pip install tensorboardX") from None
        self.make = lambda step: module.SummaryWriter(str(folder), purge_step=step + 1)

    def start(self, trainer: Trainer) -> None:
        """Opens the log; points of steps that are made again are hidden."""
        self.writer = self.make(trainer.step)

    def step(self, trainer: Trainer, row: Row) -> None:
        """Writes one point a field."""
        for name, x in row._asdict().items():
            if name != "step" and not math.isnan(x):
                self.writer.add_scalar(name, x, row.step)

    def finish(self, trainer: Trainer) -> None:
        """Flushes and closes."""
        self.writer.close()


class Curves(Hook):
    """Draws loss, rate and gradient norm into ``curves.png`` at the end."""

    def __init__(self, folder: Path):
        self.path = folder / "curves.png"

    def finish(self, trainer: Trainer) -> None:
        """Draws what there is, also after a failed run."""
        history = trainer.history
        if not history.rows:
            return
        figure, axes = figure_with_axes(3, width=12)
        step = history.column("step")
        val_loss = history.column("val_loss")
        measured = ~np.isnan(val_loss)
        axes[0].plot(step, history.column("loss"), linewidth=1, label="training batch")
        axes[0].plot(step[measured], val_loss[measured], "o-", label="validation")
        axes[0].set(title="Loss", ylabel="loss (nats per byte)")
        axes[0].legend()
        axes[1].plot(step, history.column("rate"), color="tab:green")
        axes[1].set(title="Learning rate", ylabel="rate", ylim=(0, None))
        axes[2].plot(step, history.column("gradient_norm"), color="tab:red", linewidth=1)
        axes[2].set(title="Gradient norm", ylabel="global l2 norm", yscale="log")
        figure.suptitle(trainer.title)
        save_figure(figure, self.path)


def mean_and_spread(values: Any, places: int = 3) -> str:
    """Mean ± standard deviation over seeds; the mean alone of a single value.

    >>> mean_and_spread([1.0, 3.0], places=2)
    '2.00±1.41'
    """
    spread = f"±{np.std(values, ddof=1):.{places}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{places}f}{spread}"


def figure_with_axes(count: int, *, width: float, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels side by side over training steps; needs no display."""
    # The object interface, not pyplot: nothing global, and always the Agg renderer.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(np.ravel(figure.subplots(1, count)))
    for axis in axes:
        axis.set_xlabel("step (updates)")
        axis.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
