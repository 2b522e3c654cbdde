"""A sweep spread over eight devices gives what one device gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import optimkit as ok
from optimkit.sweep import sweep
from optimkit.sweep.training import _Problem, _programs
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=(16, 12)).astype(np.float32) for _ in range(5)]
PARAMS: Any = {"w": jnp.asarray(RNG.normal(size=(12, 4)), jnp.float32), "b": jnp.ones(())}
MESHES = {
    "auto": lambda: jax.make_mesh((8,), ("x",), (AxisType.Auto,)),
    "explicit": lambda: jax.make_mesh((8,), ("x",), (AxisType.Explicit,)),
    "two axes": lambda: jax.make_mesh((2, 4), ("x", "y"), (AxisType.Auto,) * 2),
}


def loss_fn(params: Any, batch: Any) -> Any:
    return jnp.mean(jnp.square(batch @ params["w"] + params["b"][None, None] - 1))


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("count", [8, 11])  # 11 settings do not fill the last round
def test_settings_spread_over_devices(kind, count) -> None:
    rates = np.geomspace(1e-3, 1e-1, count).tolist()
    rates[3] = 1e30
    mesh = MESHES[kind]()
    options: Any = {"learning_rate": rates, "keep_params": True}
    options["score_fn"] = lambda params: jnp.sum(jnp.square(params["w"]))
    expected = sweep(optax.sgd, loss_fn, PARAMS, BATCHES, **options)
    found = sweep(optax.sgd, loss_fn, PARAMS, BATCHES, mesh=mesh, **options)
    assert found.settings == expected.settings
    assert found.diverged.tolist() == [i == 3 for i in range(count)]
    assert found.best == expected.best
    np.testing.assert_allclose(found.losses, expected.losses, rtol=2e-6)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=2e-6)
    for name, leaf in expected.params.items():
        assert found.params[name].shape == (count, *PARAMS[name].shape)
        np.testing.assert_allclose(found.params[name], leaf, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("factory", [ok.stable_spam, ok.muon, ok.schedule_free_adamw])
def test_methods_with_loops_and_branches_spread_too(factory) -> None:
    rates = np.geomspace(1e-3, 1e-2, 8).tolist()
    mesh = MESHES["auto"]()
    one, eight = (
        sweep(factory, loss_fn, PARAMS, BATCHES[:3], mesh=m, learning_rate=rates)
        for m in (None, mesh)
    )
    np.testing.assert_allclose(one.losses, eight.losses, rtol=1e-5)


def test_no_setting_travels_between_devices() -> None:
    """Each device holds one, and no collective stands in the compiled step."""
    programs = _programs(_Problem(ok.adamp, loss_fn, None, None, (), MESHES["auto"]()))
    values = programs.spread({"learning_rate": np.full(8, 0.1, np.float32)})
    params, state = programs.start(values, programs.share(PARAMS))
    assert {shard.data.shape for shard in params["w"].addressable_shards} == {(1, 12, 4)}
    batch = programs.share(BATCHES[0])
    text = programs.step.lower(values, params, state, batch).compile().as_text()  # pyright: ignore
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
