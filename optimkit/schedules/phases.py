"""Putting phases after one another: a join, and a run of cycles that each end at a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optimkit.numerics import as_float, check_range
from optimkit.protocols import Array
from optimkit.schedules.shapes import transition


def check_steps(**arguments: Any) -> None:
    """Raises unless every named number of steps is >= 0; 1e4 is as good as 10000."""
    check_range(**arguments, ge=0)


def constant(value: Any) -> optax.Schedule:
    """The same value at every count."""

    def schedule(count: Any) -> Array:
        return jnp.broadcast_to(as_float(value), np.shape(count))

    return schedule


def join(*phases: tuple[Any, optax.Schedule]) -> optax.Schedule:
    """Phases after one another, each counting from its own start.

    Args:
      *phases: pairs of a first count and a schedule; the first counts must not fall. Where two are
        equal, the later phase wins, so that a phase without length is never seen. Each schedule
        is evaluated at every count, below zero too, and must clip.

    >>> halves = join((0, constant(1.0)), (2, constant(0.5)))
    >>> [float(halves(count)) for count in range(4)]
    [1.0, 1.0, 0.5, 0.5]
    """
    (first_start, first), *rest = phases

    def schedule(count: Any) -> Array:
        count = as_float(count)
        value = as_float(first(count - as_float(first_start)))
        for start, piece in rest:
            local = count - as_float(start)
            value = jnp.where(local >= 0, piece(local), value)
        return value

    return schedule


def after_warmup(
    schedule: optax.Schedule,
    *,
    warmup_steps: Any,
    start_value: Any,
    peak_value: Any,
    shape: str = "linear",
) -> optax.Schedule:
    """A ramp from ``start_value`` to ``peak_value``, then ``schedule`` counting from its end."""
    ramp = transition(start_value, peak_value, warmup_steps, shape)
    return join((0, ramp), (warmup_steps, schedule))


def check_budgets(budgets: Any, *, name: str = "budgets") -> tuple[int, ...]:
    """The budgets as a tuple of Python integers; raises unless they are increasing and > 0.

    >>> check_budgets([40, 40])
    Traceback (most recent call last):
    ...
    ValueError: budgets must be increasing integers above 0, got [40, 40]
    """
    values = list(budgets) if isinstance(budgets, (Sequence, np.ndarray)) else []
    whole = all(isinstance(b, (int, np.integer)) and not isinstance(b, bool) for b in values)
    if not (values and whole and all(a < b for a, b in zip([0, *values], values, strict=False))):
        raise ValueError(f"{name} must be increasing integers above 0, got {budgets!r}")
    return tuple(int(b) for b in values)


def consecutive(
    lengths: Sequence[Any], pieces: Sequence[optax.Schedule], *, end_value: Any
) -> optax.Schedule:
    """Schedules of given lengths after one another, each from its own start; then the end value.

    A length of 0 leaves its schedule out. Lengths may be traced.
    """
    *starts, total = itertools.accumulate(lengths, initial=0)
    return join(*zip(starts, pieces, strict=True), (total, constant(end_value)))


def per_phase(**arguments: Any) -> dict[str, list[Any]]:
    """Every argument as a list with one entry a phase; a single value holds for all phases.

    >>> per_phase(peak_values=[3.0, 2.0], warmup_steps=5)
    {'peak_values': [3.0, 2.0], 'warmup_steps': [5, 5]}

    Raises:
      ValueError: if two lists differ in length, or one is empty.
    """
    many = {
        name: list(value)
        for name, value in arguments.items()
        if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1
    }
    lengths = {name: len(value) for name, value in many.items()}
    if len({*lengths.values()}) > 1 or 0 in lengths.values():
        shown = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"every phase must have one value of each argument, got {shown}")
    phases = max(lengths.values(), default=1)
    return {name: many.get(name, [value] * phases) for name, value in arguments.items()}


def each(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """``values`` under the names ``name[0]``, ``name[1]`` ..., for a check of every entry."""
    return {f"{name}[{index}]": value for index, value in enumerate(values)}


def cycles(
    build: Callable[[int, int], optax.Schedule], budgets: Any, *, end_value: Any
) -> optax.Schedule:
    """One schedule per budget, each counting from the budget before; the end value after the last.

    Args:
      build: ``(index, length) -> schedule`` of one cycle.
      budgets: increasing counts at which the cycles end.
      end_value: held from the last budget on.
    """
    lengths = np.diff(check_budgets(budgets), prepend=0).tolist()
    pieces = [build(index, length) for index, length in enumerate(lengths)]
    return consecutive(lengths, pieces, end_value=end_value)
