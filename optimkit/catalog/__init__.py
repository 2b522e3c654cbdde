"""The catalog: every public factory with its record. For tests, tables and command lines.

``records()`` imports every module of optimkit and collects each ``RECORD`` and ``RECORDS``;
``find(name)`` and ``make(name, ...)`` look one up, and name the nearest ones when there is none.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from typing import Any

import optimkit
from optimkit.protocols import Kind, Method

_PACKAGES = ("transforms", "wrappers", "optimizers", "schedules", "multitask")


@functools.cache
def records(kind: Kind | None = None) -> dict[str, Method]:
    """Every record by name, sorted, or those of one kind."""
    found: dict[str, Method] = {}
    for package_name in _PACKAGES:
        package = importlib.import_module(f"{optimkit.__name__}.{package_name}")
        for module_info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            module = importlib.import_module(module_info.name)
            single = getattr(module, "RECORD", None)
            for record in (*getattr(module, "RECORDS", ()), *((single,) if single else ())):
                if record.name in found:
                    raise RuntimeError(f"two records are called {record.name!r}")
                found[record.name] = record
    return {
        name: record
        for name, record in sorted(found.items())
        if kind is None or record.kind == kind
    }


def nearest(word: str, words: list[str]) -> str:
    """A phrase that offers the closest words, for error messages."""
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {words}"


def find(name: str, kind: Kind | None = None) -> Method:
    """The record called ``name``.

    Raises:
      KeyError: if there is none; the message names the nearest ones.
    """
    known = records(kind)
    if name not in known:
        raise KeyError(f"no {kind or 'method'} is called {name!r}; {nearest(name, list(known))}")
    return known[name]


def check_keywords(factory: Any, keywords: dict[str, Any]) -> None:
    """Raises a TypeError that names the nearest keyword for every one that a factory lacks."""
    parameters = list(inspect.signature(factory).parameters)
    for keyword in keywords:
        if keyword not in parameters:
            raise TypeError(
                f"{factory.__name__} has no argument {keyword!r}; {nearest(keyword, parameters)}"
            )


def make(name: str, kind: Kind | None = None, /, **keywords: Any) -> Any:
    """Builds a method by its catalog name.

    >>> tx = make("lion", learning_rate=1e-3)
    """
    record = find(name, kind)
    check_keywords(record.factory, keywords)
    return record.factory(**keywords)
