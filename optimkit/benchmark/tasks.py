"""The tasks table: what one gradient a task costs, and what combining them costs.

Times are ratios to one ``jax.grad`` a task, compiled and called by itself, in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit import catalog
from optimkit.benchmark.measure import bytes_of
from optimkit.multitask import task_gradients
from optimkit.protocols import GradientCombiner, PyTree


def model(tasks: int, width: int, depth: int) -> tuple[PyTree, Callable[[PyTree, Any], Any]]:
    """A shared trunk with one head a task, and the losses of the tasks."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    params = {
        "trunk": [matrix(width, width) for _ in range(depth)],
        "heads": matrix(tasks, width, 10),
    }

    def losses_fn(params: PyTree, batch: Any) -> Any:
        x = batch
        for kernel in params["trunk"]:
            x = jnp.tanh(x @ kernel)
        outputs = jnp.einsum("bw,kwo->kbo", x, params["heads"])
        return jnp.mean(jnp.square(outputs - 1), axis=(1, 2))

    return params, losses_fn


def gradient_table(
    tasks: int = 4, width: int = 256, depth: int = 4, rows: int = 256, rounds: int = 9
) -> dict[str, tuple[float, float]]:
    """Time over that of separate backward passes, and temporary memory over theirs, by form."""
    params, losses_fn = model(tasks, width, depth)
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(rows, width)), jnp.float32)

    def one(task: int) -> Callable[..., Any]:
        return lambda params, batch: losses_fn(params, batch)[task]

    alone = [
        jax.jit(jax.value_and_grad(one(task))).lower(params, batch).compile()
        for task in range(tasks)
    ]
    forms: dict[str, Callable[[], Any]] = {
        "separate": lambda: [call(params, batch) for call in alone],
    }
    memory = {"separate": max(map(temporary, alone))}
    sizes = {"together": None, "one at a time": 1}
    if tasks > 3:
        sizes["two at a time"] = 2
    for name, size in sizes.items():
        jitted = jax.jit(lambda p, b, size=size: task_gradients(losses_fn, p, b, batch_size=size))
        compiled = jitted.lower(params, batch).compile()
        memory[name] = temporary(compiled)
        forms[name] = lambda compiled=compiled: compiled(params, batch)
    seconds = in_turns(forms, rounds)
    unit = bytes_of(params)
    return {name: (seconds[name] / seconds["separate"], memory[name] / unit) for name in forms}


def temporary(compiled: Any) -> int:
    """Bytes that a compiled function needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def combiner_table(
    tasks: int = 4, width: int = 256, depth: int = 4, rounds: int = 9
) -> dict[str, float]:
    """Time of every combiner over that of the plain sum, on the gradients of the same model."""
    params, _ = model(tasks, width, depth)
    rng = np.random.default_rng(2)
    stacked = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(tasks, *p.shape)), jnp.float32), params
    )
    forms = {}
    for name, record in catalog.records("combiner").items():
        combiner = record.build()
        if not isinstance(combiner, GradientCombiner):
            continue
        extras = record.extras(params, stacked) if record.extras else {}
        try:
            state = combiner.init(params, tasks)
        except ValueError:  # it takes two gradients, no more
            continue

        def update(
            grads: PyTree, state: PyTree, update: Any = combiner.update, extras: Any = extras
        ):
            return update(grads, state, params, **extras)

        compiled = jax.jit(update).lower(stacked, state).compile()
        forms[name] = lambda compiled=compiled, state=state: compiled(stacked, state)
    seconds = in_turns(forms, rounds)
    return {name: seconds[name] / seconds["sum_combiner"] for name in forms}


def in_turns(forms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, measured in turns, so that drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for index in range(rounds + 1):
        for name, call in forms.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if index:  # the first call warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds ``tasks`` to the benchmark's commands."""
    parser = commands.add_parser("tasks", help="one gradient a task, and combining them")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints both tables."""
    print(f"gradients of {args.tasks} tasks on {jax.devices()[0].device_kind}, {args.rows} rows")
    print("  form                  time over separate    temporaries over the parameters' bytes")
    table = gradient_table(args.tasks, args.width, args.depth, args.rows, args.rounds)
    for name, (ratio, memory) in table.items():
        print(f"  {name:22}{ratio:18.2f}{memory:26.2f}")
    print("combining them")
    print("  combiner              time over the sum's")
    for name, ratio in combiner_table(args.tasks, args.width, args.depth, args.rounds).items():
        print(f"  {name:22}{ratio:18.2f}")
    return 0
