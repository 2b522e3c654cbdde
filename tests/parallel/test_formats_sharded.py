"""Every format of quantised moments on a mesh; the contract's example has eight bits only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimkit as ok
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES


def last_update(how, place) -> dict[str, jax.Array]:
    """The third update of two matrices whose rows are no whole number of blocks."""
    rng = np.random.default_rng(0)
    shapes = {"wide": (8, 44), "tall": (16, 12)}
    grads = [
        {n: place(jnp.asarray(rng.normal(size=s), jnp.float32)) for n, s in shapes.items()}
        for _ in range(3)
    ]
    tx = ok.quantize_state(ok.scale_by_adam(), block_size=8, min_size=1, **how)
    step, state = jax.jit(tx.update), tx.init(grads[0])
    for g in grads:
        updates, state = step(g, state, grads[0])
    assert step._cache_size() == 1
    return updates


@pytest.mark.parametrize(
    ("how", "spec"),
    [
        ({"format": "dynamic4"}, P("x", "y")),
        ({"format": "dynamic4", "block_axis": "flat"}, P(None, "x")),
        ({"format": "companded8"}, P("x", "y")),
        ({"format": "bf16_sr"}, P("x", "y")),
    ],
)
def test_moments_in_few_bits_on_a_mesh(how, spec) -> None:
    expected = last_update(how, lambda x: x)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        got = last_update(how, lambda x: jax.device_put(x, NamedSharding(mesh, spec)))
    for name, update in expected.items():
        assert got[name].sharding.spec == spec
        np.testing.assert_allclose(got[name], update, atol=2e-2 * float(np.abs(update).max()))
