"""The sharding rule: parameters on a mesh give what one device gives, fed the same gradients.

Runs on eight simulated devices in a process of its own (``XLA_FLAGS``, set by the Makefile).
"""

from __future__ import annotations

import functools
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


class Subject:
    """A method, its jitted init and its jitted update."""

    def __init__(self, record: Method) -> None:
        self.record, self.tx = record, record.build()
        self.init = jax.jit(self.tx.init)
        self.step = jax.jit(functools.partial(call, record, self.tx))


def assert_close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(np.max(np.abs(b), initial=0), 1e-6)
        difference = np.max(np.abs(a - b), initial=0)
        assert difference <= tolerance * scale, f"{what}: {name} off by {difference / scale:.1e}"


def usual_placements(record: Method) -> tuple[str, ...]:
    """Every side of every matrix for methods that move whole matrices; two placements for others.

    ``make test-full`` runs all placements of all.
    """
    if record.communication == "matrix":
        return ("turn 0", "turn 1", "turn 3", "both")
    return ("turn 0", "both")


def check_sharding(
    subject: Subject,
    placements: Collection[str] = tuple(PLACEMENTS),
    eager: Collection[str] = tuple(PLACEMENTS),
) -> None:
    """Explicit and auto meshes, the placements, where the state lies, and what is moved.

    An eager init compiles each operation for each placement; those not in ``eager`` are jitted.
    """
    params, first, second = values(0), values(1), values(2)
    _, state = subject.step(first, subject.init(params), params)
    expected, _ = subject.step(second, state, params)
    tolerance = subject.record.tolerance.get("sharding", 1e-5)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = make_mesh(kind)
        with jax.set_mesh(mesh):
            for name in placements:
                placement = PLACEMENTS[name]
                if kind == AxisType.Auto and name != "turn 0":
                    continue  # the compiler decides there; one placement shows that it can
                placed = [place(tree, mesh, placement) for tree in (params, first, second)]
                what = f"{kind.name} mesh, {name}"
                state = (subject.tx.init if name in eager else subject.init)(placed[0])
                if kind == AxisType.Auto:
                    _, state = subject.step(placed[1], state, placed[0])
                    got, _ = subject.step(placed[2], state, placed[0])
                    assert_close(got, expected, tolerance, what)
                    continue
                step = subject.step.lower(placed[1], state, placed[0]).compile()
                # Compiled code refuses a state that it was not compiled for: the second step's.
                _, state = step(placed[1], state, placed[0])
                got, state = step(placed[2], state, placed[0])
                assert_close(got, expected, tolerance, what)
                check_places(subject.tx, placed[0], got, state, what)
                check_communication(subject.record, step.as_text(), what)


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


def check_communication(record: Method, compiled: str, what: str) -> None:
    """No all-gather in the compiled step of a method that says it needs none."""
    if record.communication not in ("none", "reduce"):
        return
    kinds = ("all-gather",) if record.communication == "reduce" else ("all-gather", "all-reduce")
    for kind in kinds:
        found = re.findall(rf"= \S+ {kind}(?:-start)?\(", compiled)
        assert not found, (
            f"{what}: {len(found)} {kind}s, but communication={record.communication!r}"
        )


def check_manual(subject: Subject) -> None:
    """``shard_map`` and ``pmap``: replicated parameters, averaged gradients."""
    params = values(0)
    per_device = jax.tree.map(lambda *g: np.stack(g), *[values(seed) for seed in range(1, 9)])
    mean = jax.tree.map(lambda g: jnp.asarray(np.mean(g, axis=0)), per_device)
    expected, _ = subject.step(mean, subject.init(params), params)
    tolerance = subject.record.tolerance.get("sharding", 1e-5)

    def first_step(params: Any, grads: Any) -> Any:
        return call(subject.record, subject.tx, grads, subject.tx.init(params), params)[0]

    def averaged(params: Any, grads: Any) -> Any:
        return first_step(params, jax.tree.map(lambda g: jax.lax.pmean(g[0], "i"), grads))

    mesh = jax.make_mesh((8,), ("i",))
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(averaged, mesh=mesh, in_specs=(P(), P("i")), out_specs=P()))
        batch = place(per_device, mesh, jax.tree.map(lambda _: P("i"), per_device))
        replicated = place(params, mesh, jax.tree.map(lambda _: P(), params))
        assert_close(mapped(replicated, batch), expected, tolerance, "shard_map")

    def averaged_pmap(params: Any, grads: Any) -> Any:
        return first_step(params, jax.tree.map(lambda g: jax.lax.pmean(g, "i"), grads))

    got = jax.pmap(averaged_pmap, axis_name="i", in_axes=(None, 0))(params, per_device)
    assert_close(jax.tree.map(lambda u: u[3], got), expected, tolerance, "pmap")
