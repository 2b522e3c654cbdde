"""The estimators table: what a training step holds in memory, by how it gets its gradient.

Peak bytes are the compiled step's arguments, results and temporaries, less what they share; the
parameters are donated, as in training. Nothing is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.benchmark import measure
from optimkit.gradients import forward_gradient, mezo, sam_gradient, spsa
from optimkit.protocols import Array, PyTree

RATE = 1e-3


class Row(NamedTuple):
    """One line of the table: peak and temporary bytes, and the peak over the forward pass's."""

    name: str
    peak: int
    temporary: int
    ratio: float


def loss(params: PyTree, x: Array) -> Array:
    """Mean square of a stack of layers; back-propagation keeps two arrays like x a layer."""
    for kernel in params.values():
        # Not tanh: XLA hands a stack of those to a library on CPUs, which hides what it stores.
        x = jnp.arctan(x @ kernel)
    return jnp.mean(jnp.square(x))


def steps() -> dict[str, Callable[[PyTree, Array, Array], Any]]:
    """``(params, key, x) -> results`` by name; the forward pass comes first."""

    def descend(params: PyTree, found: tuple[Any, PyTree]) -> tuple[Any, PyTree]:
        value, grads = found
        return value, jax.tree.map(lambda w, g: w - RATE * g, params, grads)

    def by_mezo(in_place: bool) -> Callable[[PyTree, Array, Array], Any]:
        step = mezo(RATE, in_place=in_place)
        return lambda params, key, x: step.loss_and_step(params, key, lambda w: loss(w, x))

    return {
        "forward pass": lambda params, key, x: loss(params, x),
        "back-propagation": lambda w, key, x: descend(w, jax.value_and_grad(loss)(w, x)),
        "sam_gradient": lambda w, key, x: descend(w, sam_gradient(loss)(w, x)),
        "forward_gradient": lambda w, key, x: descend(w, forward_gradient(loss)(w, key, x)),
        "spsa": lambda w, key, x: descend(w, spsa(loss)(w, key, x)),
        "mezo, in_place=False": by_mezo(False),
        "mezo": by_mezo(True),
    }


def table(layers: int = 16, width: int = 256, batch: int = 4096) -> list[Row]:
    """Compiles a step of every kind; the loss is that of ``layers`` square layers."""
    params = {f"layer_{i}": jnp.zeros((width, width)) for i in range(layers)}
    x, key = jnp.zeros((batch, width)), jnp.zeros((2,), jnp.uint32)
    rows: list[Row] = []
    for name, step in steps().items():
        donated = (0,) if rows else ()
        compiled = jax.jit(step, donate_argnums=donated).lower(params, key, x).compile()
        peak, temporary = measure.peak_bytes(compiled), _temporary(compiled)
        rows.append(Row(name, peak, temporary, peak / (rows[0].peak if rows else peak)))
    return rows


def _temporary(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds ``estimators`` to the benchmark's commands."""
    parser = commands.add_parser(
        "estimators", help="peak memory of a step by how it gets its gradient"
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4096)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    rows = table(args.layers, args.width, args.batch)
    weights = args.layers * args.width**2 * 4 / 2**20
    device = jax.devices()[0].device_kind
    print(f"{device}, {args.layers} layers of {args.width}, batch {args.batch}, f32")
    print(f"{'gradient by':22} {'peak MiB':>9} {'temp MiB':>9} {'over forward':>13}")
    for row in rows:
        peak, temporary = row.peak / 2**20, row.temporary / 2**20
        print(f"{row.name:22} {peak:9.1f} {temporary:9.1f} {row.ratio:13.2f}")
    print(f"the parameters are {weights:.1f} MiB; peak from the compiled memory analysis")
    return 0
