"""Stacked gradients and SAM-GS on numbers that can be checked by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import optimkit as ok
from optimkit import multitask
from optimkit.leaves import map_param_state, narrow_like
from optimkit.multitask.tasks import check_tasks, over_pairs, pair_similarities

SIMILAR = jnp.array([[3.0, 4.0], [5.0, 0.0]])  # norms 5 and 5: similarity 1
UNLIKE = jnp.array([[1.0, 0.0], [0.0, 3.0]])  # norms 1 and 3: similarity 6/10


def run(combiner, *steps, tasks=None):
    """Outputs and last state after these stacked gradients."""
    tasks = tasks or jax.tree.leaves(steps[0])[0].shape[0]
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), steps[0])
    state, outs = combiner.init(params, tasks), []
    for grads in steps:
        out, state = combiner.update(grads, state, params)
        outs.append(out)
    return outs, state


class Helpers(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_norms_and_inner_products_run_over_the_whole_tree(self):
        tree = {"w": jnp.array([[[3.0, 0.0]], [[1.0, 2.0]]]), "b": jnp.array([4.0, 2.0])}
        chex.assert_trees_all_close(self.variant(multitask.task_norms)(tree), jnp.array([5.0, 3.0]))
        gram = self.variant(multitask.task_gram)(tree)
        chex.assert_trees_all_close(gram, jnp.array([[25.0, 11.0], [11.0, 9.0]]))

    @chex.all_variants(with_pmap=False)
    def test_mixing_gives_one_gradient_or_several(self):
        tree = {"w": jnp.array([[1.0, 2.0], [10.0, 20.0]]), "b": jnp.array([1.0, -1.0])}
        one = self.variant(multitask.mix_tasks)(tree, jnp.array([2.0, 0.5]))
        chex.assert_trees_all_close(one, {"w": jnp.array([7.0, 14.0]), "b": jnp.array(1.5)})
        two = self.variant(multitask.mix_tasks)(tree, jnp.array([[1.0, 1.0], [0.0, -1.0]]))
        chex.assert_trees_all_close(
            two,
            {"w": jnp.array([[11.0, 22.0], [-10.0, -20.0]]), "b": jnp.array([0.0, 1.0])},
        )

    def test_many_tasks_are_added_as_few_are(self):
        few, many = jnp.ones((16, 3)), jnp.ones((17, 3))
        assert run(multitask.sum_combiner(), few)[0][0].tolist() == [16.0] * 3
        assert run(multitask.sum_combiner(), many)[0][0].tolist() == [17.0] * 3

    def test_norms_neither_overflow_nor_underflow(self):
        tree = {"w": jnp.array([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])}
        np.testing.assert_allclose(multitask.task_norms(tree), [5e30, 5e-30, 0.0], rtol=1e-6)
        assert jnp.isfinite(multitask.task_gram({"w": jnp.full((2, 4), 1e30)})).all()

    def test_a_subnormal_norm_is_zero_under_jit_too(self):
        tiny = float(jnp.finfo(jnp.float32).smallest_subnormal)
        tree = {"w": jnp.full((2, 3), tiny), "temperature": jnp.full((2,), tiny)}
        assert jax.jit(multitask.task_norms)(tree).tolist() == [0.0, 0.0]
        assert jax.jit(multitask.magnitude_similarity)(tree) == 1

    def test_a_non_finite_task_shows_in_its_norm(self):
        tree = {"w": jnp.ones((3, 2)), "b": jnp.array([1.0, jnp.nan, jnp.inf])}
        norms = jax.jit(multitask.task_norms)(tree)
        assert jnp.isfinite(norms).tolist() == [True, False, False]

    def test_reductions_are_f32_for_half_precision(self):
        # 70,000 ones: bfloat16 would stop counting at 256, float16 overflow at 65,504.
        for dtype in (jnp.bfloat16, jnp.float16):
            ones = {"w": jnp.ones((2, 70_000), dtype)}
            assert multitask.task_gram(ones).dtype == jnp.float32
            assert multitask.task_gram(ones)[0, 1] == 70_000
            np.testing.assert_allclose(multitask.task_norms(ones), 70_000**0.5, rtol=1e-6)

    def test_similarity_of_magnitudes(self):
        pairs = pair_similarities(jnp.array([1.0, 3.0, 0.0, 0.0]))
        np.testing.assert_allclose(pairs[0], [1.0, 0.6, 0.0, 0.0], rtol=1e-6)
        assert pairs[2, 3] == 1  # two zeros are alike
        mean, least = over_pairs(pair_similarities(jnp.array([1.0, 3.0, 3.0])))
        np.testing.assert_allclose((mean, least), ((0.6 + 0.6 + 1) / 3, 0.6), rtol=1e-6)
        assert multitask.magnitude_similarity({"w": jnp.ones((1, 4))}) == 1
        huge_and_tiny = {"w": jnp.array([[1e30], [1e-30]])}
        assert multitask.magnitude_similarity(huge_and_tiny) == 0

    def test_narrowing_keeps_finite_values_finite(self):
        wide = jnp.array([1e6, -1e6, jnp.inf, jnp.nan, 1.0])
        narrowed = narrow_like(wide, jnp.zeros(5, jnp.float16))
        np.testing.assert_array_equal(narrowed, [65504, -65504, np.inf, np.nan, 1.0])

    def test_the_wrong_task_axis_is_named(self):
        tree = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones((3,)), "c": jnp.ones((2, 5))}
        with pytest.raises(ValueError, match=r"'b' has shape \(3,\).* number the 2 tasks"):
            check_tasks(tree)  # most leaves say two
        with pytest.raises(ValueError, match=r"'a/w' has shape \(2, 3\).* number the 3 tasks"):
            check_tasks(tree, 3)
        with pytest.raises(ValueError, match=r"'w' has shape \(2, 1\), .* has \(2, 3\)"):
            check_tasks({"w": jnp.ones((2, 1))}, 2, {"w": jnp.ones(3)})
        with pytest.raises(TypeError, match=r"task gradient leaf 'w' has dtype int32"):
            check_tasks({"w": jnp.ones((2, 1), jnp.int32)})
        assert check_tasks({}) == 1


class SamGs(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_unlike_norms_are_made_equal(self):
        """Norms 1 and 3: both tasks get norm 2, directions stay."""
        combiner = multitask.sam_gs(gamma=0.7)
        state = combiner.init(jnp.zeros(2), 2)
        grads, state = self.variant(combiner.update)(UNLIKE, state)
        np.testing.assert_allclose(grads, [2.0, 2.0], rtol=1e-6)
        np.testing.assert_allclose(state.metrics["task_similarity"], 0.6, rtol=1e-6)
        assert state.metrics["norms_equalized"] == 1
        # Both moments advance all the same.
        np.testing.assert_allclose(state.mu, 0.1 * UNLIKE, rtol=1e-6)
        np.testing.assert_allclose(state.dissimilarity, 0.01 * 0.4**2 + 1e-8, rtol=1e-5)
        assert state.count == 1

    @chex.all_variants(with_pmap=False)
    def test_similar_norms_are_modulated_by_momentum(self):
        """Norms 5 and 5, b1 = 0: g |g| / sqrt(eps / (1 - b2)), summed over the tasks."""
        combiner = multitask.sam_gs(b1=0.0, b2=0.0, eps=0.25)
        state = combiner.init(jnp.zeros(2), 2)
        grads, state = self.variant(combiner.update)(SIMILAR, state)
        np.testing.assert_allclose(grads, [(9 + 25) / 0.5, 16 / 0.5], rtol=1e-6)
        assert state.metrics["norms_equalized"] == 0
        np.testing.assert_allclose(state.dissimilarity, 0.25)

    def test_both_moments_are_corrected_for_their_start(self):
        """b1 = b2 = 1/2, the same gradient twice: m/(1 - 1/4) = g, v = eps (1/2 + 1) over 3/4."""
        (_, second), state = run(multitask.sam_gs(0.5, 0.5, eps=0.125), SIMILAR, SIMILAR)
        np.testing.assert_allclose(state.mu, 0.75 * SIMILAR, rtol=1e-6)
        np.testing.assert_allclose(state.dissimilarity, 0.125 * 1.5, rtol=1e-6)
        np.testing.assert_allclose(second, [34 / 0.5, 16 / 0.5], rtol=1e-6)

    def test_the_gain_is_1000_when_tasks_agree(self):
        (grads,), _ = run(multitask.sam_gs(), jnp.array([[1.0], [1.0]]))
        np.testing.assert_allclose(grads, [2000.0], rtol=1e-4)

    def test_modulation_keeps_signs_and_uses_each_tasks_own_momentum(self):
        first = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        second = jnp.array([[0.0, -1.0], [1.0, 0.0]])  # where its own momentum is zero
        combiner = multitask.sam_gs(0.5, 0.0, eps=1.0)
        (_, out), _ = run(combiner, first, second)
        # m/(1 - 1/4) of task 0 is (1/3, -2/3), of task 1 (2/3, 1/3); v = 1.
        np.testing.assert_allclose(out, [1.0 * 2 / 3, -1.0 * 2 / 3], rtol=1e-5)

    def test_any_pair_or_the_mean(self):
        norms = jnp.diag(jnp.array([1.0, 3.0, 3.0]))  # similarities 0.6, 0.6 and 1: mean 0.733
        (by_mean,), mean_state = run(multitask.sam_gs(gamma=0.7), norms)
        (by_any,), any_state = run(multitask.sam_gs(gamma=0.7, similarity="any"), norms)
        np.testing.assert_allclose(by_any, [7 / 3] * 3, rtol=1e-6)
        assert by_mean[1] > 10 * by_any[1]
        assert mean_state.metrics["norms_equalized"] == 0
        assert any_state.metrics["norms_equalized"] == 1
        assert any_state.dissimilarity == mean_state.dissimilarity

    @parameterized.parameters(False, True)
    def test_the_branch_is_strict_at_gamma(self, below):
        combiner = multitask.sam_gs(gamma=1.0)  # equal norms have similarity 1, not below 1
        _, state = run(combiner, SIMILAR * jnp.array([[1.01 if below else 1.0], [1.0]]))
        assert bool(state.metrics["norms_equalized"]) is below

    def test_opposed_tasks_cancel_whatever_their_size(self):
        (grads,), _ = run(multitask.sam_gs(), jnp.array([[100.0, 0.0], [-1.0, 0.0]]))
        np.testing.assert_allclose(grads, [0.0, 0.0], atol=1e-5)

    def test_tasks_without_gradient(self):
        one_zero = jnp.array([[0.0, 0.0], [0.0, 4.0]])
        (grads,), state = run(multitask.sam_gs(), one_zero)
        np.testing.assert_allclose(grads, [0.0, 2.0])  # the mean norm is 2, the zero task adds none
        assert state.metrics["task_similarity"] == 0
        (grads,), state = run(multitask.sam_gs(max_norm=1.0), jnp.zeros((2, 2)))
        np.testing.assert_array_equal(grads, [0.0, 0.0])
        assert state.metrics["task_similarity"] == 1

    def test_one_task_passes_unchanged(self):
        grads = {"w": jnp.array([[0.3, -7.0]]), "b": jnp.array([2.0])}
        outs, state = run(multitask.sam_gs(scale_by_num_tasks=True), grads, grads)
        chex.assert_trees_all_equal(outs[1], jax.tree.map(lambda g: g[0], grads))
        assert state.metrics["task_similarity"] == 1
        tiny = float(jnp.finfo(jnp.float32).smallest_subnormal)
        combiner = multitask.sam_gs(max_norm=1.0)
        clipped, _ = jax.jit(combiner.update)(jnp.full((1,), tiny), combiner.init(jnp.zeros(()), 1))
        assert jnp.isfinite(clipped)

    def test_the_clip_is_torchs(self):
        """The factor is 1 / (norm + 1e-6), which shows where the norm itself is small."""
        equal = jnp.array([[3e-6, 0.0], [0.0, 1e-6]])  # equalised to (2e-6, 2e-6)
        (grads,), _ = run(multitask.sam_gs(gamma=0.7, max_norm=1e-6), equal)
        norm = 8**0.5 * 1e-6
        np.testing.assert_allclose(grads, [2e-6 * 1e-6 / (norm + 1e-6)] * 2, rtol=1e-5)
        (grads,), _ = run(multitask.sam_gs(gamma=0.7, max_norm=1.0), equal)
        np.testing.assert_allclose(grads, [2e-6, 2e-6], rtol=1e-6)  # never scaled up

    def test_the_result_is_scaled_by_the_number_of_tasks_before_the_clip(self):
        (grads,), _ = run(multitask.sam_gs(gamma=0.7, scale_by_num_tasks=True), UNLIKE)
        np.testing.assert_allclose(grads, [4.0, 4.0], rtol=1e-6)
        clipped = multitask.sam_gs(gamma=0.7, scale_by_num_tasks=True, max_norm=4.0)
        np.testing.assert_allclose(run(clipped, UNLIKE)[0][0], [8**0.5] * 2, rtol=1e-5)

    def test_equalisation_follows_the_scale_and_modulation_its_square(self):
        equalised = multitask.sam_gs(gamma=0.7)
        modulated = multitask.sam_gs(gamma=0.1)
        for combiner, degree in ((equalised, 1), (modulated, 2)):
            (small,), _ = run(combiner, UNLIKE)
            (large,), _ = run(combiner, 8 * UNLIKE)
            np.testing.assert_allclose(large, 8**degree * small, rtol=1e-5)

    def test_state_is_f32_and_has_one_copy_a_task(self):
        params = {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones((), jnp.bfloat16)}
        state = multitask.sam_gs().init(params, 5)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            state.mu, {"w": jnp.zeros((5, 4, 3)), "b": jnp.zeros((5,))}
        )

    def test_bad_arguments(self):
        for bad in ({"b1": 1.0}, {"b2": -0.1}, {"gamma": 1.5}, {"eps": 0.0}, {"max_norm": 0.0}):
            with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
                multitask.sam_gs(**bad)
        with pytest.raises(ValueError, match="similarity must be one of 'mean', 'any'"):
            multitask.sam_gs(similarity="max")  # pyright: ignore[reportArgumentType]
        combiner = multitask.sam_gs()
        state = combiner.init({"w": jnp.zeros(3)}, 2)
        with pytest.raises(ValueError, match=r"'w' has shape \(3, 3\).*number the 2 tasks"):
            combiner.update({"w": jnp.zeros((3, 3))}, state)
        with pytest.raises(ValueError, match=r"'w' has shape \(2, 1\), but the state has \(2, 3\)"):
            combiner.update({"w": jnp.zeros((2, 1))}, state)


class WithCombiner(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_published_recipe(self):
        """Equalised to (2, 2), times 2, clipped to norm 1, then the optimizer."""
        tx = ok.sam_gs_optimizer(optax.sgd(1.0), gamma=0.7, num_tasks=2)
        params = jnp.zeros(2)
        updates, _ = self.variant(tx.update)(UNLIKE, tx.init(params), params)
        np.testing.assert_allclose(updates, [-(0.5**0.5)] * 2, rtol=1e-6)

    def test_half_precision_is_computed_in_f32_and_cast_once(self):
        seen = []

        def spy_update(updates, state, params=None, **extra):
            seen.append((updates.dtype, params.dtype))
            return updates, state

        spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), spy_update)
        tx = multitask.with_combiner(multitask.sum_combiner(), spy, num_tasks=3)
        params = jnp.zeros(1, jnp.bfloat16)
        # Added in bfloat16, one after the other, this would stay at 256.
        task_grads = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
        updates, _ = tx.update(task_grads, tx.init(params), params)
        assert seen == [(jnp.float32, jnp.float32)]
        assert updates.dtype == jnp.bfloat16
        assert updates.tolist() == [258.0]
        wide, _ = tx.update(task_grads.astype(jnp.float32), tx.init(params), params)
        assert wide.dtype == jnp.bfloat16

    def test_extra_arguments_reach_combiner_and_inner(self):
        heard = {}

        def combine(task_grads, state, params=None, *, task_losses, **extra):
            heard["losses"] = task_losses
            return multitask.mix_tasks(task_grads, task_losses), state

        def inner_update(updates, state, params=None, *, value, **extra):
            heard["value"] = value
            return updates, state

        combiner = multitask.sum_combiner()._replace(update=combine)
        inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), inner_update)
        tx = multitask.with_combiner(combiner, inner, num_tasks=2)
        losses = jnp.array([1.0, 10.0])
        updates, _ = tx.update(UNLIKE, tx.init(jnp.zeros(2)), value=3.0, task_losses=losses)
        np.testing.assert_allclose(updates, [1.0, 30.0])
        assert heard["value"] == 3.0
        assert heard["losses"] is losses

    def test_works_without_parameters_when_inner_does(self):
        tx = multitask.with_combiner(multitask.sum_combiner(), optax.scale(2.0), num_tasks=2)
        updates, _ = tx.update(UNLIKE.astype(jnp.float16), tx.init(jnp.zeros(2, jnp.float16)))
        assert updates.dtype == jnp.float16
        assert updates.tolist() == [2.0, 6.0]

    def test_heads_take_another_way(self):
        """The head's large gradient does not enter the norms of the shared weights."""
        params = {"shared": jnp.zeros(2), "head": jnp.zeros(1)}
        task_grads = {"shared": UNLIKE, "head": jnp.array([[1000.0], [0.0]])}
        tx = optax.partition(
            {
                "shared": ok.sam_gs_optimizer(
                    optax.sgd(1.0), gamma=0.7, num_tasks=2, max_norm=None
                ),
                "head": multitask.with_combiner(
                    multitask.sum_combiner(), optax.sgd(1.0), num_tasks=2
                ),
            },
            {"shared": "shared", "head": "head"},
        )
        updates, _ = jax.jit(tx.update)(task_grads, tx.init(params), params)
        np.testing.assert_allclose(updates["shared"], [-4.0, -4.0], rtol=1e-6)
        np.testing.assert_allclose(updates["head"], [-1000.0])

    def test_the_place_of_every_parameter_is_found_in_the_state(self):
        params = {"w": jnp.zeros((4, 3))}
        tx = ok.sam_gs_optimizer(optax.adam(1e-3), num_tasks=2)
        marks = map_param_state(tx.init, lambda name, leaf: name, lambda leaf: "", tx.init(params))
        assert marks.combiner_state.mu == {"w": "w"}
        assert marks.combiner_state.dissimilarity == ""
        assert marks.inner_state[0].nu == {"w": "w"}

    def test_bad_input(self):
        with pytest.raises(ValueError, match="num_tasks must be an integer >= 1, got 0"):
            multitask.with_combiner(multitask.sum_combiner(), optax.sgd(1.0), num_tasks=0)
        tx = multitask.with_combiner(multitask.sum_combiner(), optax.sgd(1.0), num_tasks=2)
        params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
        with pytest.raises(ValueError, match=r"'b' has shape \(\)"):
            tx.update({"w": jnp.zeros((2, 3)), "b": jnp.zeros(())}, tx.init(params), params)
        with pytest.raises(ValueError, match=r"missing leaves \['b'\]"):
            tx.update({"w": jnp.zeros((2, 3))}, tx.init(params), params)
        with pytest.raises(ValueError, match=r"weights must have shape \(2,\), .* got \(3,\)"):
            multitask.sum_combiner(jnp.ones(3)).init(params, 2)
