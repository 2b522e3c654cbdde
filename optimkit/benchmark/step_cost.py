"""The step-cost table: one donated step of every recipe against ``optax.adamw`` in the same run.

The floor is what a method must move: gradient, parameter and state read once, parameter and state
written once; 28 bytes a parameter for AdamW. A method is called in bounds when its time over
AdamW's is at most 1.25 times its floor over 28. Methods that multiply matrices are not judged by
their bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from optimkit import catalog
from optimkit.benchmark import measure

ADAMW_FLOOR = 28.0
SLACK = 1.25


class Row(NamedTuple):
    """One line of the table; times are ratios to ``optax.adamw`` in the same run."""

    name: str
    floor: float
    state: float
    temporary: float
    ratio: float
    allowed: float | None

    @property
    def verdict(self) -> str:
        """Whether time and temporary memory are within what the floor allows."""
        if self.allowed is None:
            return "multiplies matrices"
        return "ok" if self.ratio <= self.allowed and self.temporary <= 0.5 else "over"


def table(
    names: Sequence[str], leaves: int, rounds: int, rows: int = 640, columns: int = 728
) -> list[Row]:
    """Measures the named recipes; ``optax.adamw`` and the copy floor come first."""
    params = measure.model_tree(leaves, rows, columns)
    grads = jax.tree.map(lambda p: p * 0.1 + 1e-3, params)
    records = catalog.records("recipe")
    makers: dict[str, Any] = {"optax.adamw": (optax.adamw(1e-3), None)}
    floors = {"optax.adamw": (ADAMW_FLOOR, True)}
    for name in names or records:
        record = catalog.find(name, "recipe")
        makers[name] = record.build(), record.extras
        floors[name] = record.moved_bytes, record.communication in ("none", "reduce")
    costs = measure.beside_adamw(makers, params, grads, rounds)
    return [
        Row(
            name,
            floor,
            costs[name].state,
            costs[name].temporary,
            costs[name].ratio,
            SLACK * floor / ADAMW_FLOOR if by_bytes else None,
        )
        for name, (floor, by_bytes) in floors.items()
    ]


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds ``step-cost`` to the benchmark's commands."""
    parser = commands.add_parser("step-cost", help="one step of each recipe over optax.adamw's")
    parser.add_argument("names", nargs="*", help="catalog names; default: every recipe")
    parser.add_argument("--leaves", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=15)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    rows = table(args.names, args.leaves, args.rounds)
    device = jax.devices()[0].device_kind
    print(f"{device}, {args.leaves} leaves, medians of {args.rounds} alternating steps")
    print(f"{'method':24} {'floor':>6} {'state':>6} {'temp':>6} {'time':>6} {'allowed':>8}")
    for row in rows:
        allowed = "-" if row.allowed is None else f"{row.allowed:.2f}"
        print(
            f"{row.name:24} {row.floor:6.0f} {row.state:6.2f} {row.temporary:6.2f} "
            f"{row.ratio:6.2f} {allowed:>8}  {row.verdict}"
        )
    print("floor, state and temp in bytes a parameter; time over optax.adamw's in the same run")
    return 0
