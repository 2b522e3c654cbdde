"""The guard: what it refuses, what it keeps, when it gives way, and what it costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.benchmark import measure
from optimkit.multitask import sum_combiner, with_combiner
from optimkit.wrappers.skip_bad_steps import all_finite

PARAMS: Any = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
GOOD: Any = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}  # norm 5
NAN: Any = {"w": jnp.array([3.0, jnp.nan]), "b": jnp.array(4.0)}
INF: Any = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(-jnp.inf)}


def same(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def metric(state: Any, name: str) -> float:
    return float(state.metrics[name])


def part_with_z(state: Any) -> Any:
    def found(node: Any) -> bool:
        return hasattr(node, "z")

    return next(node for node in jax.tree.leaves(state, is_leaf=found) if found(node))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("jit", [True, False])
def test_a_bad_step_changes_nothing(recompute: bool, jit: bool) -> None:
    inner = optax.adam(0.1)
    tx = ok.skip_bad_steps(inner, recompute=recompute)
    update = jax.jit(tx.update) if jit else tx.update
    state, plain = tx.init(PARAMS), inner.init(PARAMS)
    for grads in (GOOD, NAN, INF, GOOD):
        before = state.inner_state
        updates, state = update(grads, state, PARAMS)
        if grads is GOOD:
            expected, plain = inner.update(grads, plain, PARAMS)
            np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
            assert metric(state, "consecutive_skips") == 0
        else:
            assert not any(np.any(u) for u in jax.tree.leaves(updates))
            assert same(before, state.inner_state)
    assert int(state.count) == 2
    assert metric(state, "skipped_steps") == 2
    assert metric(state, "skip_limit_reached") == 0


def test_nan_never_passes_and_the_flag_stays_up() -> None:
    ours, theirs = ok.skip_bad_steps(optax.sgd(1.0), 3), optax.apply_if_finite(optax.sgd(1.0), 3)
    our_state, their_state = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(6):
        updates, our_state = ours.update(NAN, our_state, PARAMS)
        leaked, their_state = theirs.update(NAN, their_state, PARAMS)
        assert bool(all_finite(updates))
        assert bool(all_finite(leaked)) == (step < 3)
        assert metric(our_state, "skip_limit_reached") == (step >= 2)
    _, our_state = ours.update(GOOD, our_state, PARAMS)
    assert metric(our_state, "consecutive_skips") == 0
    assert metric(our_state, "skip_limit_reached") == 1


def test_what_the_inner_one_makes_is_judged_too() -> None:
    blows_up = optax.stateless(lambda g, p: jax.tree.map(lambda x: 1 / (x - 3), g))
    tx = ok.skip_bad_steps(optax.chain(optax.trace(0.9), blows_up))
    state = tx.init(PARAMS)
    updates, state = jax.jit(tx.update)(GOOD, state, PARAMS)  # 1/0 in w
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert metric(state, "skipped_steps") == 1
    assert not np.any(state.inner_state[0].trace["w"])


def test_the_inner_one_never_sees_a_bad_gradient() -> None:
    def halve_until_small(g: Any, p: Any) -> Any:
        # Does not end on NaN or infinity.
        return jax.tree.map(
            lambda x: jax.lax.while_loop(lambda y: ~(jnp.max(jnp.abs(y)) <= 1), lambda y: y / 2, x),
            g,
        )

    tx = ok.skip_bad_steps(optax.stateless(halve_until_small))
    updates, _ = jax.jit(tx.update)(NAN, tx.init(PARAMS), PARAMS)
    assert not np.any(updates["w"])


def test_a_spike_is_refused_until_the_limit_and_then_taken_for_the_new_level() -> None:
    tx = ok.skip_bad_steps(optax.sgd(1.0), 2, spike_threshold=4.0, spike_decay=0.5, spike_warmup=1)
    update = jax.jit(tx.update)
    huge = jax.tree.map(lambda g: 100 * g, GOOD)
    state = tx.init(PARAMS)
    moved, means = [], []
    for grads in (GOOD, jax.tree.map(lambda g: 3 * g, GOOD), huge, GOOD, huge, huge, huge, GOOD):
        updates, state = update(grads, state, PARAMS)
        moved.append(bool(np.any(updates["w"])))
        means.append(float(state.norm_mean))
    assert moved == [True, True, False, True, False, False, True, True]
    # 5; (5 + 15)/2; kept; (10 + 5)/2; kept twice; starts again at 500; (500 + 5)/2
    np.testing.assert_allclose(means, [5, 10, 10, 7.5, 7.5, 7.5, 500, 252.5])
    assert metric(state, "skipped_spikes") == metric(state, "skipped_steps") == 3
    assert metric(state, "gradient_norm") == 5
    _, state = update(NAN, state, PARAMS)
    assert metric(state, "skipped_spikes") == 3
    assert metric(state, "gradient_norm") == 5


def test_a_norm_beyond_the_largest_number_is_a_spike_and_no_nan() -> None:
    tx = ok.skip_bad_steps(optax.sgd(1.0), spike_threshold=4.0, spike_warmup=1)
    state = tx.init(PARAMS)
    for grads in (GOOD, jax.tree.map(lambda g: 1e38 * (g > 0), GOOD)):
        updates, state = tx.update(grads, state, PARAMS)
    assert not np.any(updates["w"])
    assert metric(state, "skipped_spikes") == 1
    assert np.isfinite(metric(state, "gradient_norm"))


def test_the_first_gradient_after_zeros_is_no_spike() -> None:
    tx = ok.skip_bad_steps(optax.sgd(1.0), spike_threshold=4.0, spike_warmup=1)
    state = tx.init(PARAMS)
    for grads in (jax.tree.map(jnp.zeros_like, GOOD), GOOD):
        updates, state = tx.update(grads, state, PARAMS)
    assert float(updates["b"]) == -4


def test_the_momentum_starts_anew_after_a_run_of_bad_steps() -> None:
    inner = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0 + count))
    tx = ok.skip_bad_steps(inner, reset_momentum_after=2)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for grads in (GOOD, GOOD, NAN, NAN, NAN):
        _, state = update(grads, state, PARAMS)
        assert metric(state, "momentum_resets") == 0
    updates, state = update(GOOD, state, PARAMS)
    adam, schedule = state.inner_state
    assert int(adam.count) == 1
    assert int(schedule.count) == 3  # schedules go on
    np.testing.assert_allclose(adam.mu["w"], 0.1 * GOOD["w"], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], 3.0, rtol=1e-5)  # sign(g) times the third factor
    assert metric(state, "momentum_resets") == 1
    _, state = update(NAN, state, PARAMS)
    _, state = update(GOOD, state, PARAMS)  # one bad step is no run of two
    assert int(state.inner_state[0].count) == 2


def test_a_reset_leaves_copies_of_the_parameters_and_their_count() -> None:
    tx = ok.skip_bad_steps(ok.schedule_free_sgd(0.1), reset_momentum_after=1)
    state = tx.init(PARAMS)
    for grads in (GOOD, NAN):
        _, state = tx.update(grads, state, PARAMS)
    base = part_with_z(state)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, GOOD), state, PARAMS)
    after = part_with_z(state)
    assert metric(state, "momentum_resets") == 1
    np.testing.assert_array_equal(after.z["w"], base.z["w"])
    assert int(after.count) == int(base.count) + 1


def test_stacked_gradients_of_several_tasks() -> None:
    combined = with_combiner(sum_combiner(), optax.sgd(1.0, momentum=0.5), num_tasks=3)
    tx = ok.skip_bad_steps(combined)
    stacked = jax.tree.map(lambda g: jnp.stack([g, g, g]), GOOD)
    bad = {**stacked, "b": stacked["b"].at[1].set(jnp.nan)}
    update = jax.jit(tx.update)
    updates, state = update(bad, tx.init(PARAMS), PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
    assert not np.any(updates["w"])
    updates, state = update(stacked, state, PARAMS)
    np.testing.assert_allclose(updates["w"], [-9.0, 0.0])
    assert metric(state, "skipped_steps") == 1


def test_every_seed_of_a_vmap_decides_for_itself() -> None:
    tx = ok.skip_bad_steps(optax.adam(0.1))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), GOOD, NAN)
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(2))
    updates, state = jax.jit(jax.vmap(tx.update, in_axes=(0, 0, None)))(both, state, PARAMS)
    np.testing.assert_array_equal(np.any(updates["w"], axis=1), [True, False])
    np.testing.assert_array_equal(state.metrics["skipped_steps"], [0, 1])
    np.testing.assert_array_equal(state.inner_state[0].count, [1, 0])


def test_it_works_inside_and_around_other_wrappers() -> None:
    inside = optax.MultiSteps(ok.skip_bad_steps(optax.sgd(1.0)), 2).gradient_transformation()
    around = ok.skip_bad_steps(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    for tx, moved in ((inside, 0.0), (around, -3.0)):
        state = tx.init(PARAMS)
        for grads in (GOOD, NAN, GOOD):
            updates, state = tx.update(grads, state, PARAMS)
            assert bool(all_finite(updates))
        assert float(updates["w"][0]) == moved


def test_no_copy_of_the_state_is_kept() -> None:
    params = measure.model_tree(4, 64, 64)
    step = measure.compile_step(ok.skip_bad_steps(optax.adam(0.1)), params, params)
    temporary = measure.temporary_bytes(step) / measure.size_of(params)
    assert temporary < 6  # the update, 4 bytes, and its flags, 1 byte; the state is 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_consecutive": 0}, "max_consecutive must be an integer >= 1, got 0"),
        ({"spike_threshold": 1.0}, "spike_threshold must be > 1, got 1"),
        ({"spike_decay": 1.0}, "spike_decay must be >= 0 and < 1, got 1"),
        ({"spike_warmup": -1}, "spike_warmup must be an integer >= 0, got -1"),
        ({"reset_momentum_after": 0}, "reset_momentum_after must be an integer >= 1, got 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ok.skip_bad_steps(optax.sgd(1.0), **arguments)


def test_a_reset_needs_the_parameters() -> None:
    tx = ok.skip_bad_steps(optax.sgd(1.0), reset_momentum_after=1)
    with pytest.raises(ValueError, match="reset_momentum_after needs the parameters"):
        tx.update(GOOD, tx.init(PARAMS))


def test_integers_are_no_gradient() -> None:
    tx = ok.skip_bad_steps(optax.sgd(1.0))
    with pytest.raises(TypeError, match="gradient leaf 'w' has dtype int32"):
        tx.update({**GOOD, "w": jnp.arange(2)}, tx.init(PARAMS), PARAMS)
