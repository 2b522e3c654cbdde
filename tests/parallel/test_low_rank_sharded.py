"""Subspace iteration on a mesh: its start and its products are divided like the matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimkit as ok
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES


def last_update(place) -> dict[str, np.ndarray]:
    """The third update, after two refreshes, of a matrix and a stack of matrices."""
    rng = np.random.default_rng(0)
    shapes = {"flat": (8, 16), "stack": (4, 16, 8)}
    grads = [
        {n: place(jnp.asarray(rng.normal(size=s), jnp.float32)) for n, s in shapes.items()}
        for _ in range(3)
    ]
    tx = ok.fira(
        0.1, rank=3, update_proj_gap=2, projector="subspace", lowrank_leaves=lambda path, leaf: True
    )
    step, state = jax.jit(tx.update), tx.init(grads[0])
    for g in grads:
        updates, state = step(g, state, grads[0])
    assert step._cache_size() == 1
    return jax.tree.map(np.asarray, updates)


def test_subspace_iteration_on_a_mesh() -> None:
    expected = last_update(lambda x: x)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        got = last_update(lambda x: jax.device_put(x, NamedSharding(mesh, P("x", "y"))))
    for name, update in expected.items():
        np.testing.assert_allclose(got[name], update, atol=1e-4 * np.abs(update).max())
