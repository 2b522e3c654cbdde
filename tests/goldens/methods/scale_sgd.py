"""The column normalisation alone, on recorded matrices."""

from __future__ import annotations

from typing import Any

from tests.goldens.adapters import arrays_of, build, compare_named
from tests.goldens.golden import Golden, flatten

NOT_COMPARED = {"input": "input"}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    tx, matrices = build(golden, **overrides), arrays_of(golden, "input")
    normalized, _ = tx.update(matrices, tx.init(matrices))
    return compare_named(golden, {f"output/{n}": x for n, x in flatten(normalized).items()})
