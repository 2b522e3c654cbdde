"""Combiners of stacked gradients on eight simulated devices: parameters sharded, tasks whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optimkit import catalog
from optimkit.protocols import GradientCombiner, Method
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES

COMBINERS = [
    pytest.param(record, id=name)
    for name, record in catalog.records("combiner").items()
    if isinstance(record.build(), GradientCombiner)
]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("record", COMBINERS)
def test_sharded_equals_single_device(record: Method, kind: AxisType) -> None:
    rng = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (16, 24), "bias": (16,)}, "scale": ()}
    stacked = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=(2, *s)), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    params = jax.tree.map(lambda g: g[0], stacked)
    combiner = record.build()
    extras = record.extras(params, stacked) if record.extras else {}

    def two_updates(params, stacked):
        state = combiner.init(params, 2)
        _, state = combiner.update(stacked, state, params, **extras)
        return combiner.update(jax.tree.map(lambda g: -g, stacked), state, params, **extras)[0]

    alone = jax.jit(two_updates)(params, stacked)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):

        def place(tree, first):
            return jax.tree.map(
                lambda x: jax.device_put(
                    x, NamedSharding(mesh, P(*first, *(["data"] if x.ndim > len(first) else [])))
                ),
                tree,
            )

        spread = jax.jit(two_updates)(place(params, ()), place(stacked, (None,)))
    for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(y))))
