"""SPAM and its pieces on numbers that a reader can check by hand."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optimkit as ok
from optimkit.diagnostics import gradient_spike_score
from optimkit.optimizers import spam as spam_module
from tests.contract.checks import run_check


def run(tx, params, gradients):
    """Updates after each gradient, at the same parameters, and the last state."""
    step, state, out = jax.jit(tx.update), tx.init(params), []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        out.append(updates)
    return out, state


def noise(steps: int, shape: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    """Normal gradients, a tenth of them 100 times too large."""
    rng = np.random.default_rng(seed)
    sizes = np.where(rng.uniform(size=(steps, *shape)) < 0.1, 100.0, 1.0)
    return list(jnp.asarray(rng.normal(size=(steps, *shape)) * sizes, jnp.float32))


class UpdateMathTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_clip_spikes(self):
        tx = ok.clip_spikes(4.0, 0.5, start=2)
        update = self.variant(tx.update)
        state = self.variant(tx.init)(jnp.zeros(2))
        first, state = update(jnp.array([1.0, 9.0]), state)
        np.testing.assert_array_equal(first, [1.0, 9.0])  # too early to clip
        np.testing.assert_allclose(state.nu, [0.5, 40.5])
        # The limit comes from the moment before this step: sqrt(4 * 0.5).
        second, state = update(jnp.array([-100.0, 9.0]), state)
        np.testing.assert_allclose(second, [-np.sqrt(2.0), 9.0], rtol=1e-6)
        np.testing.assert_allclose(state.nu, [0.25 + 1.0, 20.25 + 40.5], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_decay_acts_on_the_new_parameters(self):
        tx = ok.decay_after_step(0.5, lambda count: 0.1 * (count + 1))
        params, update = {"a": jnp.array(1.0), "b": jnp.array(1.0)}, self.variant(tx.update)
        step = {"a": jnp.array(-0.2), "b": jnp.array(-0.2)}
        state = tx.init(params)
        updates, state = update(step, state, params)
        np.testing.assert_allclose(params["a"] + updates["a"], 0.8 * (1 - 0.05), rtol=1e-6)
        updates, _ = update(step, state, params)  # the schedule moves on
        np.testing.assert_allclose(params["b"] + updates["b"], 0.8 * (1 - 0.1), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_spam(self):
        tx = ok.spam(0.1, b1=0.5, b2=0.5, eps=0.0, threshold=4.0, clip_start=2, reset_interval=4)
        params, update = jnp.array([1.0]), self.variant(tx.update)
        state = tx.init(params)
        _, state = update(jnp.array([1.0]), state, params)  # m = v = 0.5
        updates, state = update(jnp.array([100.0]), state, params)
        limit = np.sqrt(4 * 0.5)
        m, v = 0.25 + limit / 2, 0.25 + limit**2 / 2
        expected = -0.1 * m / np.sqrt(v) * np.sqrt(0.75) / 0.75
        np.testing.assert_allclose(updates, [expected], rtol=1e-5)


# -- clipping ---------------------------------------------------------------------------------


def test_clipping_starts_anew_after_a_restart() -> None:
    tx = ok.clip_spikes(1.0, 0.5, start=2, interval=4)
    gradients = [jnp.array([10.0**k]) for k in range(8)]
    out, _ = run(tx, jnp.zeros(1), gradients)
    clipped = [float(u[0]) != float(g[0]) for u, g in zip(out, gradients, strict=True)]
    # Steps 4 and 8 restart; steps 1, 4, 5 and 8 are within two steps of a start.
    assert clipped == [False, True, True, False, False, True, True, False]


def test_an_entry_without_history_is_clipped_to_zero_until_the_next_reset() -> None:
    gradients = [jnp.array([1.0, 0.0])] * 2 + [jnp.ones(2)] * 6
    tx = ok.scale_by_spam(clip_start=2, reset_interval=5, warmup_steps=0)
    out, _ = run(tx, jnp.zeros(2), gradients)
    assert [bool(u[1] != 0) for u in out] == [False] * 4 + [True] * 4
    assert all(u[0] != 0 for u in out)


def test_clip_spikes_without_an_interval_lets_an_entry_without_history_pass() -> None:
    out, state = run(ok.clip_spikes(start=1), jnp.zeros(2), [jnp.array([0.0, 3.0])])
    np.testing.assert_array_equal(out[0], [0.0, 3.0])
    np.testing.assert_allclose(state.nu, [0.0, 0.009], rtol=1e-6)


def test_infinity_is_clipped_and_nan_is_forgotten_at_the_reset() -> None:
    tx = ok.scale_by_spam(clip_start=1, reset_interval=4)
    bad = jnp.array([jnp.inf, jnp.nan])
    out, _ = run(tx, jnp.zeros(2), [jnp.ones(2), bad, jnp.ones(2)])
    assert np.isfinite(out[1][0])
    assert np.isnan(out[2][1])
    out, _ = run(tx, jnp.zeros(2), [jnp.ones(2), bad, jnp.ones(2), jnp.ones(2)])
    chex.assert_tree_all_finite(out[3])


# -- decomposition ----------------------------------------------------------------------------


def test_without_clipping_it_is_adam_with_momentum_reset() -> None:
    gradients = noise(12, (3, 4))
    mine, _ = run(
        ok.scale_by_spam(threshold=0.0, reset_interval=5, warmup_steps=3),
        jnp.zeros((3, 4)),
        gradients,
    )
    core = ok.scale_by_adam(eps=1e-6, eps_form="before_bias_correction")
    chain, _ = run(
        ok.momentum_reset(core, 5, counts="never", warmup_steps=3), jnp.zeros((3, 4)), gradients
    )
    chex.assert_trees_all_close(mine, chain, rtol=1e-5)


def test_the_fused_clipping_is_the_stand_alone_piece_in_front_of_adam() -> None:
    gradients = noise(20, (5,))
    mine, _ = run(
        ok.scale_by_spam(threshold=20.0, clip_start=2, reset_interval=8, warmup_steps=0),
        jnp.zeros(5),
        gradients,
    )
    core = ok.scale_by_adam(eps=1e-6, eps_form="before_bias_correction")
    pieces = optax.chain(
        ok.clip_spikes(20.0, start=2, interval=8), ok.momentum_reset(core, 8, counts="never")
    )
    chain, _ = run(pieces, jnp.zeros(5), gradients)
    chex.assert_trees_all_close(mine, chain, rtol=1e-4)
    plain, _ = run(ok.momentum_reset(core, 8, counts="never"), jnp.zeros(5), gradients)
    assert max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(mine, plain, strict=True)) > 0.1


def test_decay_differs_from_optax_by_the_second_order_term() -> None:
    params, grads, rate, decay = jnp.array([2.0]), jnp.array([1.0]), 0.1, 0.5
    mine, _ = run(ok.spam(rate, weight_decay=decay), params, [grads])
    before = optax.chain(
        ok.scale_by_spam(), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)
    )
    theirs, _ = run(before, params, [grads])
    step = float(run(ok.spam(rate), params, [grads])[0][0][0])
    np.testing.assert_allclose(mine[0] - theirs[0], [-rate * decay * step], rtol=1e-4)


@pytest.mark.parametrize(
    "mask", [{"a": True, "b": {"c": False}}, {"a": True, "b": False}, lambda p: {"a": 1, "b": 0}]
)
def test_decay_mask(mask: object) -> None:
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(2)}}
    tx = ok.decay_after_step(0.5, 0.1, mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["a"], [-0.05, -0.05])
    np.testing.assert_array_equal(updates["b"]["c"], [0.0, 0.0])


def test_one_step_needs_no_memory_beside_parameters_and_state() -> None:
    params = {f"layer{i}": jnp.ones((64, 256)) for i in range(4)}
    tx = ok.spam(1e-3, weight_decay=0.1)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    size = sum(p.size for p in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * size


# -- sparse momentum --------------------------------------------------------------------------

MATRIX = {"dense": {"kernel": jnp.zeros((16, 12)), "bias": jnp.zeros(12)}}
ONES = jax.tree.map(jnp.ones_like, MATRIX)


def moved(updates) -> list[set[int]]:
    return [set(np.flatnonzero(u["dense"]["kernel"]).tolist()) for u in updates]


def test_sparse_momentum_stores_three_bytes_a_parameter() -> None:
    params = {"hidden": {"kernel": jnp.ones((128, 100))}}
    tx = ok.spam(0.1, density=0.25)
    _, state = tx.update(params, tx.init(params), params)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held / 12800 <= 3.1
    chex.assert_shape(optax.tree.get(state, "mu")["hidden"]["kernel"], (3200,))


def test_exactly_the_kept_entries_move_until_the_reset_draws_others() -> None:
    tx = ok.scale_by_spam(density=0.3, reset_interval=4, warmup_steps=0)
    updates, state = run(tx, MATRIX, [ONES] * 9)
    sets = moved(updates)
    assert [len(s) for s in sets] == [int(0.3 * 192)] * 9
    assert sets[0] == sets[1] == sets[2] != sets[3]
    assert sets[3] == sets[6] != sets[7]
    assert all(np.all(u["dense"]["bias"] != 0) for u in updates)
    kept = np.asarray(state.index["dense"]["kernel"])
    assert kept.dtype == np.int32
    assert np.all(np.diff(kept) > 0)
    # The moments are new at a reset: step 4 equals what one gradient alone gives.
    np.testing.assert_allclose(state.inner_state.inner_state.mu["dense"]["kernel"], 0.19, rtol=1e-5)


def test_leaves_and_seeds_draw_differently() -> None:
    params = {"a": jnp.zeros((16, 12)), "b": jnp.zeros((16, 12))}
    grads = jax.tree.map(jnp.ones_like, params)

    def index(seed):
        tx = ok.scale_by_spam(density=0.5, seed=seed)
        return run(tx, params, [grads])[1].index

    first, second, again = index(0), index(1), index(0)
    assert not np.array_equal(first["a"], first["b"])
    assert not np.array_equal(first["a"], second["a"])
    chex.assert_trees_all_equal(first, again)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (None, {"dense/kernel"}),
        (["*"], {"dense/kernel", "dense/bias", "embed/embedding", "head/kernel", "conv/kernel"}),
        (lambda path, leaf: leaf.ndim == 4, {"conv/kernel"}),
    ],
)
def test_sparse_leaves(selector: object, expected: set[str]) -> None:
    params = {
        "dense": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)},
        "embed": {"embedding": jnp.zeros((8, 4))},
        "head": {"kernel": jnp.zeros((4, 8))},
        "conv": {"kernel": jnp.zeros((2, 2, 1, 4))},
    }
    index = ok.scale_by_spam(density=0.5, sparse_leaves=selector).init(params).index
    assert {f"{a}/{b}" for a in index for b in index[a] if index[a][b].ndim} == expected


def test_masks_from_outside() -> None:
    def masks(params, refresh, key):
        row = jnp.arange(16) == refresh
        return {"dense": {"kernel": jnp.broadcast_to(row[:, None], (16, 12)), "bias": None}}

    tx = ok.scale_by_spam(density=1 / 16, reset_interval=2, warmup_steps=0, sparse_mask_fn=masks)
    sets = moved(run(tx, MATRIX, [ONES] * 4)[0])
    assert [min(s) // 12 for s in sets] == [0, 1, 1, 2]
    assert [max(s) // 12 for s in sets] == [0, 1, 1, 2]

    short = ok.scale_by_spam(density=0.5, sparse_mask_fn=masks)  # 12 True entries for 96 places
    assert moved(run(short, MATRIX, [ONES])[0]) == [set(range(12))]

    wrong = ok.scale_by_spam(
        density=0.5, sparse_mask_fn=lambda *_: {"dense": {"kernel": jnp.ones(3), "bias": None}}
    )
    with pytest.raises(ValueError, match=r"dense/kernel.*\(3,\)"):
        wrong.update(ONES, wrong.init(MATRIX), MATRIX)


def test_sparse_momentum_on_a_leaf_sharded_over_an_explicit_mesh() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    params = {"kernel": jax.device_put(jnp.arange(12.0).reshape(4, 3), sharding)}
    tx = ok.spam(0.1, density=0.5)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.typeof(updates["kernel"]).sharding.spec == PartitionSpec("data", None)
    alone = {"kernel": jnp.arange(12.0).reshape(4, 3)}
    expected, _ = tx.update(alone, tx.init(alone), alone)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-6)


@pytest.mark.parametrize("rule", ["state", "finite", "restart"])
def test_the_contract_holds_with_sparse_momentum(rule: str) -> None:
    record = next(r for r in spam_module.RECORDS if r.name == "spam")
    example = {**record.example, "density": 0.25, "sparse_leaves": ["*kernel"]}
    run_check(dataclasses.replace(record, example=example, state_bytes=3.0), rule, "float32")


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan")])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        ok.spam(0.1, density=density)


# -- spike scores -----------------------------------------------------------------------------


def test_gradient_spike_score() -> None:
    history = {"w": jnp.array([[1.0, 0.0], [-1.0, 0.0], [4.0, 0.0]], jnp.float16)}
    score = gradient_spike_score(history)["w"]
    np.testing.assert_allclose(score, [[0.5, 0.0], [0.5, 0.0], [2.0, 0.0]])
    assert score.dtype == jnp.float32
    by_column = gradient_spike_score(history["w"].T, axis=1)
    np.testing.assert_array_equal(by_column, score.T)
    with pytest.raises(TypeError, match="int"):
        gradient_spike_score(jnp.ones((3, 2), int))


def test_track_spike_score_counts_and_passes_updates_through() -> None:
    tx = ok.track_spike_score(1.5)
    gradients = [{"a": jnp.array([1.0, 1.0])}, {"a": jnp.array([1.0, -9.0])}]
    out, state = run(tx, gradients[0], gradients)
    chex.assert_trees_all_equal(out, gradients)
    assert float(state.metrics["spike_count"]) == 1.0  # 9 over the mean of 1 and 9 is 1.8
    np.testing.assert_array_equal(state.magnitude_sum["a"], [2.0, 10.0])


if __name__ == "__main__":
    absltest.main()
