"""Adan, AdaBelief and diffGrad on numbers checked by hand, and where they must agree with optax."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok

STEPS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32) * [1e-3, 0.3, 20.0]
START = jnp.array([1.0, -2.0, 0.5])


def walk(tx, steps=STEPS, extra=lambda g: {}):
    """Parameters after each step, from one compilation; the gradients do not depend on them."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params, **extra(g))
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = (START, tx.init(START))
    path = jax.jit(lambda s: jax.lax.scan(step, start, s)[1])(jnp.asarray(steps, jnp.float32))
    return np.asarray(path)


class FirstStepsTest(chex.TestCase):
    """Each update with and without jit, and on device."""

    @chex.all_variants(with_pmap=False)
    def test_adan(self):
        tx = ok.scale_by_adan(b1=0.5, b2=0.5, b3=0.5, eps=0.0)
        update, state = self.variant(tx.update), self.variant(tx.init)(jnp.zeros(2))
        _, state = update(jnp.array([4.0, 1.0]), state)
        out, state = update(jnp.array([4.0, 5.0]), state)
        # m = 3 and 2.75, over 0.75. v = 0 and 0.5 * 4, times 0.5 over 0.75.
        # n = 0.5 * 8 + 0.5 * 16 = 12 and 0.5 * 0.5 + 0.5 * 7**2 = 24.75, over 0.75.
        np.testing.assert_allclose(out, [1.0, 5.0 / 33**0.5], rtol=1e-6)
        np.testing.assert_array_equal(state.previous_gradient, [4.0, 5.0])

    @chex.all_variants(with_pmap=False)
    def test_proximal_decay(self):
        tx = ok.apply_proximal_decay(lambda count: 0.5 * (count + 1), 0.5, {"a": True, "b": False})
        params = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
        updates = {"a": jnp.array([-0.5]), "b": jnp.array([-0.5])}
        update, state = self.variant(tx.update), tx.init(params)
        for divisor in (1.25, 1.5):  # the schedule is asked at counts 0 and 1
            out, state = update(updates, state, params)
            np.testing.assert_allclose(params["a"] + out["a"], [0.5 / divisor], rtol=1e-6)
            np.testing.assert_array_equal(out["b"], [-0.5])

    @chex.all_variants(with_pmap=False)
    def test_belief(self):
        for amsgrad, kept in ((False, 0.4375), (True, 0.625)):
            tx = ok.scale_by_belief(b1=0.5, b2=0.5, eps=0.0, eps_root=0.125, amsgrad=amsgrad)
            update, state = self.variant(tx.update), self.variant(tx.init)(jnp.zeros(1))
            _, state = update(jnp.array([2.0]), state)  # m = 1, s = 0.5 * 1 + 0.125 = 0.625
            np.testing.assert_allclose(state.nu, [0.625], rtol=1e-6)
            out, state = update(jnp.array([1.0]), state)  # m = 1 again: no surprise
            np.testing.assert_allclose(state.nu, [0.5 * 0.625 + 0.125], rtol=1e-6)
            np.testing.assert_allclose(out, [(1 / 0.75) / (kept / 0.75) ** 0.5], rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_friction(self):
        gradients = jnp.array([[0.0, 2.0, 4.0], [0.0, 2.0, 2.0]])
        e = np.exp(-2.0)
        wanted = {
            "sigmoid_abs": [0.5, 0.5, 1 / (1 + e)],
            "sigmoid_signed": [0.5, 0.5, 1 / (1 + e)],
            "wide": [0.5, 0.5, 9 / (1 + np.exp(-1.0)) - 4],
        }
        for friction, coefficients in wanted.items():
            tx = ok.gradient_friction(friction)
            update, state = self.variant(tx.update), tx.init(gradients[0])
            _, state = update(gradients[0], state)
            out, state = update(jnp.ones(3), state, grad=gradients[1])
            np.testing.assert_allclose(out, coefficients, rtol=1e-6)
            np.testing.assert_array_equal(state.previous_gradient, gradients[1])


# -- adan -------------------------------------------------------------------------------------


def test_optax_adan_is_ours_where_its_weight_of_the_change_is_the_same() -> None:
    ours = walk(ok.adan(0.1, b2=0.5, weight_decay=0.1, no_prox=True))
    theirs = walk(optax.adan(0.1, b2=0.5, eps_root=0.0, weight_decay=0.1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    # At the authors' b2 it leaves their path at the second step.
    ours, theirs = walk(ok.adan(0.1)), walk(optax.adan(0.1, eps_root=0.0))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    assert np.max(np.abs(ours[1] - theirs[1])) > 0.01


def test_a_restart_begins_anew_but_for_the_schedule() -> None:
    def rate(count):
        return 0.1 * (count + 1)

    whole = walk(ok.adan(rate, restart_every=3))
    first = walk(ok.adan(rate), STEPS[:3])
    np.testing.assert_array_equal(whole[:3], first)
    later = walk(ok.adan(lambda count: rate(count + 3)), STEPS[3:])
    np.testing.assert_allclose(whole[3:] - whole[2], later - np.asarray(START), atol=1e-5)


def test_the_clip_takes_the_norm_of_the_whole_tree_and_a_traced_zero_is_no_clip() -> None:
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    tx = ok.adan(0.1, max_grad_norm=1.0)
    _, state = tx.update(grads, tx.init(params), params)
    kept = state[1].previous_gradient
    np.testing.assert_allclose([kept["a"][0], kept["b"][0]], [0.6, 0.8], rtol=1e-6)
    tx = ok.adan(0.1, max_grad_norm=jnp.zeros(()))
    _, state = tx.update(grads, tx.init(params), params)
    assert float(state[1].previous_gradient["b"][0]) == 4.0


def test_proximal_decay_never_turns_a_weight_round() -> None:
    params = jnp.array([1.0])
    tx = ok.apply_proximal_decay(10.0, 10.0)
    updates, _ = tx.update(jnp.zeros(1), tx.init(params), params)
    np.testing.assert_allclose(params + updates, [1 / 101], rtol=1e-4)


# -- adabelief --------------------------------------------------------------------------------


def test_plain_belief_is_optax_belief() -> None:
    ours, theirs = (
        ok.scale_by_belief(eps=1e-6, eps_root=1e-8),
        optax.scale_by_belief(0.9, 0.999, 1e-6, 1e-8),
    )
    np.testing.assert_allclose(walk(ours), walk(theirs), rtol=1e-5)
    ours, theirs = (
        ok.adabelief(0.1, eps=1e-8, rectify=False),
        optax.adabelief(0.1, eps=1e-8, eps_root=1e-8),
    )
    np.testing.assert_allclose(walk(ours), walk(theirs), rtol=1e-5)


def test_rectified_belief_is_momentum_until_step_six() -> None:
    path = walk(ok.adabelief(1.0))
    momentum = walk(optax.chain(optax.ema(0.9), optax.scale(-1.0)))
    np.testing.assert_allclose(path[:5], momentum[:5], rtol=1e-5, atol=1e-5)
    assert np.all(np.abs(path[5] - momentum[5]) > 1e-4)
    still = walk(ok.adabelief(1.0, degenerated_to_sgd=False))
    np.testing.assert_array_equal(still[:5], np.broadcast_to(np.asarray(START), (5, 3)))
    np.testing.assert_allclose(still[5] - still[4], path[5] - path[4], rtol=1e-3, atol=1e-5)


def test_forms_of_decay_without_a_gradient() -> None:
    zero = np.zeros((1, 3))
    for arguments, left in (
        ({}, 1 - 0.1 * 0.2),
        ({"fixed_decay": True}, 1 - 0.2),
        ({"fixed_decay": True, "learning_rate": 0.0}, 1 - 0.2),
        ({"weight_decouple": False}, 1 - 0.1 * 0.2),  # the first step is that of SGD
    ):
        tx = ok.adabelief(**{"learning_rate": 0.1, "weight_decay": 0.2, **arguments})
        np.testing.assert_allclose(walk(tx, zero)[0], START * left, rtol=1e-6)


def test_amsgrad_has_no_effect_with_rectification() -> None:
    np.testing.assert_array_equal(walk(ok.adabelief(0.1)), walk(ok.adabelief(0.1, amsgrad=True)))


# -- diffgrad ---------------------------------------------------------------------------------


def test_diffgrad_is_adam_with_friction() -> None:
    adam = ok.scale_by_adam(eps_form="before_bias_correction")
    for friction in ("sigmoid_abs", "sigmoid_signed", "wide"):
        chained = optax.chain(adam, ok.gradient_friction(friction))
        one = walk(ok.scale_by_diffgrad(friction=friction))
        np.testing.assert_allclose(walk(chained, extra=lambda g: {"grad": g}), one, rtol=1e-5)


def test_small_gradients_make_it_adam_at_half_the_rate() -> None:
    quiet = STEPS * 1e-6
    halved = optax.chain(
        ok.scale_by_adam(eps=1e-12, eps_form="before_bias_correction"), optax.scale(-0.05)
    )
    np.testing.assert_allclose(
        walk(ok.diffgrad(0.1, eps=1e-12), quiet), walk(halved, quiet), rtol=1e-4
    )
    # The normalized coefficient does not see the scale.
    loud, soft = (
        walk(ok.diffgrad(0.1, eps=0.0, friction="normalized"), STEPS * scale) for scale in (1, 1e-6)
    )
    np.testing.assert_allclose(loud, soft, rtol=1e-4)


def test_coupled_decay_is_part_of_the_stored_gradient() -> None:
    tx = ok.diffgrad(0.1, weight_decay=0.5)
    _, state = tx.update(jnp.ones(3), tx.init(START), START)
    np.testing.assert_array_equal(state[1].previous_gradient, 1 + 0.5 * START)
    tx = ok.diffgrad(0.1, weight_decay=0.5, decoupled=True)
    updates, state = tx.update(jnp.zeros(3), tx.init(START), START)
    np.testing.assert_allclose(updates, -0.05 * START, rtol=1e-6)


# -- speed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tx", "stored"),
    [
        (ok.adan(1e-3, weight_decay=0.1), 0),
        (ok.adan(1e-3, restart_every=4), 0),
        (ok.adabelief(1e-3, weight_decay=0.1), 0),
        (ok.adabelief(1e-3, rectify=False, amsgrad=True), 0),
        (ok.diffgrad(1e-3), 2),
        (ok.diffgrad(1e-3, weight_decay=0.1), 2),
    ],
)
def test_no_old_array_is_copied(tx, stored) -> None:
    """The old gradient is replaced in place, though others read it; the friction of one or two
    leaves is stored (CPU)."""
    params = {name: jnp.zeros((128, 128)) for name in "abcdef"}
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (stored + 0.1) * 4 * 128 * 128


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ok.adan(-1.0), "learning_rate must be >= 0, got -1"),
        (lambda: ok.adan(0.1, b3=1.0), "b3 must be >= 0 and < 1, got 1"),
        (lambda: ok.adan(0.1, max_grad_norm=-1.0), "max_grad_norm must be >= 0, got -1"),
        (lambda: ok.adan(0.1, restart_every=-2), "restart_every must be an integer >= 0, got -2"),
        (lambda: ok.adan(0.1, restart_every=2.5), "restart_every must be an integer"),  # type: ignore
        (lambda: ok.apply_proximal_decay(0.1, -1.0), "weight_decay must be >= 0, got -1"),
        (lambda: ok.adabelief(0.1, b2=0.0), "b2 must be > 0 and < 1, got 0"),
        (lambda: ok.scale_by_belief(eps_root=-1.0), "eps_root must be >= 0, got -1"),
        (lambda: ok.diffgrad(0.1, friction="5"), "friction must be one of 'sigmoid_abs'"),  # type: ignore
        (lambda: ok.gradient_friction("normalized"), "friction must be one of"),  # type: ignore
    ],
)
def test_bad_arguments_are_named(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_input_is_named() -> None:
    params = {"w": jnp.zeros((2, 3))}
    tx = ok.apply_proximal_decay(0.1, 0.1)
    with pytest.raises(ValueError, match="apply_proximal_decay needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"gradient leaf 'w' has shape \(1, 3\)"):
        tx.update({"w": jnp.zeros((1, 3))}, tx.init(params), params)
    tx = ok.gradient_friction()
    with pytest.raises(ValueError, match=r"grad leaf 'w' has shape \(1, 3\)"):
        tx.update(params, tx.init(params), grad={"w": jnp.zeros((1, 3))})
