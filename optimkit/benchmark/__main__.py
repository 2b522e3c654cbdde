"""Entry point of ``python -m optimkit.benchmark``; a table is one module with ``add_command``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from optimkit.benchmark import estimators, matrices, memory, step_cost, tasks

TABLES = (step_cost, memory, matrices, estimators, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m optimkit.benchmark",
        description="What methods cost, as ratios taken in one run.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for table in TABLES:
        table.add_command(commands)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except KeyError as error:
        print(f"optimkit.benchmark: {error.args[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
