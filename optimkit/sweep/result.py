"""What a sweep found, and a picture of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from optimkit.protocols import PyTree
from optimkit.schedules.plotting import new_axes


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """Every setting with its curve, and the best one.

    Attributes:
      settings: argument -> value, one dict a setting.
      losses: NumPy ``(settings, steps)``: the loss of each batch before its update.
      scores: NumPy ``(settings,)``: what the settings are ranked by, smaller is better.
      diverged: NumPy bool ``(settings,)``: whether a loss, a final parameter or the score is not
        finite. Such a setting never wins.
      best_index: place of the best setting.
      params: the trained parameters of all settings as NumPy arrays with a leading axis of
        settings, or ``None`` where they were not kept.
    """

    settings: tuple[dict[str, float], ...]
    losses: np.ndarray
    scores: np.ndarray
    diverged: np.ndarray
    best_index: int
    params: PyTree | None = dataclasses.field(default=None, repr=False)

    @property
    def best(self) -> dict[str, float]:
        """The best setting, ready for the factory: ``factory(**result.best)``."""
        return self.settings[self.best_index]

    @property
    def best_losses(self) -> np.ndarray:
        """The curve of the best setting, ``(steps,)``."""
        return self.losses[self.best_index]

    @property
    def best_score(self) -> float:
        """The score of the best setting."""
        return float(self.scores[self.best_index])

    @property
    def best_params(self) -> PyTree | None:
        """The trained parameters of the best setting, or ``None`` where none were kept."""
        return jax.tree.map(lambda leaf: leaf[self.best_index], self.params)

    @property
    def ranking(self) -> list[int]:
        """Places of the settings, best first; diverged ones at the end."""
        return [int(i) for i in np.argsort(np.where(self.diverged, np.inf, self.scores))]


def plot(
    result: SweepResult,
    against: str = "learning_rate",
    *,
    ax: Any = None,
    log: bool = True,
    **line: Any,
) -> Any:
    """Draws the score against one swept argument: a line for each choice of the others.

    Args:
      result: what ``sweep`` gave.
      against: the argument on the horizontal axis.
      ax: matplotlib axes to draw on; default: those of a new figure.
      log: whether the horizontal axis is logarithmic.
      **line: passed on to ``ax.plot``.

    Returns:
      The axes. The best setting has a ring; a diverged one is a cross at the upper edge. Nothing is
      shown or saved.

    Raises:
      ValueError: if ``against`` was not swept.
      ImportError: if matplotlib is not installed.

    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> losses = np.array([[3.0, 2.0], [3.0, 1.0], [3.0, np.nan]])
    >>> settings = tuple({"learning_rate": rate} for rate in (0.01, 0.1, 1.0))
    >>> diverged = np.array([False, False, True])
    >>> axes = plot(SweepResult(settings, losses, losses[:, -1], diverged, best_index=1))
    >>> axes.get_xlabel(), axes.get_xscale(), axes.get_lines()[0].get_ydata().tolist()
    ('learning_rate', 'log', [2.0, 1.0])
    """
    if against not in result.best:
        raise ValueError(f"against must be one of {list(result.best)}, got {against!r}")
    ax = new_axes("optimkit.sweep.plot") if ax is None else ax
    lines: dict[str, list[tuple[float, float]]] = {}
    failed: list[float] = []
    for setting, score, bad in zip(result.settings, result.scores, result.diverged, strict=True):
        others = ", ".join(f"{k}={v:g}" for k, v in setting.items() if k != against)
        points = lines.setdefault(others, [])
        if bad:
            failed.append(setting[against])
        else:
            points.append((setting[against], float(score)))
    for others, points in lines.items():
        x, y = np.array(sorted(points)).reshape(-1, 2).T
        ax.plot(x, y, **{"marker": "o", **({"label": others} if others else {}), **line})
    if failed:
        ax.plot(
            failed,
            np.ones(len(failed)),
            "x",
            color="tab:red",
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            label="diverged",
        )
    ax.plot(
        [result.best[against]],
        [result.best_score],
        "o",
        markersize=12,
        fillstyle="none",
        color="black",
        label="best",
    )
    ax.set_xlabel(against)
    ax.set_ylabel("loss")
    ax.set_xscale("log" if log else "linear")
    ax.legend()
    return ax
