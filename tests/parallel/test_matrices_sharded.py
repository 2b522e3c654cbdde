"""Matrices on a mesh: the numbers of one device, each leaf where it was, the work divided.

Runs on eight simulated devices in a process of its own (``XLA_FLAGS``, set by the Makefile).
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimkit as ok
from tests.parallel.cases import assert_close, make_mesh
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES

SHAPES = {
    "conv": {"kernel": (4, 4, 4, 8)},
    "first": {"kernel": (8, 16), "bias": (8,)},
    "second": {"kernel": (16, 8)},
    "query": {"kernel": (8, 4, 4)},
    "stack": {"kernel": (4, 16, 8)},
    "uneven": {"kernel": (5, 3)},
}
"""Seven 8 x 16 matrices make one bucket, which eight devices pad; ``uneven`` stays replicated."""

AXES = {"stack/kernel": ok.MatrixAxes((0,), (1,), (2,))}


def values(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


CUBIC = (1.5, -0.5, 0.0)
"""Five steps multiply rounding errors by 1.5^5 at most; the default triple by 3.44^5 = 485."""


def optimizer() -> Any:
    return ok.muon(0.1, weight_decay=0.1, ns_coeffs=CUBIC, ns_dtype="float32", matrix_axes=AXES)


def two_steps(params: Any, first: Any, second: Any) -> Any:
    tx = optimizer()
    updates, state = tx.update(first, tx.init(params), params)
    params = jax.tree.map(jnp.add, params, updates)
    updates, state = tx.update(second, state, params)
    return updates, state[0].inner_states["matrix"].inner_state[0][0].mu


@pytest.fixture(scope="module")
def expected() -> Any:
    return jax.jit(two_steps)(values(0), values(1), values(2))


def spec(shape: tuple[int, ...], axis: int, names: Any) -> P:
    """One axis of a leaf over one mesh axis or both, where it divides."""
    size = 8 if isinstance(names, tuple) else 4
    if axis >= len(shape) or shape[axis] % size:
        return P(*[None] * len(shape))
    return P(*[names if a == axis else None for a in range(len(shape))])


def place(tree: Any, mesh: Any, axis: int, names: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec(x.shape, axis, names))), tree
    )


@pytest.mark.parametrize("names", ["x", ("x", "y")])
@pytest.mark.parametrize("axis", range(4))
def test_explicit_mesh(expected: Any, axis: int, names: Any) -> None:
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, first, second = (place(values(s), mesh, axis, names) for s in range(3))
        updates, momentum = jax.jit(two_steps)(params, first, second)
    assert_close(updates, expected[0], 1e-5, f"axis {axis} over {names}")
    assert_close(momentum, expected[1], 1e-5, f"momentum, axis {axis} over {names}")

    def same_place(u: Any, p: Any) -> None:
        assert u.sharding.is_equivalent_to(p.sharding, p.ndim), f"{u.sharding} {p.sharding}"

    jax.tree.map(same_place, updates, params)


@pytest.mark.parametrize("axis", range(4))
def test_auto_mesh(expected: Any, axis: int) -> None:
    mesh = make_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        placed = (place(values(s), mesh, axis, "x") for s in range(3))
        updates, momentum = jax.jit(two_steps)(*placed)
    assert_close(updates, expected[0], 1e-5, f"auto mesh, axis {axis}")
    assert_close(momentum, expected[1], 1e-5, f"auto mesh, momentum, axis {axis}")


def test_explicit_mesh_without_jit_and_without_buckets() -> None:
    params = {"kernel": values(0)["first"]["kernel"]}
    mesh = make_mesh(AxisType.Explicit)
    tx = ok.orthogonalize_updates(ns_coeffs=CUBIC, ns_dtype="float32", bucket=False)
    expected, _ = tx.update(params, tx.init(params))
    with jax.set_mesh(mesh):
        placed = place(params, mesh, 0, "x")
        got, _ = tx.update(placed, tx.init(placed))
    assert_close(got, expected, 1e-5, "eager")
    assert got["kernel"].sharding.spec == P("x", None)


def layers(count: int = 8, width: int = 64) -> Any:
    return {f"layer_{i}": {"kernel": jnp.ones((width, width)) + i} for i in range(count)}


def compiled(tx: Any, params: Any) -> Any:
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    return step.lower(params, tx.init(params), params).compile()


def flops(tx: Any, params: Any) -> float:
    costs: Any = compiled(tx, params).cost_analysis()
    return costs["flops"]


def collectives(tx: Any, params: Any) -> dict[str, int]:
    """How many collectives of each kind that move more than a few numbers."""
    found: dict[str, int] = {}
    kinds = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
    for line in compiled(tx, params).as_text().splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match and re.search(r"\[[\d,]*\d{2,}", match[1]):
            found[match[2]] = found.get(match[2], 0) + 1
    return found


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("axis", [0, 1])
def test_each_device_orthogonalises_its_share(kind: AxisType, axis: int) -> None:
    """A bucket of eight equal matrices costs a device an eighth, and a bit for elementwise work."""
    tx = ok.muon(0.1, ns_dtype="float32")
    alone = flops(tx, layers())
    assert alone > 8 * 5 * 3 * 2 * 64**3
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        assert flops(tx, place(layers(), mesh, axis, "x")) < alone / 6
        if axis == 0:
            replicated = place(layers(), mesh, axis, None)
            assert flops(tx, replicated) < alone / 6


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_no_device_gathers_a_bucket(kind: AxisType) -> None:
    """Sharded leaves travel as all-to-all, there and back."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    tx = ok.orthogonalize_updates(ns_dtype="float32")
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P("x", None))
        params = jax.tree.map(lambda x: jax.device_put(x, spec), layers())
        found = collectives(tx, params)
    assert found.keys() == {"all-to-all"}, found
    if kind == AxisType.Explicit:
        assert found["all-to-all"] == 2  # one there, one back


def test_matrices_that_lie_whole_on_devices_stay_there() -> None:
    """Experts spread over the mesh need no traffic at all."""
    axes = {"experts/kernel": ok.MatrixAxes((0,), (1,), (2,))}
    tx = ok.orthogonalize_updates(ns_coeffs=CUBIC, ns_dtype="float32", matrix_axes=axes)
    params = {"experts": {"kernel": jnp.asarray(np.random.default_rng(3).normal(size=(16, 8, 12)))}}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected, _ = tx.update(params, tx.init(params))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P("x", None, None))
        placed = jax.tree.map(lambda x: jax.device_put(x, spec), params)
        assert collectives(tx, placed) == {}
        got, _ = jax.jit(tx.update)(placed, tx.init(placed))
    assert_close(got, expected, 1e-5, "experts")


def test_work_can_be_kept_to_some_mesh_axes() -> None:
    mesh = make_mesh(AxisType.Explicit)  # 4 x 2
    whole = ok.orthogonalize_updates(ns_dtype="float32")
    some = ok.orthogonalize_updates(ns_dtype="float32", axis_names=("x",))
    alone = flops(whole, layers())
    with jax.set_mesh(mesh):
        params = place(layers(), mesh, 0, "x")
        assert alone / 5 < flops(some, params) < alone / 3.5
        wrong = ok.orthogonalize_updates(axis_names=("model",))
        with pytest.raises(ValueError, match=r"the mesh has axes \('x', 'y'\), none is 'model'"):
            wrong.update(params, wrong.init(params))


@pytest.mark.parametrize("axis", [0, 1])
def test_fused_kernels_on_a_mesh(axis: int) -> None:
    settings: Any = {"ns_coeffs": CUBIC, "ns_dtype": "float32", "normuon_b2": 0.9}
    tx = ok.muon(0.1, split_outputs={"qkv/*": (8, 4, 4)}, scaling="spectral", **settings)
    rng = np.random.default_rng(5)
    params = {"qkv": {"kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)}}
    expected, _ = tx.update(params, tx.init(params), params)
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = place(params, mesh, axis, "x")
        got, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(placed)
        jax.jit(lambda p, s: tx.update(p, s, p))(placed, state)
    assert_close(got, expected, 1e-5, f"axis {axis}")
    assert got["qkv"]["kernel"].sharding.is_equivalent_to(placed["qkv"]["kernel"].sharding, 2)
