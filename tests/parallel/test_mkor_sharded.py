"""MKOR on eight simulated devices, over steps that refresh the factors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimkit as ok
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES

RNG = np.random.default_rng(0)
SHAPES = {
    "conv": {"kernel": (2, 2, 4, 8), "bias": (8,)},
    "dense": {"kernel": (24, 16), "bias": (16,)},
}
PLACES = {
    "rows": {"conv": {"kernel": P(None, None, "x"), "bias": P()},
             "dense": {"kernel": P("x"), "bias": P("y")}},
    "columns": {"conv": {"kernel": P(None, None, None, ("x", "y")), "bias": P("x")},
                "dense": {"kernel": P("y", "x"), "bias": P("x")}},
}  # fmt: skip


def draw(tree: Any) -> Any:
    return jax.tree.map(
        lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def three_steps(tx: Any, params: Any, grads: Any, stats: Any) -> Any:
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, layer_stats=stats))
    state = tx.init(params)
    for _ in range(3):
        updates, state = step(grads, state, params)
    return updates, state


@pytest.mark.parametrize("rule", ["code", "exact"])
def test_refreshed_factors_are_those_of_one_device(rule: Any) -> None:
    params, grads = draw(SHAPES), draw(SHAPES)
    stats = draw({"conv": {"a": (16,), "g": (8,)}, "dense": {"a": (24,), "g": (16,)}})
    tx = ok.mkor(0.1, inv_freq=1, update_rule=rule)
    expected, kept = three_steps(tx, params, grads, stats)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            for where, specs in PLACES.items():
                places = jax.tree.map(
                    lambda spec, mesh=mesh: NamedSharding(mesh, spec),
                    specs,
                    is_leaf=lambda node: isinstance(node, P),
                )
                placed = [jax.device_put(tree, places) for tree in (params, grads)]
                got, state = three_steps(tx, *placed, stats)
                jax.tree.map(
                    lambda a, b, what=(kind, where): np.testing.assert_allclose(
                        a, b, rtol=1e-4, atol=1e-5, err_msg=str(what)
                    ),
                    (got, state),
                    (expected, kept),
                )
                if kind == AxisType.Explicit:
                    factor = state[0].inverse_inputs["dense"]["kernel"]
                    assert factor.addressable_shards[0].data.shape == (3, 24)  # of 24 rows
