"""The memory table: what each recipe keeps, what its step needs beside, and what then fits.

State is counted from the live arrays after a step, temporaries are what the compiled step asks for.
The second table divides: memory over the bytes of parameters, gradients, state and temporaries
that were measured; activations come on top and depend on the model and its batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from optimkit import catalog
from optimkit.benchmark import measure
from optimkit.numerics import check_count
from optimkit.transforms.adam import scale_by_adam
from optimkit.wrappers.accumulate import accumulate
from optimkit.wrappers.quantize_state import FORMATS, quantize_state
from optimkit.wrappers.state_dtype import with_state_dtype

MEMORIES = (16, 24, 80)
"""Gigabytes (1e9 bytes) for which the second table is made."""

QUARTER = {"rank": 160, "update_proj_gap": 200}
"""A quarter of the smaller side of the tree's matrices; no timed step renews the projectors."""

EXAMPLE_SIZES: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"min_size": 4096, "block_size": 256},
    "galore": QUARTER,
    "fira": QUARTER,
    "apollo": QUARTER,
    "apollo_mini": {"update_proj_gap": 200},
    "gradnormlorp": QUARTER,
    "coso": {"proj_rank": 15, "sketch_rank": 100, "history_capacity": 100, "update_proj_gap": 20},
}
"""Arguments that examples for small trees have otherwise than training has."""


class Row(NamedTuple):
    """One line of the table, in bytes a parameter; the time is a ratio to ``optax.adamw``'s."""

    name: str
    weights: float
    state: float
    temporary: float
    ratio: float

    def largest(self, gigabytes: float) -> float:
        """How many parameters fit, with gradients in the parameters' own dtype."""
        return gigabytes * 1e9 / (2 * self.weights + self.state + self.temporary)


def _adamw(direction: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(
        direction, optax.add_decayed_weights(1e-2), optax.scale_by_learning_rate(1e-3)
    )


def wrapped_adamw() -> dict[str, optax.GradientTransformation]:
    """AdamW under each wrapper that changes what it keeps."""
    made = {
        f"adamw, {name}": _adamw(quantize_state(scale_by_adam(), format=name)) for name in FORMATS
    }
    bfloat16 = with_state_dtype(scale_by_adam(), "bfloat16")
    return {
        **made,
        "adamw, bfloat16": _adamw(bfloat16),
        "adamw, accumulate": accumulate(optax.adamw(1e-3), 4),
        "adamw, MultiSteps": optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation(),
    }


def table(
    names: Sequence[str],
    leaves: int = 120,
    rounds: int = 7,
    rows: int = 640,
    columns: int = 728,
) -> list[Row]:
    """Measures ``optax.adamw``, the wrappers around AdamW, and every recipe; or those named."""
    check_count(least=1, rounds=rounds)
    params = measure.model_tree(leaves, rows, columns)
    grads = jax.tree.map(lambda p: p * 0.1 + 1e-3, params)
    wrapped = wrapped_adamw()
    makers: dict[str, Any] = {"optax.adamw": (optax.adamw(1e-3), None)}
    for name in names or (*wrapped, *catalog.records("recipe")):
        if name in wrapped:
            makers[name] = wrapped[name], None
        else:
            record = catalog.find(name, "recipe")
            makers[name] = record.build(**EXAMPLE_SIZES.get(name, {})), record.extras
    costs = measure.beside_adamw(makers, params, grads, rounds)
    return [Row(name, *cost) for name, cost in costs.items()]


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds ``memory`` to the benchmark's commands."""
    parser = commands.add_parser("memory", help="what each recipe keeps, and what then fits")
    parser.add_argument("names", nargs="*", help="rows of the table; default: all")
    parser.add_argument("--leaves", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=7)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints both tables."""
    rows = table(args.names, args.leaves, args.rounds)
    device = jax.devices()[0].device_kind
    print(f"{device}, {args.leaves} leaves, medians of {args.rounds} alternating steps")
    fits = " ".join(f"{f'{size} GB':>7}" for size in MEMORIES)
    print(f"{'method':26} {'state':>6} {'temp':>6} {'time':>6} {fits}")
    for row in rows:
        sizes = " ".join(f"{row.largest(size) / 1e9:6.2f}B" for size in MEMORIES)
        print(f"{row.name:26} {row.state:6.2f} {row.temporary:6.2f} {row.ratio:6.2f} {sizes}")
    print(
        "state and temp in bytes a parameter, from live arrays and from the compiled step; time "
        "over optax.adamw's in the same run;\nGB columns: billions of f32 parameters that fit "
        "with their gradients, state and temporaries, without activations"
    )
    return 0
