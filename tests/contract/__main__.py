"""Prints the contract table: ``python -m tests.contract [method ...]``.

One row a method, one column a rule: ``ok``, the dtypes that fail, or ``exempt``.
"""

from __future__ import annotations

import sys
import time

import jax
from rich.console import Console
from rich.table import Table

from tests.contract.checks import CHECKS, run_check
from tests.contract.test_contract import METHODS
from tests.contract.trees import DTYPES


def main(names: list[str]) -> int:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    table = Table(title="contract")
    for column in ("method", *CHECKS, "seconds"):
        table.add_column(column)
    messages = []
    failed = 0
    for name, record in METHODS.items():
        if names and name not in names:
            continue
        started = time.perf_counter()
        cells = []
        for rule in CHECKS:
            bad = []
            for dtype in DTYPES:
                try:
                    run_check(record, rule, dtype)
                except Exception as error:
                    bad.append(dtype)
                    messages.append(f"{name} {rule} {dtype}: {type(error).__name__}: {error}")
            exempt = rule in record.exempt or any(f"{rule}:{d}" in record.exempt for d in DTYPES)
            failed += bool(bad) and not exempt
            cells.append("exempt" if exempt else ", ".join(bad) or "ok")
        table.add_row(name, *cells, f"{time.perf_counter() - started:.1f}")
    console = Console(width=160)
    console.print(table)
    for message in messages:
        console.print(message[:1500], style="dim", markup=False, highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
