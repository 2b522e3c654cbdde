"""Compiling and timing one training step; used by every table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.protocols import PyTree


def model_tree(leaves: int = 120, rows: int = 640, columns: int = 728) -> dict[str, Any]:
    """A tree of ``leaves`` f32 arrays, half matrices and half vectors: 28M parameters."""
    rng = np.random.default_rng(0)
    return {
        f"layer_{i}": {
            "kernel": jnp.asarray(rng.normal(size=(rows, columns)) * 0.02, jnp.float32),
            "bias": jnp.zeros(columns, jnp.float32),
        }
        for i in range(leaves // 2)
    }


def size_of(tree: PyTree) -> int:
    """How many numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def bytes_of(tree: PyTree) -> int:
    """How many bytes the arrays of a tree hold."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Step(NamedTuple):
    """One compiled, donated step with its buffers."""

    compiled: Any
    params: PyTree
    state: PyTree
    grads: PyTree

    def run(self) -> Step:
        """Takes the step, waits for it, and returns it with the new buffers."""
        params, state = self.compiled(self.params, self.state, self.grads)
        jax.block_until_ready((params, state))
        return self._replace(params=params, state=state)


def compile_step(
    tx: optax.GradientTransformation,
    params: PyTree,
    grads: PyTree,
    extras: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None,
) -> Step:
    """Compiles update and ``apply_updates`` as one step that may reuse its inputs' memory.

    ``extras``, as in a method's record, makes the extra arguments of ``update``.
    """
    tx = optax.with_extra_args_support(tx)
    params = jax.tree.map(jnp.copy, params)
    state = jax.jit(tx.init)(params)

    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        given = extras(params, grads) if extras else {}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    return Step(compiled, params, state, grads)


def temporary_bytes(step: Step) -> int:
    """Bytes that the compiled step needs beside its arguments and results."""
    return step.compiled.memory_analysis().temp_size_in_bytes


def peak_bytes(compiled: Any) -> int:
    """Bytes that a compiled program holds at most: what goes in, comes out and lies between."""
    found = compiled.memory_analysis()
    given = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return given + found.temp_size_in_bytes


def time_together(
    steps: dict[str, Step], rounds: int = 15
) -> tuple[dict[str, float], dict[str, Step]]:
    """Median seconds of each step, measured in turns, so that drift meets all alike.

    Returns:
      The seconds by name, and the steps with the buffers that they ended with.
    """
    steps = {name: step.run() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            steps[name] = step.run()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}, steps


class Cost(NamedTuple):
    """What a step costs: bytes a parameter, and its time over ``optax.adamw``'s."""

    weights: float
    state: float
    temporary: float
    ratio: float


def beside_adamw(
    makers: Mapping[str, tuple[optax.GradientTransformation, Any]],
    params: PyTree,
    grads: PyTree,
    rounds: int,
) -> dict[str, Cost]:
    """Measures each of ``(transformation, extras)`` in turns with ``optax.adamw``."""
    number = size_of(params)
    reference = compile_step(optax.adamw(1e-3), params, grads)
    costs = {}
    for name, (tx, extras) in makers.items():
        step = compile_step(tx, params, grads, extras)
        # Timing hands the buffers on, so the reference starts from those it ended with.
        seconds, ended = time_together({"base": reference, name: step}, rounds)
        reference = ended["base"]
        costs[name] = Cost(
            bytes_of(ended[name].params) / number,
            bytes_of(ended[name].state) / number,
            temporary_bytes(step) / number,
            seconds[name] / seconds["base"],
        )
    return costs
