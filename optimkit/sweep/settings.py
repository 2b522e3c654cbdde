"""Which settings a sweep has, and whether a factory can be swept over them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from optimkit.numerics import check_choice
from optimkit.protocols import record_of

GIVEN = frozenset({"params", "value", "grad", "value_fn", "grad_fn"})
"""What a sweep hands to every update, beside the gradient."""

Setting = dict[str, float]


def make_settings(values: Mapping[str, Any], combine: str) -> tuple[Setting, ...]:
    """Every setting of a sweep: all combinations of the lists, or their entries side by side.

    >>> make_settings({"learning_rate": [1, 2], "b1": [0.8, 0.9]}, "zip")
    ({'learning_rate': 1.0, 'b1': 0.8}, {'learning_rate': 2.0, 'b1': 0.9})

    Raises:
      ValueError: if a list is empty or holds anything but numbers, there is none, or lists that go
        side by side differ in length.
    """
    check_choice(("product", "zip"), combine=combine)
    if not values:
        raise ValueError("a sweep needs a list of values, such as learning_rate=[1e-3, 3e-3]")
    lists = {name: _numbers(name, given) for name, given in values.items()}
    if combine == "product":
        rows = itertools.product(*lists.values())
    elif len({len(numbers) for numbers in lists.values()}) > 1:
        shown = ", ".join(f"{len(numbers)} {name}" for name, numbers in lists.items())
        raise ValueError(f"combine='zip' needs lists of one length, got {shown}")
    else:
        rows = zip(*lists.values(), strict=True)
    return tuple(dict(zip(lists, row, strict=True)) for row in rows)


def _numbers(name: str, given: Any) -> list[float]:
    if not isinstance(given, (list, tuple, range)) and getattr(given, "ndim", 0) != 1:
        raise ValueError(
            f"{name} must be a list of numbers, got {given!r}; what all settings share goes into "
            f"fixed={{{name!r}: ...}}"
        )
    items = [np.asarray(item) for item in given]
    if not items or not all(x.ndim == 0 and x.dtype.kind in "iuf" and x == x for x in items):
        raise ValueError(f"{name} must be a list of one or more numbers, got {given!r}")
    return [float(x) for x in items]


def name_of(factory: Callable[..., Any]) -> str:
    """What to call a factory in a message."""
    return getattr(factory, "__name__", None) or repr(factory)


def check_factory(
    factory: Callable[..., Any],
    swept: Iterable[str],
    fixed: Mapping[str, Any],
    extras: Callable[..., Any] | None,
) -> None:
    """Raises unless the factory makes an optimizer and all its swept arguments may be traced.

    A factory of your own has no record: there, only the names are checked.

    Raises:
      TypeError: for an argument that it lacks, or that is fixed at construction.
      ValueError: for an argument that is swept and fixed, or a method that needs other extras.
    """
    record, name = record_of(factory), name_of(factory)
    if record is not None and record.kind not in ("recipe", "piece"):
        raise TypeError(
            f"{name} is a {record.kind}, not an optimizer: sweep a function of your own that puts "
            f"it into one, such as lambda learning_rate: optax.sgd({name}(...))"
        )
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for argument in (*swept, *fixed):
        if argument not in parameters and not open_ended:
            raise TypeError(f"{name} has no argument {argument!r}; it has {list(parameters)}")
    for argument in swept:
        if argument in fixed:
            raise ValueError(f"{argument} is swept and in fixed: give it once")
        if record is not None and argument not in record.traced:
            raise TypeError(
                f"{argument!r} of {name} shapes the program, so it cannot be swept: give it in "
                f"fixed, one sweep a value. What can be swept: {list(record.traced)}"
            )
    missing = set(record.needs) - GIVEN if record is not None else set()
    if missing and extras is None:
        raise ValueError(
            f"{name} needs {sorted(missing)} in every update: give extras=, a function "
            "(params, grads, batch) -> dict"
        )
