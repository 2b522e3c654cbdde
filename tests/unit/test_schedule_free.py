"""Schedule-free: the rule on numbers checked by hand, where x is found, and what lasts in bf16."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.numerics import tree_norm
from optimkit.transforms.rectify import rectification
from optimkit.wrappers.schedule_free import ScheduleFreeState

PARAMS = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}


def gradients(steps, params=PARAMS):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), p.dtype), params)


def train(tx, params, sequence):
    """Parameters and state after one step a gradient."""

    @jax.jit
    def run(params, state, sequence):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), sequence)[0]

    return run(params, tx.init(params), sequence)


def core(state):
    """The one schedule-free state inside another state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, ScheduleFreeState))
    return next(node for node in nodes if isinstance(node, ScheduleFreeState))


# -- the rule ---------------------------------------------------------------------------------


class RuleTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=False)
    def test_three_steps_by_hand(self):
        # lr = b1 = 1/2, gradient 1, weights 1, 1/2, 1/3:
        #   z = -0.5, -1, -1.5;  x = -0.5, -0.75, -1;  y = (x + z)/2
        for keep in (False, True):
            tx = ok.schedule_free_sgd(0.5, 0.5, keep_average=keep)
            update = self.variant(tx.update)
            y = jnp.zeros(1)
            state = self.variant(tx.init)(y)
            for z, x in ((-0.5, -0.5), (-1.0, -0.75), (-1.5, -1.0)):
                updates, state = update(jnp.ones(1), state, y)
                y = optax.apply_updates(y, updates)
                np.testing.assert_allclose(y, [(x + z) / 2], rtol=1e-6)
                np.testing.assert_allclose(core(state).z, [z], rtol=1e-6)
                found = self.variant(ok.schedule_free_eval_params)(state, y)
                np.testing.assert_allclose(found, [x], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_warmup_is_right_at_the_first_step(self):
        # rates 0.1, 0.2 of 0.4; weights 0.01, 0.04; c = 1, 0.8
        tx = ok.schedule_free_sgd(0.4, 0.5, warmup_steps=4)
        y = jnp.zeros(1)
        state = tx.init(y)
        update = self.variant(tx.update)
        updates, state = update(jnp.ones(1), state, y)
        np.testing.assert_allclose(updates, [-0.1], rtol=1e-6)
        y = optax.apply_updates(y, updates)
        updates, state = update(jnp.ones(1), state, y)
        np.testing.assert_allclose(core(state).learning_rate, 0.2, rtol=1e-6)
        np.testing.assert_allclose(core(state).weight_sum, 0.05, rtol=1e-6)
        y = optax.apply_updates(y, updates)
        x = 0.2 * -0.1 + 0.8 * -0.3
        np.testing.assert_allclose(ok.schedule_free_eval_params(state, y), [x], rtol=1e-5)


def test_a_falling_rate_keeps_the_weight_of_the_largest() -> None:
    rates = jnp.array([1.0, 0.5, 0.1])
    tx = ok.schedule_free_sgd(lambda count: rates[count], weight_lr_power=2.0)
    _, state = train(tx, jnp.zeros(1), jnp.ones((3, 1)))
    np.testing.assert_allclose(core(state).weight_sum, 3.0)
    np.testing.assert_allclose(core(state).z, [-1.6], rtol=1e-6)


def test_r_weighs_by_the_step() -> None:
    tx = ok.schedule_free_sgd(1.0, r=1.0, weight_lr_power=0.0)
    _, state = train(tx, jnp.zeros(1), jnp.ones((4, 1)))
    np.testing.assert_allclose(core(state).weight_sum, 1 + 2 + 3 + 4)


def test_a_zero_rate_moves_nothing_and_weighs_nothing() -> None:
    tx = ok.schedule_free_adamw(0.0, weight_decay=0.1)
    params, state = train(tx, PARAMS, gradients(3))
    chex.assert_trees_all_equal(params, PARAMS)
    assert core(state).weight_sum == 0


def test_decay_acts_at_y_where_the_mask_says() -> None:
    tx = ok.schedule_free_sgd(0.1, weight_decay=0.5, mask={"kernel": True, "bias": False})
    params, _ = train(tx, PARAMS, jax.tree.map(jnp.zeros_like, gradients(1)))
    np.testing.assert_allclose(params["kernel"], PARAMS["kernel"] * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(params["bias"], PARAMS["bias"])


def test_the_recipe_is_the_wrapper_around_its_parts() -> None:
    """The recipe computes its direction twice, in two spellings; the wrapper takes it once."""
    rms = optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)
    parts = ok.schedule_free(optax.chain(rms, optax.add_decayed_weights(0.1)), 0.01)
    recipe = ok.schedule_free_adamw(0.01, weight_decay=0.1)
    got, _ = train(recipe, PARAMS, gradients(10))
    expected, _ = train(parts, PARAMS, gradients(10))
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 5])
def test_optax_agrees_without_warmup_only(warmup: int) -> None:
    theirs = optax.contrib.schedule_free_adamw(0.1, warmup or None, weight_decay=0.01)
    ours = ok.schedule_free_adamw(0.1, weight_decay=0.01, warmup_steps=warmup)
    got, state = train(ours, PARAMS, gradients(8))
    expected, their_state = train(theirs, PARAMS, gradients(8))
    difference = float(tree_norm(jax.tree.map(jnp.subtract, got, expected)))
    if warmup:
        assert difference > 1e-2  # theirs asks the schedule one step late for z
    else:
        assert difference < 1e-5
        chex.assert_trees_all_close(
            ok.schedule_free_eval_params(state, got),
            optax.contrib.schedule_free_eval_params(their_state, expected),
            rtol=1e-5,
        )


def test_x_stays_when_b1_changes() -> None:
    tx = ok.inject_hyperparams(ok.schedule_free_sgd)(0.1, b1=0.9)
    y, state = train(tx, PARAMS, gradients(5))
    x = ok.schedule_free_eval_params(state, y)
    hyperparams = {**state.hyperparams, "b1": jnp.float32(0.6), "learning_rate": jnp.float32(0)}
    state = state._replace(hyperparams=hyperparams)
    z = core(state).z
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, y)
    y = optax.apply_updates(y, updates)
    # The step of rate zero still averages: its weight is that of the largest rate, c = 1/6.
    expected = jax.tree.map(lambda x, z: x + (z - x) / 6, x, z)
    chex.assert_trees_all_close(ok.schedule_free_eval_params(state, y), expected, rtol=1e-5)
    mixed = jax.tree.map(lambda x, z: 0.6 * x + 0.4 * z, expected, z)
    chex.assert_trees_all_close(y, mixed, rtol=1e-5)


# -- RAdam ------------------------------------------------------------------------------------


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.9999])
def test_rectification_in_f32_is_the_formula_in_f64(b2: float) -> None:
    t = np.array([1, 2, 3, 4, 5, 6, 10, 100, 1000, 100_000], np.float64)
    b = np.float64(np.float32(b2))
    limit = 2 / (1 - b) - 1
    rho = limit - 2 * t * b**t / (1 - b**t)
    factor, length = jax.vmap(functools.partial(rectification, jnp.float32(b2)))(jnp.asarray(t))
    np.testing.assert_allclose(length, rho, rtol=1e-4)
    np.testing.assert_array_equal(length > 4, rho > 4)
    trusted = np.maximum(rho, 4)
    square = (trusted - 4) * (trusted - 2) * limit / ((limit - 4) * (limit - 2) * trusted)
    np.testing.assert_allclose(factor, np.sqrt(square), rtol=1e-3, atol=1e-6)


def test_radam_is_silent_for_four_steps() -> None:
    tx = ok.schedule_free_radam(0.1)
    still, state = train(tx, PARAMS, gradients(4))
    chex.assert_trees_all_equal(still, PARAMS)
    assert core(state).weight_sum == 0
    moved, _ = train(tx, PARAMS, gradients(5))
    assert jnp.any(moved["kernel"] != PARAMS["kernel"])
    loud, _ = train(ok.schedule_free_radam(0.1, silent_sgd_phase=False), PARAMS, gradients(1))
    sgd, _ = train(ok.schedule_free_sgd(0.1), PARAMS, gradients(1))
    chex.assert_trees_all_close(loud, sgd, rtol=1e-6)


# -- finding x --------------------------------------------------------------------------------

BARE = functools.partial(ok.schedule_free_adamw, 0.1, weight_decay=0.01)

NESTS = {
    "chain": lambda: optax.chain(optax.clip(10.0), BARE()),
    "deep chain": lambda: optax.chain(optax.identity(), optax.chain(optax.chain(BARE()))),
    "inject_hyperparams": lambda: ok.inject_hyperparams(ok.schedule_free_adamw)(
        0.1, weight_decay=0.01
    ),
    "optax.inject_hyperparams": lambda: optax.inject_hyperparams(
        ok.schedule_free_adamw, static_args=("warmup_steps", "keep_average")
    )(learning_rate=0.1, weight_decay=0.01),
    "MultiSteps": lambda: optax.MultiSteps(BARE(), 1).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(BARE(), 3),
    "momentum_reset": lambda: ok.momentum_reset(BARE(), 100),
    "kept average": lambda: optax.chain(BARE(keep_average=True)),
    "all": lambda: optax.apply_if_finite(
        optax.MultiSteps(
            optax.chain(optax.identity(), ok.momentum_reset(BARE(), 100)), 1
        ).gradient_transformation(),
        3,
    ),
}


@functools.cache
def bare_result():
    y, state = train(BARE(), PARAMS, gradients(6))
    z, b1 = core(state).z, core(state).b1
    return y, jax.tree.map(lambda y, z: (y - (1 - b1) * z) / b1, y, z)


@pytest.mark.parametrize("name", NESTS)
def test_x_is_found_in(name: str) -> None:
    y, state = train(NESTS[name](), PARAMS, gradients(6))
    expected_y, expected_x = bare_result()
    chex.assert_trees_all_close(y, expected_y, rtol=1e-5)
    for evaluate, resume in (
        (ok.schedule_free_eval_params, ok.schedule_free_train_params),
        (jax.jit(ok.schedule_free_eval_params), jax.jit(ok.schedule_free_train_params)),
    ):
        x = evaluate(state, y)
        chex.assert_trees_all_close(x, expected_x, rtol=1e-5)
        chex.assert_trees_all_close(resume(state, x), y, rtol=1e-5)
    assert float(tree_norm(jax.tree.map(jnp.subtract, x, y))) > 1e-3


def test_masked_leaves_keep_their_parameters() -> None:
    tx = optax.masked(BARE(), {"kernel": True, "bias": False})
    y, state = train(tx, PARAMS, gradients(6))
    x = jax.jit(ok.schedule_free_eval_params)(state, y)
    np.testing.assert_array_equal(x["bias"], y["bias"])
    np.testing.assert_allclose(x["kernel"], bare_result()[1]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(
        ok.schedule_free_train_params(state, x)["kernel"], y["kernel"], rtol=1e-5
    )


def test_of_several_states_one_must_be_named() -> None:
    tx = optax.partition({"a": BARE(), "b": BARE()}, {"kernel": "a", "bias": "b"})
    y, state = train(tx, PARAMS, gradients(6))
    with pytest.raises(ValueError, match="holds 2 schedule-free states"):
        ok.schedule_free_eval_params(state, y)
    x = ok.schedule_free_eval_params(state.inner_states["a"], y)
    x = ok.schedule_free_eval_params(state.inner_states["b"], x)
    chex.assert_trees_all_close(x, bare_result()[1], rtol=1e-5)


def test_no_state_and_other_trees_are_errors() -> None:
    with pytest.raises(ValueError, match="holds no schedule-free state"):
        ok.schedule_free_eval_params(optax.adam(0.1).init(PARAMS), PARAMS)
    state = BARE().init(PARAMS)
    with pytest.raises(ValueError, match="different trees"):
        ok.schedule_free_eval_params(state, {"kernel": PARAMS["kernel"]})
    with pytest.raises(ValueError, match=r"'kernel' has shape \(2,\).*\(1, 2\)"):
        ok.schedule_free_train_params(state, {**PARAMS, "kernel": jnp.ones(2)})


# -- state ------------------------------------------------------------------------------------


def buffers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("keep", [False, True])
def test_params_and_state_can_be_donated_together(keep: bool) -> None:
    tx = ok.inject_hyperparams(ok.schedule_free_adamw)(0.1, keep_average=keep)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for init in (tx.init, jax.jit(tx.init)):
        params = jax.tree.map(jnp.copy, PARAMS)
        state = init(params)
        assert not buffers(params) & buffers(state)
        assert len(buffers(state)) == len(jax.tree.leaves(state))
        grads = jax.tree.map(lambda g: g[0], gradients(1))
        for _ in range(2):  # what comes out can be donated again
            updates, _ = tx.update(grads, state, params)
            expected = optax.apply_updates(params, updates)
            params, state = step(params, state, grads)
            chex.assert_trees_all_close(params, expected, rtol=1e-6)
            assert len(buffers((params, state))) == len(jax.tree.leaves((params, state)))


def test_scalars_are_f32_and_z_too_beside_bfloat16_params() -> None:
    params = {"w": jnp.ones(3, jnp.bfloat16), "v": jnp.ones(2)}
    _, state = train(ok.schedule_free_sgd(1.0), params, gradients(400, params))
    state = core(state)
    for scalar in (state.weight_sum, state.max_learning_rate, state.learning_rate, state.b1):
        assert scalar.dtype == jnp.float32
    assert float(state.weight_sum) == 400  # a bfloat16 sum of ones ends at 256
    np.testing.assert_allclose(state.b1, 0.9, rtol=1e-6)
    assert {z.dtype for z in jax.tree.leaves(state.z)} == {jnp.dtype(jnp.float32)}


def test_a_kept_average_does_not_collect_the_rounding_of_bfloat16() -> None:
    rng = np.random.default_rng(1)
    start = jnp.asarray(rng.normal(size=64), jnp.bfloat16)
    # The gradients are the same in every run, so that only the rounding of y differs.
    sequence = jnp.asarray(rng.normal(size=(400, 64)) + 0.3, jnp.bfloat16)

    def averaged(dtype, keep):
        tx = ok.schedule_free_sgd(0.01, keep_average=keep)
        y, state = train(tx, start.astype(dtype), sequence.astype(dtype))
        (state,) = state  # x before it is rounded to the dtype of y
        y = y.astype(jnp.float32)
        return ok.schedule_free_eval_params(state, y)

    exact = averaged(jnp.float32, keep=False)
    np.testing.assert_allclose(averaged(jnp.float32, keep=True), exact, rtol=1e-3, atol=1e-4)
    kept = jnp.max(jnp.abs(averaged(jnp.bfloat16, keep=True) - exact))
    derived = jnp.max(jnp.abs(averaged(jnp.bfloat16, keep=False) - exact))
    assert kept < 1e-4 < derived / 50


def test_counts_advance_with_applied_updates_only() -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = optax.MultiSteps(BARE(), 2).gradient_transformation()
    _, state = train(tx, params, gradients(6, params))
    assert core(state).count == 3

    guarded = optax.apply_if_finite(BARE(), 5)
    state = guarded.init(PARAMS)
    broken = {"kernel": jnp.full((1, 2), jnp.nan), "bias": jnp.ones(1)}
    _, after = guarded.update(broken, state, PARAMS)
    chex.assert_trees_all_equal(core(after), core(state))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 0.0}, "b1 must be > 0 and < 1, got 0"),
        ({"b1": 1.0}, "b1 must be"),
        ({"learning_rate": -1.0}, "learning_rate must be >= 0"),
        ({"r": -1.0}, "r must be"),
        ({"weight_lr_power": -1.0}, "weight_lr_power must be"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0"),
        ({"bias_correction": "both"}, "bias_correction must be one of"),
        ({"b2": 1.0}, "b2 must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ok.schedule_free_adamw(**arguments)
