"""Clients divided among eight devices give what one device gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from optimkit.federated import federated_momentum, fedhyper
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES

RNG = np.random.default_rng(0)
PARAMS: Any = {"w": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32), "b": jnp.ones(3)}
BATCHES = jnp.asarray(RNG.normal(size=(16, 2, 4, 6)), jnp.float32)
WHO = jnp.asarray(RNG.permutation(20)[:16])
WEIGHTS = jnp.ones(16).at[jnp.array([3, 9])].set(0.0)
MESHES: Any = {
    "eight": lambda: jax.make_mesh((8,), ("clients",), (AxisType.Auto,)),
    "four of two axes": lambda: jax.make_mesh((2, 4), ("x", "clients"), (AxisType.Auto,) * 2),
    "explicit": lambda: jax.make_mesh((8,), ("clients",), (AxisType.Explicit,)),
}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean(jnp.square(jnp.tanh(batch @ params["w"] + params["b"][None]) - 0.5))


def build(kind: str, mesh: Any) -> Any:
    if kind == "fedhyper":
        return fedhyper(
            jax.grad(loss), variant="full", local_learning_rate=0.3, local_steps=2,
            clients_per_round=16, mesh=mesh,
        )  # fmt: skip
    return federated_momentum(
        jax.grad(loss), algorithm="scaffold_m_vr", local_learning_rate=0.3, local_steps=2,
        server_learning_rate=1.0, mesh=mesh,
    )  # fmt: skip


@pytest.mark.parametrize("where", MESHES)
@pytest.mark.parametrize("kind", ["scaffold_m_vr", "fedhyper"])
def test_rounds_on_a_mesh(kind: str, where: str) -> None:
    results = []
    for mesh in (None, MESHES[where]()):
        method = build(kind, mesh)
        state, step = method.init(PARAMS, 20), jax.jit(method.round)
        for _ in range(3):
            state, metrics = step(state, BATCHES, WHO, WEIGHTS)
        results.append((state, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert float(results[1][1]["clients"]) == 14


def test_clients_must_fill_the_devices() -> None:
    method = build("scaffold_m_vr", MESHES["eight"]())
    with pytest.raises(ValueError, match="12 participants cannot be divided among the 8 devices"):
        method.round(method.init(PARAMS, 20), BATCHES[:12], WHO[:12])
