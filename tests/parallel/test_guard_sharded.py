"""The guard decides alike on every device, whatever part each one holds; so does telemetry."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimkit as ok
from optimkit.diagnostics import metrics
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES

PARAMS: Any = {"w": jnp.arange(16.0), "b": jnp.ones(())}


def gradients() -> tuple[Any, Any, Any]:
    good = {"w": jnp.ones(16), "b": jnp.ones(())}
    one_nan = {**good, "w": good["w"].at[5].set(jnp.nan)}
    one_spike = {**good, "w": good["w"].at[5].set(1e6)}
    return good, one_nan, one_spike


def trajectory(tx: Any, update: Any, state: Any, params: Any) -> tuple[list[Any], Any]:
    good, one_nan, one_spike = gradients()
    seen = []
    for grads in (good, one_nan, good, one_spike, good):
        updates, state = update(grads, state, params)
        seen.append(updates)
    return seen, state


def assert_same_run(got: tuple[list[Any], Any], expected: tuple[list[Any], Any]) -> None:
    for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)
    metrics = got[1].metrics
    assert float(metrics["skipped_steps"]) == 2
    assert float(metrics["skipped_spikes"]) == 1


def make(**options: Any) -> Any:
    return ok.skip_bad_steps(
        optax.adam(0.1), spike_threshold=10.0, spike_warmup=1, reset_momentum_after=1, **options
    )


@pytest.mark.parametrize("recompute", [True, False])
def test_shards_inside_shard_map(recompute: bool) -> None:
    tx = make(axis_names="x", recompute=recompute)
    expected = trajectory(make(), jax.jit(make().update), make().init(PARAMS), PARAMS)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = {"w": P("x"), "b": P()}
    state = tx.init(PARAMS)
    like = {np.shape(PARAMS["w"]): P("x")}
    state_specs = jax.tree.map(lambda leaf: like.get(np.shape(leaf), P()), state)
    update = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(specs, state_specs, specs),
            out_specs=(specs, state_specs),
        )
    )
    assert_same_run(trajectory(tx, update, state, PARAMS), expected)


def test_sharded_arrays_under_jit() -> None:
    tx = make()
    expected = trajectory(tx, jax.jit(tx.update), tx.init(PARAMS), PARAMS)
    mesh = jax.make_mesh((8,), ("x",))
    with jax.set_mesh(mesh):
        params = {
            "w": jax.device_put(PARAMS["w"], NamedSharding(mesh, P("x"))),
            "b": jax.device_put(PARAMS["b"], NamedSharding(mesh, P())),
        }

        def update(grads: Any, state: Any, params: Any) -> Any:
            placed = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
            return jax.jit(tx.update)(placed, state, params)

        got = trajectory(tx, update, tx.init(params), params)
        assert got[0][-1]["w"].sharding.is_equivalent_to(params["w"].sharding, 1)
        assert_same_run(got, expected)
        # Telemetry of sharded arrays is that of whole ones.
        for both in (metrics, jax.jit(metrics)):
            sharded = both(got[1], params, got[0][-1])
            whole = metrics(expected[1], PARAMS, expected[0][-1])
            assert sharded.keys() == whole.keys()
            for name, value in whole.items():
                np.testing.assert_allclose(sharded[name], value, rtol=1e-5, err_msg=name)
