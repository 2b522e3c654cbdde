"""What ``examples.continual_digits`` says of its accuracies: a table, claims, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from examples.lm.report import save_figure
from optimkit.diagnostics import continual_metrics

Found = dict[str, np.ndarray]
"""Accuracies (seeds, task being learned, iterations, tasks) by method."""

COLUMNS = ("acc", "forg", "min_acc", "wc_acc", "wf", "wp", "lca")
HEADINGS = ("ACC", "forgetting", "min-ACC", "WC-ACC", "WF10", "WP10", "LCA")
DRAWN = ("AdamW", "SGD, replay", "AdamW, replay", "AdamW, rehearsal", "CLASSP", "CoSO")
SOON = 20
"""Iterations after a switch in which a fall counts as the stability gap."""


def metrics(accuracy: np.ndarray) -> dict[str, float]:
    """Mean over the seeds of what ``continual_metrics`` finds at the end."""
    _, tasks, steps, _ = accuracy.shape
    current = np.repeat(np.arange(tasks), steps)
    found = [continual_metrics(run.reshape(tasks * steps, tasks), current) for run in accuracy]
    return {name: float(np.mean([np.ravel(each[name])[-1] for each in found])) for name in COLUMNS}


def gap(accuracy: np.ndarray) -> tuple[float, float]:
    """How far old tasks fall soon after a switch, and how far they have risen again by the next.

    Means over switches, old tasks and seeds.
    """
    falls, rises = [], []
    for task in range(1, accuracy.shape[1]):
        before = accuracy[:, task - 1, -1, :task]
        lowest = accuracy[:, task, :SOON, :task].min(axis=1)
        falls += [before - lowest]
        rises += [accuracy[:, task, -1, :task] - lowest]
    fall, rise = (float(np.mean(np.concatenate(x, axis=1))) for x in (falls, rises))
    return fall, rise


def claims(stream: str, found: Found) -> list[str]:
    """What was said of the methods, with what is measured here."""

    def said(holds: bool, text: str) -> str:
        return f"{'shown' if holds else 'not shown'} ({stream}): {text}"

    sentences = []
    if "SGD, replay" in found:
        fall, rise = gap(found["SGD, replay"])
        text = (
            f"stability gap of SGD with replay: old tasks fall by {100 * fall:.1f} points (> 10) "
            f"within {SOON} iterations and regain {100 * rise:.1f} (> half) before the next switch"
        )
        sentences.append(said(fall > 0.1 and rise > fall / 2, text))
    if {"CLASSP", "SGD"} <= found.keys():
        (old, new), (sgd_old, sgd_new) = (found[n][:, 1, -1, :2].mean(0) for n in ("CLASSP", "SGD"))
        text = (
            f"after task 2, CLASSP is better on task 1 than SGD by > 10 points, {100 * old:.1f} "
            f"against {100 * sgd_old:.1f}, and within 2 on task 2, {100 * new:.1f} "
            f"against {100 * sgd_new:.1f}"
        )
        sentences.append(said(old - sgd_old > 0.1 and abs(new - sgd_new) <= 0.02, text))
    if {"CoSO", "GaLore"} <= found.keys():
        forgot, galore_forgot = (metrics(found[n])["forg"] for n in ("CoSO", "GaLore"))
        last, galore_last = (found[n][:, -1, -1, -1].mean() for n in ("CoSO", "GaLore"))
        text = (
            f"CoSO forgets at most half of what GaLore does, {100 * forgot:.1f} points against "
            f"{100 * galore_forgot:.1f}, and is within 2 points on the last task, "
            f"{100 * last:.1f} against {100 * galore_last:.1f}"
        )
        holds = forgot <= galore_forgot / 2 and last > galore_last - 0.02
        sentences.append(said(bool(holds), text))
    return sentences


def table(stream: str, found: Found, rates: dict[str, float]) -> Table:
    """Percent at the end of the stream, by method."""
    seeds, tasks, steps, _ = next(iter(found.values())).shape
    made = Table(title=f"{stream} digits: {tasks} tasks of {steps} iterations, {seeds} seeds (%)")
    made.add_column("")
    for heading in (*HEADINGS, "fall", "regained", "rate"):
        made.add_column(heading, justify="right")
    for name, accuracy in found.items():
        values = metrics(accuracy)
        numbers = [*(values[column] for column in COLUMNS), *gap(accuracy)]
        made.add_row(name, *(f"{100 * x:.1f}" for x in numbers), f"{rates[name]:g}")
    made.caption = f"fall: of old tasks within {SOON} iterations of a switch; regained: by the next"
    return made


def draw(found: dict[str, Found], path: Path) -> None:
    """Accuracy of every task against iterations, once it is met; the first task in black."""
    from matplotlib.figure import Figure

    names = [name for name in next(iter(found.values())) if name in DRAWN]
    figure = Figure(figsize=(2.7 * len(names), 3 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(names), sharex=True, sharey="row", squeeze=False)
    for row, (stream, results) in zip(grid, found.items(), strict=True):
        for axes, name in zip(row, names, strict=True):
            mean = 100 * results[name].mean(0)
            tasks, steps, _ = mean.shape
            for task in range(tasks):
                x = np.arange(task * steps, tasks * steps) + 1
                style: Any = {"color": f"C{task}", "linewidth": 0.8, "zorder": 2}
                if task == 0:
                    style = {"color": "black", "linewidth": 1.5, "zorder": 3}
                axes.plot(x, mean[task:, :, task].ravel(), label=f"task {task + 1}", **style)
            for switch in range(1, tasks):
                axes.axvline(switch * steps + 0.5, color="grey", linestyle=":", linewidth=0.8)
            axes.set_title(f"{stream}: {name}", fontsize="medium")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("test accuracy (%)")
    for axes in grid[-1]:
        axes.set_xlabel("iteration")
    grid[-1, 0].legend(fontsize="x-small", loc="lower center", ncols=2)
    save_figure(figure, path)
