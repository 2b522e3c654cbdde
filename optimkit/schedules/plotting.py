"""A picture of one schedule or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optimkit.numerics import check_count
from optimkit.protocols import ScalarOrSchedule
from optimkit.schedules.phases import constant

MOST_POINTS = 2000
"""Counts drawn of a long run."""


def plot(
    schedule: ScalarOrSchedule | Mapping[str, ScalarOrSchedule],
    steps: int,
    *,
    start: int = 0,
    ax: Any = None,
    log: bool = False,
    **line: Any,
) -> Any:
    """Draws schedules against the count.

    Args:
      schedule: a schedule or a rate; or several, by the names that the legend shows.
      steps: number of counts, >= 1. Of more than 2000, 2000 are drawn, evenly spread, ends among
        them.
      start: first count, >= 0.
      ax: matplotlib axes to draw on; default: those of a new figure.
      log: whether the rate's axis is logarithmic.
      **line: passed on to ``ax.plot``.

    Returns:
      The axes. Nothing is shown or saved.

    Raises:
      ValueError: if ``steps`` or ``start`` is out of range, or nothing is given to draw.
      ImportError: if matplotlib is not installed.

    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import optax
    >>> axes = plot({"cosine": optax.cosine_decay_schedule(1.0, 100), "flat": 0.5}, 100)
    >>> axes.get_xlabel(), [text.get_text() for text in axes.get_legend().get_texts()]
    ('step', ['cosine', 'flat'])
    """
    check_count(steps=steps, least=1)
    check_count(start=start)
    named = schedule if isinstance(schedule, Mapping) else {"": schedule}
    if not named:
        raise ValueError("schedule must be a schedule or a dict of schedules, got an empty dict")
    ax = new_axes("optimkit.schedules.plot") if ax is None else ax
    counts = np.unique(np.linspace(start, start + steps - 1, min(steps, MOST_POINTS)).astype(int))
    for name, one in named.items():
        curve = one if callable(one) else constant(one)
        ax.plot(counts, jax.vmap(curve)(counts), **{"label": name, **line} if name else line)
    ax.set_xlabel("step")
    ax.set_ylabel("learning rate")
    if log:
        ax.set_yscale("log")
    if any(named):
        ax.legend()
    return ax


def new_axes(caller: str) -> Any:
    """The axes of a new figure.

    Args:
      caller: what to call the function that draws, in the message.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError(
            f'{caller} needs matplotlib: pip install "optimkit[plot]"',
            name="matplotlib",
        ) from None
    return pyplot.subplots()[1]
