"""How steady a model is while it learns one task after another: the stability gap, measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.numerics import check_choice, check_count, compute_dtype
from optimkit.protocols import Array

SEARCHES = ("exact", "reference")


def windowed_max_drop(x: Array, window: int) -> jax.Array:
    r"""The largest fall within any ``window`` values up to now, at every step.

    .. math:: y_t = \max\Big(0, \max_{n \le t}\; \max_{n - W < m < n} (x_m - x_n)\Big)

    Args:
      x: a signal, with time on the first axis: accuracies; give ``-x`` for the largest rise, or the
        jumps of a loss.
      window: W, >= 1; 1 gives zero.

    Returns:
      An array like ``x``, f32 at least. Constant in memory beside it: the last W - 1 values.

    Raises:
      ValueError: if the window is no positive integer, or ``x`` has no time axis.

    >>> windowed_max_drop(jnp.array([1.0, 5.0, 4.0, 3.0, 3.0]), 2).tolist()
    [0.0, 0.0, 1.0, 1.0, 1.0]
    """
    check_count(window=window, least=1)
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("x must have a time axis, got a scalar")
    x = x.astype(compute_dtype(x))
    ring = jnp.full((window - 1, *x.shape[1:]), -jnp.inf, x.dtype)

    def step(carry: tuple[Array, Array], now: Array) -> tuple[tuple[Array, Array], Array]:
        ring, largest = carry
        earlier = jnp.max(ring, axis=0, initial=-jnp.inf)
        largest = jnp.maximum(largest, earlier - now)
        ring = jnp.concatenate([ring, now[None]])[1:] if window > 1 else ring
        return (ring, largest), largest

    return jax.lax.scan(step, (ring, jnp.zeros(x.shape[1:], x.dtype)), x)[1]


def _largest_fall(window: Sequence[float]) -> float:
    """Over all pairs that end at the newest value; older pairs were seen before."""
    return max(window[:-1], default=-np.inf) - window[-1]


def _largest_rise(window: Sequence[float]) -> float:
    return window[-1] - min(window[:-1], default=np.inf)


def _reference_rise(window: Sequence[float]) -> float:
    """The published search, which starts from running maxima of the window alone."""
    largest, highest = -np.inf, -np.inf
    for index, start in enumerate(window[:-1]):
        if start > highest:
            highest = start
            largest = max(largest, max(window[index + 1 :]) - start)
    return largest


class ContinualEval:
    """The metrics of ``continual_metrics``, fed one evaluation after the other, on the host.

    Args:
      num_tasks: K, >= 1.
      forgetting_windows: windows of WF, in evaluations, >= 1; 10 and 100 are the authors'.
      plasticity_windows: the same for WP.
      lca_beta: how many first evaluations of a task count for its LCA, >= 1.
      window_search: as for ``continual_metrics``.

    Raises:
      ValueError: if an argument is out of range.

    >>> watch = ContinualEval(2, forgetting_windows=(10,), plasticity_windows=(10,), lca_beta=1)
    >>> watch.update(0, [0.5, float("nan")])
    >>> watch.update(1, [0.25, 0.75])
    >>> found = watch.compute()
    >>> [found[name] for name in ("acc", "min_acc", "wc_acc", "wf_10", "forg")]
    [0.5, 0.25, 0.5, 0.125, 0.25]
    """

    def __init__(
        self,
        num_tasks: int,
        forgetting_windows: Sequence[int] = (10, 100),
        plasticity_windows: Sequence[int] = (10, 100),
        lca_beta: int = 10,
        *,
        window_search: Literal["exact", "reference"] = "exact",
    ) -> None:
        check_count(num_tasks=num_tasks, lca_beta=lca_beta, least=1)
        for window in forgetting_windows:
            check_count(forgetting_windows=window, least=1)
        for window in plasticity_windows:
            check_count(plasticity_windows=window, least=1)
        check_choice(SEARCHES, window_search=window_search)
        rise = _largest_rise if window_search == "exact" else _reference_rise
        self.num_tasks, self.lca_beta = num_tasks, lca_beta
        windows = (*forgetting_windows, *plasticity_windows)
        self._recent = [deque(maxlen=max(windows, default=1)) for _ in range(num_tasks)]
        self._extrema: dict[str, tuple[int, Callable[[Sequence[float]], float], np.ndarray]] = {
            **{f"wf_{w}": (w, _largest_fall, np.zeros(num_tasks)) for w in forgetting_windows},
            **{f"wp_{w}": (w, rise, np.zeros(num_tasks)) for w in plasticity_windows},
        }
        self._last = np.full(num_tasks, np.nan)
        self._ended = np.full(num_tasks, np.nan)
        self._lowest = np.full(num_tasks, np.nan)
        self._first: list[list[float]] = [[] for _ in range(num_tasks)]
        self._seen = np.zeros(num_tasks, bool)
        self._current: int | None = None

    def update(self, current_task: int, accuracies: Any) -> None:
        """Takes in one evaluation, made after the update of the parameters.

        Args:
          current_task: the task being learned, from 0.
          accuracies: one a task; NaN where it was not evaluated. Tasks not yet learned are ignored.

        Raises:
          ValueError: if there is not one accuracy a task, or no such task.
        """
        values = np.asarray(accuracies, np.float64)
        if values.shape != (self.num_tasks,):
            raise ValueError(f"accuracies must have shape ({self.num_tasks},), got {values.shape}")
        task = int(current_task)
        if task != current_task or not 0 <= task < self.num_tasks:
            raise ValueError(
                f"current_task must be an integer from 0 to {self.num_tasks - 1}, "
                f"got {current_task!r}"
            )
        self._seen[task], self._current = True, task
        for i in np.flatnonzero(self._seen & ~np.isnan(values)):
            value = float(values[i])
            self._last[i] = value
            if i == task:
                self._ended[i] = value
                if len(self._first[i]) < self.lca_beta:
                    self._first[i].append(value)
            else:
                self._lowest[i] = np.fmin(self._lowest[i], value)
            self._recent[i].append(value)
            recent = list(self._recent[i])
            for window, search, largest in self._extrema.values():
                largest[i] = max(largest[i], search(recent[-window:]))

    def compute(self) -> dict[str, Any]:
        """All metrics up to now: numbers, and arrays of one a task under ``<name>_per_task``.

        Raises:
          ValueError: before the first evaluation.
        """
        if np.all(np.isnan(self._last)):
            raise ValueError("no accuracy of a task learned so far was given: call update first")
        return self._computed()

    def _computed(self) -> dict[str, Any]:
        """As ``compute``; NaN before the first evaluation."""
        assert self._current is not None
        others = np.arange(self.num_tasks) != self._current
        current = self._last[self._current]
        lowest = np.where(others, self._lowest, np.nan)
        parts = np.append(lowest, current)
        lca = np.array(
            [np.mean(f) if len(f) == self.lca_beta else np.nan for f in self._first], np.float64
        )
        found: dict[str, Any] = {
            "acc": _mean(self._last),
            "min_acc": _mean(lowest),
            "min_acc_per_task": self._lowest.copy(),
            "wc_acc": _mean(parts) if not np.isnan(current) else float("nan"),
            "forg": _mean(np.where(others, self._ended - self._last, np.nan)),
            "lca": _mean(lca),
            "lca_per_task": lca,
        }
        evaluated = ~np.isnan(self._last)
        for name, (_, _, largest) in self._extrema.items():
            found[name] = _mean(np.where(evaluated, largest, np.nan))
            found[f"{name}_per_task"] = largest.copy()
        return found


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined; NaN if nothing is."""
    defined = values[~np.isnan(values)]
    return float(np.mean(defined)) if defined.size else float("nan")


def continual_metrics(
    accuracy: Array,
    current_task: Array,
    *,
    forgetting_window: int = 10,
    plasticity_window: int = 10,
    lca_beta: int = 10,
    window_search: Literal["exact", "reference"] = "exact",
) -> dict[str, Any]:
    r"""Worst-case metrics of continual learning, from accuracies taken at every iteration.

    With A(i, t) the accuracy on task i after iteration t, and k the number of tasks so far:

    - ``acc``: mean over the tasks learned so far.
    - ``min_acc``: mean over earlier tasks of the least accuracy since each was left.
    - ``wc_acc``: :math:`\frac1k A(k, t) + (1 - \frac1k)\,\mathrm{minACC}`.
    - ``wf``: mean over tasks of the largest fall within any window of W evaluations; ``wp``: of the
      largest rise.
    - ``forg``: mean over earlier tasks of the accuracy at the end of their training minus that now.
    - ``lca``: mean over tasks of the mean of the first beta accuracies while learning each.

    Args:
      accuracy: (T, K), NaN where a task was not evaluated; such entries are passed over.
      current_task: (T,), the task that each iteration learned, from 0.
      forgetting_window: W of ``wf``, counted in evaluations, not iterations, >= 1.
      plasticity_window: W of ``wp``.
      lca_beta: beta, >= 1; a task with fewer evaluations has no LCA.
      window_search: ``"exact"``; or ``"reference"``, the authors' search, which misses rises that
        start below a window's running maximum and so gives too small a ``wp``, mostly in between.

    Returns:
      NumPy traces (T,) of ``acc``, ``min_acc``, ``wc_acc``, ``wf``, ``wp`` and ``forg``, and (T, K)
      of ``min_acc_per_task``, ``wf_per_task`` and ``wp_per_task``; ``lca``, a number, and
      ``lca_per_task`` (K,). NaN where nothing is defined, as ``min_acc`` in the first task.

    Raises:
      ValueError: if shapes do not fit, there is no evaluation, or an argument is out of range.

    Between two evaluations of a task its last accuracy stands. Evaluating every 50th iteration
    hides the gap. A task that is learned again is left out of ``min_acc`` meanwhile.

    >>> nan = float("nan")
    >>> accuracy = [[0.5, nan], [0.9, nan], [0.3, 0.5], [0.7, 0.9]]
    >>> found = continual_metrics(np.array(accuracy), np.array([0, 0, 1, 1]))
    >>> found["min_acc"].tolist(), found["wf_per_task"][-1].round(3).tolist()
    ([nan, nan, 0.3, 0.3], [0.6, 0.0])
    >>> found["forg"].round(3).tolist()
    [nan, nan, 0.6, 0.2]

    Reference: De Lange et al., "Continual evaluation for lifelong learning: Identifying the
    stability gap", ICLR 2023, arXiv 2205.13452. Agrees with the authors' code, whose averages are
    rounded to f32.
    """
    values, tasks = np.asarray(accuracy, np.float64), np.asarray(current_task)
    if values.ndim != 2 or tasks.shape != values.shape[:1]:
        raise ValueError(
            f"accuracy must be (T, K) and current_task (T,), got {values.shape} and {tasks.shape}"
        )
    if not np.any(~np.isnan(values)):
        raise ValueError(f"accuracy of shape {values.shape} holds no evaluation")
    watch = ContinualEval(
        values.shape[1],
        (forgetting_window,),
        (plasticity_window,),
        lca_beta,
        window_search=window_search,
    )
    rename = {f"wf_{forgetting_window}": "wf", f"wp_{plasticity_window}": "wp"}
    traces: dict[str, list[Any]] = {}
    found: dict[str, Any] = {}
    for task, row in zip(tasks.tolist(), values, strict=True):
        watch.update(task, row)
        for name, value in watch._computed().items():
            short = name.removesuffix("_per_task")
            found[name.replace(short, rename.get(short, short), 1)] = value
        for name, value in found.items():
            traces.setdefault(name, []).append(value)
    watch.compute()  # raises if no task was evaluated once it was learned
    return {
        name: found[name] if name.startswith("lca") else np.asarray(rows)
        for name, rows in traces.items()
    }
