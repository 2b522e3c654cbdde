"""Checkpoints: bit-exact round trips, one clear error, damage, kills, pruning."""

from __future__ import annotations

import builtins
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import optimkit as ok
from optimkit import checkpoint
from optimkit.checkpoint import CheckpointMismatch, Checkpoints, DamagedCheckpoint

PARAMS = {
    "dense": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)},
    "half": jnp.ones(2, jnp.float16),
}

OPTIMIZERS = {
    "lion": lambda: ok.lion(1e-2, weight_decay=0.1),
    "adamp": lambda: ok.adamp(1e-2),
    "adamw chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "injected": lambda: ok.inject_hyperparams(ok.lion)(optax.linear_schedule(1e-2, 0.0, 10)),
    "masked": lambda: optax.masked(
        ok.lion(1e-2), {"dense": {"kernel": True, "bias": False}, "half": False}
    ),
    "multi-steps": lambda: optax.MultiSteps(ok.adamp(1e-2), 2),
}


def gradients(step: int) -> Any:
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), PARAMS)


def train(tx: Any, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
    @jax.jit
    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in steps:
        params, state = update(params, state, gradients(step))
    return params, state


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


# -- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_training_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    tx = OPTIMIZERS[name]()
    params, state = train(tx, PARAMS, tx.init(PARAMS), range(3))
    checkpoint.save(tmp_path / "3", {"params": params, "opt_state": state})
    fresh = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    found = checkpoint.restore(tmp_path / "3", fresh).trees
    assert_same_bits(found, {"params": params, "opt_state": state})
    straight = train(tx, params, state, range(3, 6))
    resumed = train(tx, found["params"], found["opt_state"], range(3, 6))
    assert_same_bits(resumed, straight)


class Everything(NamedTuple):
    count: Any
    mu: Any


def everything() -> Any:
    odd = jnp.array([0.0, -0.0, jnp.nan, -jnp.inf, jnp.finfo(jnp.float32).smallest_subnormal])
    dtypes = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.int8, jnp.uint32, jnp.complex64, bool)
    return Everything(
        count=jnp.int32(7),
        mu={
            "none": None,
            "empty": optax.EmptyState(),
            "masked": optax.MaskedNode(),
            "odd": odd,
            "arrays": [jnp.arange(4).astype(dtype) for dtype in dtypes],
            "no entries": (jnp.zeros((0, 3), jnp.bfloat16), np.zeros((2, 0))),
            "numpy": (np.arange(3.0), np.float64(0.1), np.int64(2**60)),
            "python": (2**60, 0.1, True, 1j),
            "with.dot and space/slash": jnp.ones(1),
            "key": jax.random.key(3),
            "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        },
    )


def without_keys(tree: Any) -> Any:
    def data(leaf: Any) -> Any:
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(data, tree)


def test_every_kind_of_leaf_comes_back_as_it_was(tmp_path: Path) -> None:
    tree = everything()
    metadata = {"step": 7, "rate": 0.1, "seed": None, "names": ["a", {"b": float("inf")}]}
    checkpoint.save(tmp_path / "all", {"state": tree, "nothing": {}}, metadata=metadata)
    zeros = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else type(leaf)(0), tree)
    found = checkpoint.restore(tmp_path / "all", {"state": zeros, "nothing": {}})
    assert_same_bits(without_keys(found.trees["state"]), without_keys(tree))
    assert found.trees["nothing"] == {}
    assert found.metadata == metadata
    key = found.trees["state"].mu["keys"]
    assert jax.random.key_impl(key) == jax.random.key_impl(tree.mu["keys"])


@pytest.mark.usefixtures("x64")
def test_float64(tmp_path: Path) -> None:
    tree = {"w": jnp.array([0.1, 1e300]), "n": jnp.int64(2**40)}
    checkpoint.save(tmp_path / "c", {"params": tree})
    target = jax.eval_shape(lambda: tree)
    assert_same_bits(checkpoint.restore(tmp_path / "c", {"params": target}).trees["params"], tree)
    with jax.enable_x64(False), pytest.raises(CheckpointMismatch, match="jax_enable_x64"):
        checkpoint.restore(tmp_path / "c", {"params": target})


def test_only_the_named_trees_are_read(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"params": PARAMS, "opt_state": ok.lion(0.1).init(PARAMS)})
    target = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    assert_same_bits(
        checkpoint.restore(tmp_path / "c", {"params": target}).trees, {"params": PARAMS}
    )


def test_nnx_modules(tmp_path: Path) -> None:
    module = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(1)), nnx.Dropout(0.5, rngs=nnx.Rngs(2)))
    state = nnx.state(module)
    checkpoint.save(tmp_path / "c", {"model": state})
    found = checkpoint.restore(tmp_path / "c", {"model": state}).trees["model"]
    assert_same_bits(without_keys(nnx.to_pure_dict(found)), without_keys(nnx.to_pure_dict(state)))


def test_shardings_come_from_the_target(tmp_path: Path) -> None:
    program = f"""
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from optimkit import checkpoint
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = NamedSharding(mesh, P("data"))
w = jax.device_put(jnp.arange(16.0).reshape(8, 2), rows)
if sys.argv[1] == "save":
    checkpoint.save({str(tmp_path / "c")!r}, {{"params": {{"w": w, "count": jnp.int32(3)}}}})
else:
    columns = jax.sharding.NamedSharding(
        jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                      devices=jax.devices()[:2]), P(None, "data"))
    target = {{"w": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=columns),
              "count": jnp.int32(0)}}
    found = checkpoint.restore({str(tmp_path / "c")!r}, {{"params": target}}).trees["params"]
    assert found["w"].sharding == columns
    np.testing.assert_array_equal(found["w"], w)
    jax.jit(lambda w, count: w * count)(*found.values())  # the count follows the others
"""
    devices = "--xla_force_host_platform_device_count=4"
    for word in ("save", "restore"):
        subprocess.run(
            [sys.executable, "-W", "error", "-c", program, word],
            check=True,
            env={**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"},
        )
    target = {"w": jnp.zeros((8, 2)), "count": jnp.int32(0)}  # back on the one device of this test
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = NamedSharding(mesh, PartitionSpec("data"))
    for w in (target["w"], jax.device_put(target["w"], placed)):
        found = checkpoint.restore(tmp_path / "c", {"params": {**target, "w": w}}).trees["params"]
        np.testing.assert_array_equal(found["w"], np.arange(16.0).reshape(8, 2))
        assert found["w"].sharding == w.sharding
        assert found["w"].committed == w.committed


def test_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    checkpoint.save(tmp_path / "c", {"params": PARAMS})
    checkpoint.restore(tmp_path / "c", {"params": PARAMS})


# -- what does not fit ------------------------------------------------------------------------


def test_another_chain_is_one_clear_error(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"params": PARAMS, "opt_state": ok.lion(0.1).init(PARAMS)})
    target = {"params": PARAMS, "opt_state": optax.sgd(0.1, momentum=0.9).init(PARAMS)}
    with pytest.raises(CheckpointMismatch) as raised:
        checkpoint.restore(tmp_path / "c", target)
    message = str(raised.value)
    assert "nothing was restored" in message
    leaves = "0/{0}/dense/bias, 0/{0}/dense/kernel, 0/{0}/half"
    assert f"opt_state: missing from the checkpoint: {leaves.format('trace')};" in message
    assert f"opt_state: unexpected in the checkpoint: {leaves.format('mu')}" in message


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"w": jnp.zeros(4)}, r"params: w is float32 \(3,\) there and float32 \(4,\) here"),
        (
            {"w": jnp.zeros(3, jnp.bfloat16)},
            r"w is float32 \(3,\) there and bfloat16 \(3,\) here",
        ),
        ({"w": 1.0}, r"w is float32 \(3,\) there and float64 \(\) here"),
        ({"w": jnp.zeros(3), "b": jnp.zeros(1)}, "missing from the checkpoint: b$"),
        ({}, "unexpected in the checkpoint: w$"),
        ({str(i): 0 for i in range(9)}, "missing from the checkpoint: 0, 1, 2, 3, 4, 5 and 3 more"),
    ],
)
def test_what_differs_is_named(target: Any, message: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"params": {"w": jnp.zeros(3)}})
    with pytest.raises(CheckpointMismatch, match=message):
        checkpoint.restore(tmp_path / "c", {"params": target})


def test_a_state_of_another_method_with_the_same_leaves_is_refused(tmp_path: Path) -> None:
    adam, belief = (make(0.1).init({"w": jnp.zeros(3)}) for make in (optax.adam, optax.adabelief))
    chex.assert_trees_all_equal_shapes(jax.tree.leaves(adam), jax.tree.leaves(belief))
    checkpoint.save(tmp_path / "c", {"opt_state": adam})
    with pytest.raises(CheckpointMismatch, match=r"ScaleByAdamState there and .*Belief.* here"):
        checkpoint.restore(tmp_path / "c", {"opt_state": belief})


def test_a_tree_that_was_not_saved_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"params": PARAMS})
    with pytest.raises(CheckpointMismatch, match=r"ema: not in the checkpoint.*\['params'\]"):
        checkpoint.restore(tmp_path / "c", {"params": PARAMS, "ema": PARAMS})


def test_a_newer_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.schema, "SCHEMA_VERSION", 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params=PARAMS)
    with pytest.raises(checkpoint.CheckpointError, match=r"schema version 2.*upgrade"):
        checkpoints.restore_latest(params=PARAMS)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"leaf 'name' is a str.*metadata"):
        checkpoint.save(tmp_path / "c", {"params": {"name": "x"}})
    with pytest.raises(TypeError, match=r"metadata must be plain JSON.*set"):
        checkpoint.save(tmp_path / "c", {"params": PARAMS}, metadata={"a": {1}})
    with pytest.raises(ValueError, match="two leaves are called 'a/b'"):
        checkpoint.save(tmp_path / "c", {"params": {"a": {"b": 1.0}, "a/b": 2.0}})
    with pytest.raises(ValueError, match="plain name other than 'metrics', got 'a b'"):
        checkpoint.save(tmp_path / "c", {"a b": PARAMS})
    with pytest.raises(ValueError, match="keep must be an integer >= 1"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoint.restore(tmp_path / "c", {})
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path / "c", {"params": PARAMS})
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path / "c", {"params": PARAMS})


# -- sequences --------------------------------------------------------------------------------


def state_at(step: int) -> Any:
    return {"w": jnp.full((64, 64), float(step)), "count": jnp.int32(step)}


def test_old_ones_are_removed_and_a_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.latest() is None
    assert checkpoints.restore_latest(params=state_at(0)) is None
    for step in (0, 5, 10):
        path = checkpoints.save(step, params=state_at(step), metadata={"step": step})
        assert path == tmp_path / "run" / str(step)
    assert checkpoints.steps() == [5, 10]
    checkpoints.save(10, params=state_at(11))
    found = checkpoints.restore_latest(params=state_at(0))
    assert found is not None
    assert (found.step, found.metadata, dict(found.skipped)) == (10, {}, {})
    assert_same_bits(found.trees["params"], state_at(11))
    # Steps of a run that was given up do not push out those of the one that goes on.
    checkpoints.save(7, params=state_at(7))
    assert checkpoints.steps() == [5, 7, 10]
    assert_same_bits(checkpoints.restore(5, params=state_at(0)).trees["params"], state_at(5))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["10", "5", "7"]


def data_files(folder: Path) -> list[Path]:
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path) -> None:
    largest = data_files(folder)[-1]
    largest.write_bytes(largest.read_bytes()[:20])


def flip_one_bit(folder: Path) -> None:
    largest = data_files(folder)[-1]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def delete_data(folder: Path) -> None:
    data_files(folder)[-1].unlink()


def delete_schema(folder: Path) -> None:
    (folder / "_CHECKPOINT_METADATA").unlink()


def change_schema(folder: Path) -> None:
    path = folder / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"count"', '"comet"'))


def empty(folder: Path) -> None:
    for path in data_files(folder):
        path.unlink()


@pytest.mark.parametrize(
    "damage", [truncate, flip_one_bit, delete_data, delete_schema, change_schema, empty]
)
def test_a_damaged_newest_is_skipped_with_a_message(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)  # noise does not compress: a flipped bit stays readable
    checkpoints = Checkpoints(tmp_path, keep=3)
    trees = {step: {"w": rng.normal(size=(64, 64)), "count": jnp.int32(step)} for step in (1, 2)}
    for step, tree in trees.items():
        checkpoints.save(step, params=tree)
    damage(tmp_path / "2")
    with caplog.at_level(logging.WARNING, logger="optimkit.checkpoint"):
        found = checkpoints.restore_latest(params=trees[1])
    assert found is not None
    assert found.step == 1
    assert_same_bits(found.trees["params"], trees[1])
    assert list(found.skipped) == [2]
    assert "skipped the damaged checkpoint of step 2" in caplog.text
    checkpoints.save(2, params=trees[2])  # training goes on and gets there again
    again = checkpoints.restore_latest(params=trees[1])
    assert again is not None
    assert (again.step, dict(again.skipped)) == (2, {})


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, params=state_at(step))
        delete_data(tmp_path / str(step))
    with pytest.raises(DamagedCheckpoint, match=r"all 2 checkpoints .* step 2: .* step 1: "):
        checkpoints.restore_latest(params=state_at(0))


def test_one_that_does_not_fit_is_no_reason_to_go_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params={"w": jnp.zeros(3)})
    checkpoints.save(2, params={"w": jnp.zeros(4)})
    with pytest.raises(CheckpointMismatch, match="/2 does not fit"):
        checkpoints.restore_latest(params={"w": jnp.zeros(3)})


def test_what_a_killed_process_left_is_ignored_and_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, params=state_at(3))
    (tmp_path / "3").rename(tmp_path / "3.replaced")  # killed while it saved step 3 again
    for leftover in ("3.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-17", "2.deleted"):
        (tmp_path / leftover / "params").mkdir(parents=True)
    found = checkpoints.restore_latest(params=state_at(0))
    assert found is not None
    assert found.step == 3
    checkpoints.save(3, params=state_at(4))
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    assert_same_bits(checkpoints.restore(3, params=state_at(0)).trees["params"], state_at(4))


SAVER = """
import sys
import jax.numpy as jnp
from optimkit.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
step = (checkpoints.latest() or 0) + 1
while True:
    state = {"w": jnp.full((256, 256), float(step)), "count": jnp.int32(step)}
    checkpoints.save(step, params=state, metadata={"step": step})
    print(step, flush=True)
    step += 1
"""


def kill_while_saving(folder: Path, kills: int) -> None:
    rng = random.Random(0)
    checkpoints = Checkpoints(folder, keep=2)
    target = {"w": jnp.zeros((256, 256)), "count": jnp.int32(0)}
    confirmed = 0
    for _ in range(kills):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert saver.stdout is not None
        confirmed = int(saver.stdout.readline())  # the first save of this process is complete
        time.sleep(rng.uniform(0, 0.15))
        saver.send_signal(signal.SIGKILL)
        rest, _ = saver.communicate()
        confirmed = max([confirmed, *map(int, rest.split())])
        found = checkpoints.restore_latest(params=target)
        assert found is not None
        assert found.step in (confirmed, confirmed + 1)  # it may have died before it said so
        assert not found.skipped
        assert found.metadata == {"step": found.step}
        assert int(found.trees["params"]["count"]) == found.step
        assert bool(jnp.all(found.trees["params"]["w"] == found.step))
    checkpoints.save(confirmed + 2, params=target)
    assert all(path.name.isdigit() for path in folder.iterdir())


def test_killed_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 10)


@pytest.mark.slow
def test_killed_while_saving_fifty_times(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 50)


# -- Orbax is optional ------------------------------------------------------------------------


def test_orbax_is_imported_on_first_use() -> None:
    program = "import sys, optimkit, optimkit.checkpoint; assert 'orbax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_orbax_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path / "c", {"params": PARAMS})
    real = builtins.__import__

    def without_orbax(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "orbax":
            raise ModuleNotFoundError("No module named 'orbax'", name="orbax")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_orbax)
    with pytest.raises(ImportError, match=r'pip install "optimkit\[checkpoint\]"'):
        checkpoint.save(tmp_path / "d", {"params": PARAMS})
    with pytest.raises(ImportError, match=r'pip install "optimkit\[checkpoint\]"'):
        checkpoint.restore(tmp_path / "c", {"params": PARAMS})
