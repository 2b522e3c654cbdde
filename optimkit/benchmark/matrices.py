"""The matrices table: what the matrix engine and the methods on top of it cost, and what they give.

Every figure is a ratio to something measured in the same run: a plain matrix product, or
``optax.contrib.muon``, or Muon. Limits stand beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimkit
from optimkit import catalog
from optimkit.benchmark import measure
from optimkit.matrices.newton_schulz import NS_COEFFS, newton_schulz, plain_flops
from optimkit.protocols import Method, PyTree

SPREAD = ("muon", "root", "mkor")
"""Methods whose work must be divided among devices, once the catalog has them."""

SHARE = 1 / 6
DEVICES = 8

OVER_MUON = {"auon": 0.20}
"""Methods with a limit on the time of their step over Muon's."""

SINGULAR_VALUES = {  # of five steps in f64 on s in [0.01, 1]
    "keller": (0.68, 1.13),
    "dion": (0.97, 1.04),
    "polar_express": (0.85, 1.15),
}


class Figure(NamedTuple):
    """One line of the table: a number, and the limit that it has to keep."""

    what: str
    value: float
    limit: float | None = None
    at_least: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, ``over`` or ``under``; empty without a limit."""
        if self.limit is None:
            return ""
        if self.at_least:
            return "ok" if self.value >= self.limit else "under"
        return "ok" if self.value <= self.limit else "over"

    def line(self) -> str:
        """The line of the table."""
        sign = ">=" if self.at_least else "<="
        limit = "" if self.limit is None else f"{sign} {self.limit:.3g}"
        return f"  {self.what:58} {self.value:8.3g} {self.unit:8} {limit:9} {self.verdict}".rstrip()


# ---------------------------------------------------------------------------------------------
# Trees
# ---------------------------------------------------------------------------------------------


def transformer_tree(layers: int = 12, width: int = 384) -> PyTree:
    """Matrices of a transformer: six a layer, ``width`` to four times ``width`` wide."""
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    return {
        f"layer_{i}": {
            name: {"kernel": jnp.asarray(rng.normal(size=shape) * 0.02, jnp.float32)}
            for name, shape in shapes.items()
        }
        for i in range(layers)
    }


def small_tree(count: int = 192, width: int = 64) -> PyTree:
    """Many small square matrices."""
    rng = np.random.default_rng(0)
    return {
        f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=(width, width)) * 0.1, jnp.float32)}
        for i in range(count)
    }


def gradient_like(params: PyTree) -> PyTree:
    """A fixed gradient of full rank."""
    return jax.tree.map(lambda p: 0.1 * p + 1e-3 * jnp.sin(1000 * p), params)


def tree_flops(params: PyTree, steps: int = 5) -> int:
    """Operations of plain Newton-Schulz on a tree of 2-d leaves."""
    return sum(
        plain_flops(min(leaf.shape), max(leaf.shape), steps) for leaf in jax.tree.leaves(params)
    )


# ---------------------------------------------------------------------------------------------
# Speed and memory
# ---------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """A compiled function, how long compiling took, and the seconds of its calls."""

    call: Callable[[], Any]
    compile_seconds: float
    temporary: float
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return float(np.median(self.seconds))


def timed_step(tx: optax.GradientTransformation, params: PyTree) -> Timed:
    """A donated step of an optimizer, traced and compiled here without any cache."""
    grads, number = gradient_like(params), measure.size_of(params)
    started = time.perf_counter()
    step = measure.compile_step(tx, params, grads)
    compiled = time.perf_counter() - started
    held = [step]

    def call() -> None:
        held[0] = held[0].run()

    return Timed(call, compiled, measure.temporary_bytes(step) / number, [])


def timed_products(dtype: Any, flops: float, size: int = 1024) -> tuple[Timed, float]:
    """Plain square products that accumulate in f32, and how many operations a call makes.

    About ``flops`` of them, so that a busy machine slows this call as much as what it is held to.
    """
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)

    def square(x: Any) -> Any:
        return jnp.matmul(x, x, preferred_element_type=jnp.float32)

    compiled = jax.jit(square).lower(x).compile()
    repeats = max(1, round(flops / (2 * size**3)))

    def call() -> None:
        for _ in range(repeats):
            jax.block_until_ready(compiled(x))

    return Timed(call, 0.0, 0.0, []), repeats * 2.0 * size**3


def take_turns(timed: Sequence[Timed], rounds: int) -> None:
    """Times each in turn, so that drift meets all alike."""
    for one in timed:
        one.call()
        one.seconds.clear()
    for _ in range(rounds):
        for one in timed:
            started = time.perf_counter()
            one.call()
            one.seconds.append(time.perf_counter() - started)


def speed(rounds: int, layers: int = 12, width: int = 384, small: int = 192) -> list[Figure]:
    """Time, compile time and temporary memory over those of ``optax.contrib.muon``."""
    figures = []
    large = transformer_tree(layers, width)
    jax.clear_caches()
    dtypes = ("float32", "bfloat16")
    steps = {dtype: timed_step(optimkit.muon(1e-3, ns_dtype=dtype), large) for dtype in dtypes}
    alone = {
        dtype: timed_step(optimkit.orthogonalize_updates(ns_dtype=dtype), large) for dtype in dtypes
    }
    reference = timed_step(optax.contrib.muon(1e-3), large)
    products = {dtype: timed_products(dtype, tree_flops(large) / 2) for dtype in dtypes}
    for dtype in dtypes:  # products before and after, since theirs is the rate to hold against
        take_turns([products[dtype][0], alone[dtype], products[dtype][0]], rounds)
    take_turns([*steps.values(), reference], rounds)
    number = f"{len(jax.tree.leaves(large))} matrices"
    for dtype in dtypes:
        product, flops = products[dtype]
        rate = flops / product.median
        reached = tree_flops(large) / alone[dtype].median / rate
        what = f"{number}: Newton-Schulz over product rate, {dtype}"
        figures.append(Figure(what, reached, 0.75, at_least=True))
    for dtype in dtypes:
        ratio = reference.median / steps[dtype].median
        what = f"{number}: speed over optax.contrib.muon, {dtype}"
        figures.append(Figure(what, ratio, 1.0, at_least=True, unit="x"))
    for name, step in (*steps.items(), ("optax", reference)):
        limit = None if name == "optax" else 10.0
        what = f"{number}: temporary memory, {name}"
        figures.append(Figure(what, step.temporary, limit, unit="B/param"))
    many = small_tree(small)
    jax.clear_caches()
    reference = timed_step(optax.contrib.muon(1e-3), many)
    jax.clear_caches()
    steps = {dtype: timed_step(optimkit.muon(1e-3, ns_dtype=dtype), many) for dtype in dtypes}
    take_turns([*steps.values(), reference], 3 * rounds)
    for dtype, step in steps.items():
        ratio = reference.median / step.median
        what = f"{small} of 64x64: speed over optax.contrib.muon, {dtype}"
        figures.append(Figure(what, ratio, 1.5, at_least=True, unit="x"))
        ratio = step.compile_seconds / reference.compile_seconds
        figures.append(Figure(f"{small} of 64x64: compile time over optax's, {dtype}", ratio, 0.40))
    return figures


def over_muon(rounds: int, layers: int = 4, width: int = 384) -> list[Figure]:
    """The step of every recipe that works on whole matrices, over Muon's in the same run."""
    params = transformer_tree(layers, width)
    records = catalog.records("recipe")
    names = [name for name, record in records.items() if record.communication == "matrix"]
    names = [name for name in dict.fromkeys([*names, *OVER_MUON]) if name in records]
    steps = {}
    for name in names:
        try:
            steps[name] = timed_step(records[name].build(), params)
        except (TypeError, ValueError) as error:  # one that needs more than a gradient
            print(f"  {name}: not timed, {str(error).splitlines()[0]}")
    take_turns(list(steps.values()), rounds)
    return [
        Figure(f"{name}: step over muon's", step.median / steps["muon"].median, OVER_MUON.get(name))
        for name, step in steps.items()
    ]


# ---------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------


def step_flops(
    tx: optax.GradientTransformation, params: PyTree, extras: dict[str, Any] | None = None
) -> float:
    """Operations a device of the compiled step, as the compiler counts them."""

    def step(grads: PyTree, state: PyTree, params: PyTree, extras: dict[str, Any]) -> Any:
        return optax.with_extra_args_support(tx).update(grads, state, params, **extras)

    compiled = jax.jit(step).lower(params, tx.init(params), params, extras or {}).compile()
    costs: Any = compiled.cost_analysis()
    return float(costs["flops"])


def shares(names: Sequence[str], layers: int = 8, width: int = 64) -> dict[str, float]:
    """Operations a device over those of the replicated form, by method and kind of mesh."""
    params = transformer_tree(layers, width)
    records = catalog.records("recipe")
    found = {}

    def flops(record: Method, params: PyTree) -> float:
        extras = dict(record.extras(params, params)) if record.extras else {}
        return step_flops(record.build(), params, extras)

    for name in names:
        alone = flops(records[name], params)
        for kind in (AxisType.Explicit, AxisType.Auto):
            mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))
            for spec in (P(None, None), P("data", None), P(None, "data")):
                with jax.set_mesh(mesh):
                    place = NamedSharding(mesh, spec)
                    placed = jax.tree.map(lambda x, place=place: jax.device_put(x, place), params)
                    share = flops(records[name], placed) / alone
                where = "replicated" if spec == P(None, None) else f"sharded on {tuple(spec)}"
                found[f"{name}, {kind.name.lower()} mesh, {where}"] = share
    return found


def on_devices() -> list[Figure]:
    """Runs ``shares`` in a process of its own, with simulated devices."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "optimkit.benchmark", "matrices", "--shares-as-json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run on {DEVICES} devices failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [Figure(f"{what}: operations a device", share, SHARE) for what, share in found.items()]


# ---------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------


def singular_values(rows: int = 48, cols: int = 96) -> list[Figure]:
    """Extreme singular values of the result, for singular values between 0.01 and 1."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(rng.normal(size=(cols, cols)))
    spectrum = np.geomspace(0.05, 1.0, rows)
    spectrum /= np.linalg.norm(spectrum)
    x = jnp.asarray(left * spectrum @ right[:rows], jnp.float32)
    figures = []
    for name in NS_COEFFS:
        for dtype in ("float32", "bfloat16"):
            y = np.asarray(newton_schulz(x, 5, name, dtype=dtype), np.float64)
            got = np.linalg.svd(y, compute_uv=False)
            slack = 0.005 if dtype == "float32" else 0.05  # the ranges have two digits
            low, high = SINGULAR_VALUES[name]
            what = f"{name}, {dtype}: singular values"
            figures.append(Figure(f"{what}, least", got.min(), low - slack, at_least=True))
            figures.append(Figure(f"{what}, largest", got.max(), high + slack))
    return figures


def bad_input() -> list[tuple[str, str]]:
    """What the library says to input that cannot be right: (case, message or ``accepted``)."""
    vector, matrix = {"w": jnp.ones(3)}, {"kernel": jnp.ones((2, 2))}
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))

    def absent_axis() -> None:
        tx = optimkit.orthogonalize_updates(axis_names=("model",))
        with jax.set_mesh(mesh):
            placed = jax.device_put(matrix, NamedSharding(mesh, P(None, None)))
            tx.update(placed, tx.init(placed))

    cases: dict[str, Callable[[], Any]] = {
        "a vector for a matrix": lambda: optimkit.muon(0.1, matrix_leaves=["w"]).init(vector),
        "three triples for five steps": lambda: optimkit.muon(0.1, ns_coeffs=[(1, 2, 3)] * 3),
        "a pair for a triple": lambda: optimkit.muon(0.1, ns_coeffs=(1.0, 2.0)),
        "an unknown table": lambda: optimkit.muon(0.1, ns_coeffs="kellar"),
        "an unknown scaling": lambda: optimkit.muon(0.1, scaling="adam"),  # type: ignore[arg-type]
        "a mesh axis that does not exist": absent_axis,
    }
    said = []
    for what, call in cases.items():
        try:
            call()
            said.append((what, "accepted"))
        except ValueError as error:
            said.append((what, str(error)))
    return said


# ---------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds ``matrices`` to the benchmark's commands."""
    parser = commands.add_parser("matrices", help="the matrix engine, Muon and its relatives")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12, help="of the larger tree")
    parser.add_argument("--shares-as-json", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; the exit status is 1 when a figure misses its limit."""
    if args.shares_as_json:
        present = catalog.records("recipe")
        print(json.dumps(shares([name for name in SPREAD if name in present])))
        return 0
    # Compile times are part of the table: nothing may come from a cache on disk.
    jax.config.update("jax_enable_compilation_cache", False)
    missed = False
    parts: dict[str, Callable[[], list[Figure]]] = {
        f"speed on {jax.devices()[0].device_kind}, medians of {args.rounds}": lambda: speed(
            args.rounds, args.layers
        ),
        "methods on whole matrices": lambda: over_muon(args.rounds),
        f"work divided among {DEVICES} simulated devices": on_devices,
        "singular values after five steps": singular_values,
    }
    for title, measure_part in parts.items():
        print(title, flush=True)
        for figure in measure_part():
            print(figure.line(), flush=True)
            missed |= figure.verdict not in ("", "ok")
    print("bad input")
    for what, message in bad_input():
        print(f"  {what}: {message}")
        missed |= message == "accepted"
    return int(missed)
