"""Prints the golden table: ``python -m tests.goldens [method ...]``.

One row a recorded case: method, case, the worst error and where, pass or fail.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from tests.goldens import adapters
from tests.goldens.golden import all_goldens


def main(methods: list[str]) -> int:
    table = Table(title="recorded trajectories, float64")
    for column in ("method", "case", "worst error", "array", "tolerance", "result"):
        table.add_column(column)
    failed = passed = 0
    for name, golden in all_goldens().items():
        if methods and golden.method not in methods:
            continue
        error, where, left = float("inf"), "", []
        try:
            errors = adapters.run(golden)
            where, error = max(errors.items(), key=lambda item: item[1])
            left = adapters.uncompared(golden, errors)
        except Exception as problem:
            where = f"{type(problem).__name__}: {problem}"
        fine = error <= golden.tolerance and not left
        passed, failed = passed + fine, failed + (not fine)
        result = "pass" if fine else f"FAIL {('not compared: ' + ', '.join(left)) if left else ''}"
        case = name.partition("__")[2]
        table.add_row(golden.method, case, f"{error:.1e}", where, f"{golden.tolerance:g}", result)
    console = Console(width=140)
    console.print(table)
    excuses = {
        f"{golden.method}: {array}": reason
        for golden in all_goldens().values()
        if not methods or golden.method in methods
        for array, reason in adapters.excused(golden).items()
    }
    for excuse, reason in excuses.items():
        console.print(f"not compared: {excuse}: {reason}")
    console.print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
