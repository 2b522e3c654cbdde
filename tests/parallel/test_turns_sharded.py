"""Turns of leaves inside ``shard_map``: a replicated leaf does not wait for a sharded one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import optimkit as ok
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES


def test_a_replicated_leaf_stays_replicated_behind_a_sharded_one() -> None:
    tx = ok.lion(0.1)
    mesh = jax.make_mesh((8,), ("i",))
    specs = {"a": P("i"), "b": P()}
    params = {"a": jnp.ones((8 * 128, 128)), "b": jnp.ones((128, 128))}

    def step(params):
        return tx.update(params, tx.init(params), params)[0]

    expected = jax.jit(step)(params)
    with jax.set_mesh(mesh):
        placed = {name: jax.reshard(x, specs[name]) for name, x in params.items()}
        mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=specs))
        got = mapped(placed)
    for name in params:
        np.testing.assert_allclose(got[name], expected[name])
