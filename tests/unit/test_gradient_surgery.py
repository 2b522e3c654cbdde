"""PCGrad, CAGrad, GradNorm, GCond, O-DICE and freezing on numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimkit import multitask, transforms
from optimkit.benchmark import tasks as tasks_benchmark
from optimkit.multitask.cagrad import worst_case_weights

KEY = jax.random.key(0)
CONFLICT = jnp.array([[1.0, 0.0], [-1.0, 1.0]])  # inner product -1, squares 1 and 2


def first_update(combiner, task_grads, **extra):
    params = jnp.zeros(task_grads.shape[1:])
    state = combiner.init(params, task_grads.shape[0])
    return combiner.update(task_grads, state, params, **extra)


class TestPCGrad:
    def test_a_mean_is_a_sum_over_the_number_of_tasks(self):
        total, _ = first_update(multitask.pcgrad(), CONFLICT, key=KEY)
        mean, _ = first_update(multitask.pcgrad(reduction="mean"), CONFLICT, key=KEY)
        np.testing.assert_allclose(2 * mean, total, rtol=1e-6)

    def test_projections_follow_one_another(self):
        grads = jnp.array([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        combiner = multitask.pcgrad(eps=0.0)
        order = jnp.array([[1, 2, 0], [0, 2, 1], [0, 1, 2]])
        out, _ = first_update(combiner, grads, order=order)
        # Task 0 ends at (0, 0). Task 1 goes to (-0.5, 0.5), which conflicts with task 2 now, and
        # to (-0.5, 0); task 2 likewise.
        np.testing.assert_allclose(out, [-0.5, -0.5], atol=1e-6)
        fixed, _ = first_update(multitask.pcgrad(eps=0.0, order="fixed"), grads)
        np.testing.assert_allclose(fixed, [-0.5, -0.5], atol=1e-6)

    def test_the_telemetry_counts_conflicts(self):
        grads = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
        _, state = first_update(multitask.pcgrad(), grads, key=KEY)
        assert state.metrics["min_cosine"] == -1
        np.testing.assert_allclose(state.metrics["conflict_fraction"], 1 / 3, rtol=1e-6)
        np.testing.assert_array_equal(state.task_cosines[2], [0, 0, 1])

    def test_bad_input(self):
        with pytest.raises(ValueError, match="give update key=, a random key, or order="):
            first_update(multitask.pcgrad(), CONFLICT)
        with pytest.raises(ValueError, match=r"order must hold integers of shape \(2, 2\)"):
            first_update(multitask.pcgrad(), CONFLICT, order=jnp.zeros((2, 1), jnp.int32))
        with pytest.raises(ValueError, match="order must be one of 'fixed', got 'random'"):
            multitask.pcgrad(order="random")
        combiner = multitask.pcgrad()
        with pytest.raises(ValueError, match=r"has shape \(3, 2\).* number the 2 tasks"):
            combiner.update(jnp.ones((3, 2)), combiner.init(jnp.zeros(2), 2), key=KEY)


class TestCAGrad:
    @pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
    def test_it_follows_the_scale_of_the_gradients(self, scale):
        out, state = first_update(multitask.cagrad(), scale * CONFLICT)
        unit, _ = first_update(multitask.cagrad(), CONFLICT)
        np.testing.assert_allclose(out / scale, unit, rtol=1e-4)
        np.testing.assert_allclose(jnp.sum(state.task_weights), 1, rtol=1e-6)

    def test_without_a_ball_it_is_the_mean(self):
        out, _ = first_update(multitask.cagrad(c=0.0), CONFLICT)
        np.testing.assert_allclose(out, [0.0, 0.5], atol=1e-6)

    def test_one_task_gets_longer(self):
        out, _ = first_update(multitask.cagrad(c=0.5), jnp.array([[2.0]]))
        np.testing.assert_allclose(out, [2 * 1.5 / 1.25], rtol=1e-4)

    def test_the_solver_finds_the_corner(self):
        """The second task's gradient is the shortest and within all others' half-spaces."""
        gram = jnp.diag(jnp.array([4.0, 0.01, 4.0, 4.0])) / 3
        w = worst_case_weights(gram, jnp.float32(0.01))
        np.testing.assert_allclose(w, [0, 1, 0, 0], atol=1e-4)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="rescale must be 0, 1 or 2, got 3"):
            multitask.cagrad(rescale=3)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="c must be >= 0"):
            multitask.cagrad(c=-1.0)
        with pytest.raises(ValueError, match="solver_iters must be an integer >= 1"):
            multitask.cagrad(solver_iters=0)


class TestGradNorm:
    def test_the_slow_task_gains_weight(self):
        combiner = multitask.gradnorm(weight_optimizer=optax.sgd(0.1), initial_losses=jnp.ones(2))
        equal = jnp.array([[1.0], [1.0]])
        _, state = first_update(combiner, equal, losses=jnp.array([1.0, 0.5]))
        # Rates 4/3 and 2/3: targets above and below the norms, so gradients -1 and 1.
        np.testing.assert_allclose(state.task_weights, [1.1, 0.9], rtol=1e-6)

    def test_only_chosen_leaves_enter_the_norms(self):
        grads = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[1.0], [9.0]])}
        params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        for chosen, same in ((["a"], True), (None, False)):
            combiner = multitask.gradnorm(weight_optimizer=optax.sgd(0.1), norm_leaves=chosen)
            state = combiner.init(params, 2)
            _, state = combiner.update(grads, state, params, losses=jnp.ones(2))
            assert bool(state.task_weights[0] == state.task_weights[1]) is same

    def test_bad_input(self):
        combiner = multitask.gradnorm(weight_optimizer=optax.sgd(0.1))
        with pytest.raises(ValueError, match="gradnorm needs the tasks' losses"):
            first_update(combiner, CONFLICT)
        with pytest.raises(ValueError, match=r"losses must have shape \(2,\), one a task"):
            first_update(combiner, CONFLICT, losses=jnp.ones(3))
        with pytest.raises(ValueError, match="losses must be >= 0"):
            first_update(combiner, CONFLICT, losses=jnp.array([1.0, -1.0]))


class TestGCond:
    def test_a_task_that_always_wins_loses(self):
        combiner = multitask.arbitrate_conflicts(
            dominance_window=2, max_iters=1, tie_breaking_weights=(0.0, 1.0)
        )
        grads = jnp.array([[4.0, 0.0], [-1.0, 1.0]])
        state = combiner.init(jnp.zeros(2), 2)
        seen = []
        for _ in range(4):
            _, state = combiner.update(grads, state)
            seen.append(int(state.winners[-1]))
        assert seen == [0, 0, 1, 0]

    def test_in_the_zones_a_critical_loser_is_dropped(self):
        combiner = multitask.arbitrate_conflicts(smooth=False)
        out, state = first_update(combiner, jnp.array([[4.0, 0.0], [-1.0, 0.1]]))
        np.testing.assert_allclose(out, [4.0, 0.0])
        assert state.metrics["resolved_pairs"] == 1

    def test_the_cap_limits_every_task(self):
        combiner = multitask.arbitrate_conflicts(norm_cap=1.0)
        out, _ = first_update(combiner, jnp.array([[4.0, 0.0], [0.0, 0.5]]))
        np.testing.assert_allclose(out, [1.0, 0.5], rtol=1e-6)

    def test_the_trust_ratio_sets_the_size(self):
        combiner = multitask.gcond(use_lion=True, trust_ratio_coef=0.1)
        params = jnp.array([3.0, 4.0])
        state = combiner.init(params, 1)
        out, _ = combiner.update(jnp.array([[0.0, -2.0]]), state, params)
        np.testing.assert_allclose(out, [0.0, -0.1 * 5 / 2], rtol=1e-6)
        with pytest.raises(ValueError, match="gcond with use_lion needs the parameters"):
            combiner.update(jnp.ones((1, 2)), state)

    def test_buffers_may_be_narrow(self):
        state = multitask.gcond(buffer_dtype=jnp.bfloat16).init(jnp.zeros(2), 2)
        assert state.mu.dtype == state.combiner_state.previous_gradient.dtype == jnp.bfloat16

    def test_bad_arguments(self):
        cases: tuple[tuple[dict[str, Any], str], ...] = (
            ({"conflict_thresholds": (0.0, -0.5, 0.0)}, "must not decrease"),
            ({"conflict_thresholds": (0.0, 0.5)}, "must be 3 numbers"),
            ({"tie_breaking_weights": (-1.0, 1.0)}, "tie_breaking_weights must be >= 0"),
            ({"remap_power": 0.0}, "remap_power must be > 0"),
            ({"max_iters": 0}, "max_iters must be an integer >= 1"),
        )
        for bad, words in cases:
            with pytest.raises(ValueError, match=words):
                multitask.gcond(**bad)


class TestOrthogonalGradient:
    def test_aligned_gradients_are_projected_unless_told_otherwise(self):
        both = jnp.array([[1.0, 0.0], [2.0, 1.0]])
        out, _ = first_update(multitask.orthogonal_gradient(), both)
        np.testing.assert_allclose(out, [1.0, 1.0])
        out, _ = first_update(multitask.orthogonal_gradient(only_conflicting=True), both)
        np.testing.assert_allclose(out, [3.0, 1.0])

    def test_a_leaf_at_a_time(self):
        combiner = multitask.orthogonal_gradient(per_leaf=True)
        grads = {"a": jnp.array([[1.0], [5.0]]), "b": jnp.array([[0.0], [3.0]])}
        out, _ = combiner.update(grads, combiner.init({"a": jnp.zeros(1), "b": jnp.zeros(1)}, 2))
        assert out["a"].tolist() == [1.0]  # one number: the second is parallel
        assert out["b"].tolist() == [3.0]

    def test_it_takes_two_gradients(self):
        for combiner in (multitask.orthogonal_gradient(), multitask.freeze_low_disorder(2, 0.5)):
            for tasks in (1, 3):
                with pytest.raises(ValueError, match=f"num_tasks must be 2, .* got {tasks}"):
                    combiner.init(jnp.zeros(2), tasks)

    @pytest.mark.parametrize("f", ["pearson_chi2", "reverse_kl"])
    def test_value_gradient_is_made_of_its_parts(self, f):
        rng = np.random.default_rng(0)
        batch = {"observations": rng.normal(size=(5, 2)), "rewards": rng.normal(size=5)}
        batch |= {"next_observations": rng.normal(size=(5, 2)), "terminals": np.eye(5)[0]}
        batch = {name: jnp.asarray(x, jnp.float32) for name, x in batch.items()}
        params = {"w": jnp.array([0.5, -1.0])}

        def value_fn(params, x):
            return jnp.tanh(x @ params["w"])

        def forward_loss(params):
            residual = batch["rewards"] - value_fn(params, batch["observations"])
            goes_on = 0.99 * (1 - batch["terminals"])
            residual += goes_on * value_fn(target, batch["next_observations"])
            w = jnp.maximum(residual / 2 + 1, 0)
            chi2 = residual * w - (w - 1) ** 2
            return 0.6 * jnp.mean(chi2 if f == "pearson_chi2" else jnp.exp(residual - 1))

        target = {"w": jnp.array([0.25, 1.0])}
        grads, aux = multitask.odice_value_gradient(params, target, batch, value_fn, f=f)
        expected = jax.grad(forward_loss)(params)["w"]
        np.testing.assert_allclose(aux["forward_grad"]["w"], expected, rtol=1e-5)
        kept = grads["w"] - aux["base_grad"]["w"] - aux["forward_grad"]["w"]
        assert abs(kept @ aux["forward_grad"]["w"]) < 1e-6
        without = {name: x for name, x in batch.items() if name != "rewards"}
        with pytest.raises(ValueError, match=r"batch lacks \['rewards'\]"):
            multitask.odice_value_gradient(params, target, without, value_fn)


class TestFreezing:
    def test_a_steady_gradient_is_frozen_and_thaws(self):
        combiner = multitask.freeze_low_disorder(3, 0.5, mask=["scale"])
        params = {"scale": jnp.zeros(()), "w": jnp.zeros(2)}
        state = combiner.init(params, 2)
        passed = []
        for sign in (1, 1, 1, 1, -1, 1, 1):
            grads = {"scale": jnp.array([sign, 0.0]), "w": jnp.ones((2, 2))}
            out, state = combiner.update(grads, state, params)
            passed.append(float(out["scale"]))
            assert out["w"].tolist() == [2.0, 2.0]
        assert passed == [1, 1, 1, 0, 0, 0, 1]
        assert state.inner_state.sign["w"].shape == ()

    def test_below_and_entry_by_entry(self):
        combiner = multitask.freeze_low_disorder(2, 0.5, reference="below", reduce="none")
        state = combiner.init(jnp.zeros(2), 2)
        for sign in (1.0, -1.0, 1.0):
            out, state = combiner.update(jnp.array([[sign, 1.0], [0.0, 0.0]]), state)
        assert out.tolist() == [0.0, 1.0]  # the first swings

    def test_bad_input(self):
        with pytest.raises(ValueError, match="window must be an integer >= 2, got 1"):
            multitask.freeze_low_disorder(1, 0.5)
        with pytest.raises(ValueError, match="threshold must be >= 0 and <= 1"):
            multitask.freeze_low_disorder(2, 1.5)
        with pytest.raises(ValueError, match="at least two steps"):
            transforms.gradient_disorder(jnp.ones((1, 3)))


class TestTaskGradients:
    @pytest.mark.parametrize("batch_size", [None, 1, 2])
    def test_they_are_the_gradients_of_the_losses(self, batch_size):
        w = jnp.array([1.0, 2.0])

        def losses_fn(w, x):
            return jnp.stack([w @ x, jnp.sum(w**2), jnp.prod(w)]), {"x": x}

        x = jnp.array([3.0, 4.0])
        (losses, aux), grads = multitask.task_gradients(
            losses_fn, w, x, batch_size=batch_size, has_aux=True
        )
        assert losses.tolist() == [11.0, 5.0, 2.0]
        assert grads.tolist() == [[3.0, 4.0], [2.0, 4.0], [2.0, 1.0]]
        assert aux["x"].tolist() == [3.0, 4.0]

    def test_one_loss_is_not_a_loss_a_task(self):
        with pytest.raises(ValueError, match=r"one loss a task.* got shape \(\)"):
            multitask.task_gradients(jnp.sum, jnp.ones(2))

    def test_the_table_has_every_form(self):
        table = tasks_benchmark.gradient_table(tasks=2, width=8, depth=1, rows=8, rounds=1)
        assert table["separate"][0] == 1
        assert {"together", "one at a time"} <= set(table)


def test_accumulation_makes_one_update_a_window():
    inner = multitask.with_combiner(multitask.sum_combiner(), optax.adam(1.0), num_tasks=2)
    tx = multitask.accumulate_task_grads(3, inner, num_tasks=2)
    params = jnp.zeros(2, jnp.bfloat16)
    state = tx.init(params)
    counts = []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(CONFLICT.astype(jnp.bfloat16), state, params)
        counts.append((int(state.inner_state.inner_state[0].count), bool(jnp.any(updates != 0))))
    assert counts == [(0, False), (0, False), (1, True), (1, False)]
    with pytest.raises(ValueError, match="every_k must be an integer >= 1, got 0"):
        multitask.accumulate_task_grads(0, inner, num_tasks=2)
