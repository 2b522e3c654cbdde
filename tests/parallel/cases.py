"""The sharding rule: parameters on a mesh give what one device gives, fed the same gradients.

Runs on eight simulated devices in a process of its own (``XLA_FLAGS``, set by the Makefile).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optimkit import catalog
from optimkit.layout import named_leaves
from optimkit.leaves import map_param_state
from optimkit.protocols import Method
from tests.contract.checks import call

SHARDING_CASES = {
    name: record
    for name, record in catalog.records().items()
    if record.kind in ("recipe", "piece", "wrapper")
}

SHAPES = {
    "conv": {"kernel": (2, 4, 4, 8)},
    "dense": {"kernel": (8, 16), "bias": (8,)},
    "other": {"kernel": (16, 8)},
    "query": {"kernel": (8, 4, 4)},
    "embed": {"embedding": (16, 8)},
    "temperature": (),
}
"""Every axis divides among the four devices of mesh axis x, or the two of y."""


def values(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def rotated(turn: int) -> Any:
    """Every leaf sharded along one axis, another one at each turn; four turns reach every axis."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))

    def one(index: int, shape: tuple[int, ...]) -> P:
        if not shape:
            return P()
        axis = (index + turn) % len(shape)
        mesh_axis = "x" if shape[axis] % 4 == 0 else "y"
        return P(*[mesh_axis if a == axis else None for a in range(len(shape))])

    return jax.tree.unflatten(structure, [one(i, shape) for i, shape in enumerate(leaves)])


def both_axes() -> Any:
    """Matrices sharded over both mesh axes at once, all else replicated."""

    def one(shape: tuple[int, ...]) -> P:
        return P("x", "y") if len(shape) == 2 else P(*[None] * len(shape))

    return jax.tree.map(one, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


PLACEMENTS = {
    **{f"turn {turn}": rotated(turn) for turn in range(4)},
    "both": both_axes(),
}


def make_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def place(tree: Any, mesh: jax.sharding.Mesh, placement: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, placement)


def stepper(record: Method) -> tuple[Any, Any, list[int]]:
    """The transformation, its jitted update, and a list that grows by one at every trace."""
    tx = record.build()
    traces: list[int] = []

    def step(grads: Any, state: Any, params: Any) -> Any:
        traces.append(1)
        return call(record, tx, grads, state, params)

    return tx, jax.jit(step), traces


def two_steps(tx: Any, step: Any, params: Any, first: Any, second: Any) -> Any:
    """Two updates at the same parameters, from an eager init."""
    _, state = step(first, tx.init(params), params)
    return step(second, state, params)


def assert_close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(np.max(np.abs(b), initial=0), 1e-6)
        difference = np.max(np.abs(a - b), initial=0)
        assert difference <= tolerance * scale, f"{what}: {name} off by {difference / scale:.1e}"


def usual_placements(record: Method) -> tuple[str, ...]:
    """Every placement for methods that move matrices; fewer for the others.

    Two turns shard every axis of a dense kernel. ``make test-full`` runs all placements of all.
    """
    if record.communication in ("matrix", "gather"):
        return tuple(PLACEMENTS)
    return ("turn 0", "both") if record.communication == "none" else ("turn 0", "turn 1", "both")


def check_sharding(record: Method, placements: Collection[str] = tuple(PLACEMENTS)) -> None:
    """One record: explicit and auto meshes, the placements, and where the state lies."""
    params, first, second = values(0), values(1), values(2)
    tolerance = record.tolerance.get("sharding", 1e-5)
    tx, step, traces = stepper(record)
    expected, _ = two_steps(tx, step, params, first, second)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = make_mesh(kind)
        with jax.set_mesh(mesh):
            for name in placements:
                placement = PLACEMENTS[name]
                if kind == AxisType.Auto and name != "turn 0":
                    continue  # the compiler decides there; one placement shows that it can
                placed = [place(tree, mesh, placement) for tree in (params, first, second)]
                traces.clear()
                got, state = two_steps(tx, step, *placed)
                what = f"{kind.name} mesh, {name}"
                assert_close(got, expected, tolerance, what)
                if kind == AxisType.Explicit:
                    check_places(tx, placed[0], got, state, what)
                    assert len(traces) == 1, f"{what}: a second step compiled again"


def check_places(tx: Any, params: Any, updates: Any, state: Any, what: str) -> None:
    """Updates and state lie where their parameters lie."""
    for (name, p), (_, u) in zip(named_leaves(params), named_leaves(updates), strict=True):
        assert u.sharding.is_equivalent_to(p.sharding, p.ndim), f"{what}: update {name} moved"
    places = dict(named_leaves(params))

    def check(name: str, leaf: Any) -> None:
        if leaf.shape == places[name].shape:
            assert leaf.sharding.is_equivalent_to(places[name].sharding, leaf.ndim), (
                f"{what}: the state of {name} lies elsewhere than its parameter"
            )

    map_param_state(tx.init, check, lambda leaf: None, state)


def check_communication(record: Method) -> None:
    """No all-gather in the compiled step of a method that says it needs none."""
    if record.communication not in ("none", "reduce"):
        return
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, grads = [place(values(seed), mesh, both_axes()) for seed in range(2)]
        tx, step, _ = stepper(record)
        compiled = step.lower(grads, tx.init(params), params).compile().as_text()
    gathers = re.findall(r"= \S+ all-gather(?:-start)?\(", compiled)
    assert not gathers, f"{len(gathers)} all-gathers, but communication={record.communication!r}"
    if record.communication == "none":
        reduces = re.findall(r"= \S+ all-reduce(?:-start)?\(", compiled)
        assert not reduces, f"{len(reduces)} all-reduces, but communication='none'"


def check_manual(record: Method) -> None:
    """``shard_map`` and ``pmap``: replicated parameters, averaged gradients."""
    params = values(0)
    per_device = jax.tree.map(lambda *g: jnp.stack(g), *[values(seed) for seed in range(1, 9)])
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), per_device)
    tx = record.build()

    def step(params: Any, grads: Any) -> Any:
        return call(record, tx, grads, tx.init(params), params)[0]

    expected = jax.jit(step)(params, mean)
    tolerance = record.tolerance.get("sharding", 1e-5)

    def averaged(params: Any, grads: Any) -> Any:
        grads = jax.tree.map(lambda g: jax.lax.pmean(g[0], "i"), grads)
        return step(params, grads)

    mesh = jax.make_mesh((8,), ("i",))
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(averaged, mesh=mesh, in_specs=(P(), P("i")), out_specs=P()))
        batch = place(per_device, mesh, jax.tree.map(lambda _: P("i"), per_device))
        replicated = place(params, mesh, jax.tree.map(lambda _: P(), params))
        assert_close(mapped(replicated, batch), expected, tolerance, "shard_map")

    def averaged_pmap(params: Any, grads: Any) -> Any:
        return step(params, jax.tree.map(lambda g: jax.lax.pmean(g, "i"), grads))

    got = jax.pmap(averaged_pmap, axis_name="i", in_axes=(None, 0))(params, per_device)
    assert_close(jax.tree.map(lambda u: u[3], got), expected, tolerance, "pmap")
