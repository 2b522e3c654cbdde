"""Rates and momentum that are measured on gradients: SGD-SaI, SNR, drift, Adaptive Memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.diagnostics import principal_flow_coefficient
from optimkit.gradients import (
    drift_coefficients,
    gradient_snr,
    hessian_gradient,
    optimal_baseline,
    two_player_drift_gradients,
)
from optimkit.transforms import adaptive_beta, init_snr


def run(tx, gradients, params=None, **extra):
    """Updates after each gradient, at the same parameters, and the last state."""
    params = jnp.zeros(gradients[0].shape) if params is None else params
    step, state, out = jax.jit(lambda g, s: tx.update(g, s, params, **extra)), tx.init(params), []
    for gradient in gradients:
        updates, state = step(gradient, state)
        out.append(updates)
    return out, state


# -- SGD-SaI ----------------------------------------------------------------------------------


def test_the_factor_is_the_root_of_the_size_for_entries_of_mean_zero() -> None:
    ratios = init_snr({"w": jnp.array([[2.0, -2.0], [2.0, -2.0]]), "one": jnp.array(3e-9)})
    np.testing.assert_allclose(ratios["w"], np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(ratios["one"], 0.3, rtol=1e-6)  # no deviation: norm / eps
    largest = init_snr({"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}, normalize=True)
    assert (float(largest["a"]), float(largest["b"])) == (1.0, 0.0)


def test_a_zero_first_gradient_freezes_or_waits() -> None:
    gradients = [jnp.zeros(2), jnp.array([3.0, 4.0]), jnp.array([1.0, 1.0])]
    frozen, _ = run(ok.scale_by_init_snr(), gradients)
    np.testing.assert_array_equal(frozen[2], [0.0, 0.0])
    waited, state = run(ok.scale_by_init_snr(wait_for_nonzero=True), gradients)
    np.testing.assert_allclose(waited[2], np.full(2, 5 / np.sqrt(0.5)), rtol=1e-6)
    assert bool(state.seen)


def test_layers_of_a_stacked_leaf_are_measured_apart() -> None:
    stack = {"layers": {"kernel": jnp.array([[3.0, 4.0], [1.0, -1.0]])}}
    tx = ok.scale_by_init_snr(stacked_leaves=["layers/*"])
    _, state = tx.update(stack, tx.init(stack))
    expected = [[5 / np.sqrt(0.5)], [1.0]]
    np.testing.assert_allclose(state.factor["layers"]["kernel"], expected, rtol=1e-6)


def test_the_cap_and_the_raw_probe() -> None:
    capped, _ = run(ok.scale_by_init_snr(max_factor=2.0), [jnp.array([3.0, 4.0])])
    np.testing.assert_allclose(capped[0], [6.0, 8.0])
    tx = ok.scale_by_init_snr(probe="raw")
    raw, _ = run(tx, [jnp.ones(2)], grad=jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(raw[0], np.full(2, 5 / np.sqrt(0.5)), rtol=1e-6)
    with pytest.raises(ValueError, match='probe="raw" needs the gradient'):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    masked = optax.masked(tx, {"a": True, "b": False})
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(3)}
    updates, _ = masked.update(tree, masked.init(tree), grad=tree)
    np.testing.assert_array_equal(updates["b"], tree["b"])
    with pytest.raises(ValueError, match=r"grad leaf 'a' has shape \(3,\)"):
        tx.update({"a": jnp.ones(2)}, tx.init({"a": jnp.ones(2)}), grad={"a": jnp.ones(3)})


def test_sgd_sai_starts_from_the_first_gradient() -> None:
    tx = ok.sgd_sai(0.1, momentum=0.5, weight_decay=0.5)
    out, _ = run(tx, [jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0])], params=jnp.ones(2))
    factor = 5 / np.sqrt(0.5)
    np.testing.assert_allclose(out[0], -0.1 * (factor * np.array([3.0, 4.0]) + 0.5), rtol=1e-5)
    np.testing.assert_allclose(out[1], -0.1 * (factor * np.array([2.0, 2.0]) + 0.5), rtol=1e-5)


# -- Adaptive Memory --------------------------------------------------------------------------


def test_beta_of_the_two_planes() -> None:
    g, d = jnp.array([0.0, 2.0]), jnp.array([1.0, 0.0])
    # <g + lam d, g - d> / |g - d|^2 = (4 - lam) / 5
    np.testing.assert_allclose(adaptive_beta(g, d, 1.0), 0.6, rtol=1e-6)
    np.testing.assert_allclose(adaptive_beta(g, d, 1.0, gap=-0.5), 0.4, rtol=1e-6)
    weights = jnp.array([1.0, 0.5])  # (2 - 1) / (2 + 1)
    beta = adaptive_beta(g, d, 1.0, inv_preconditioner=weights)
    np.testing.assert_allclose(beta, 1 / 3, rtol=1e-6)
    assert float(adaptive_beta(g, g, 0.1)) == 0.0


def test_opposite_gradients_cancel_and_the_next_one_starts_anew() -> None:
    gradients = [jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0]), jnp.array([0.0, 3.0])]
    out, state = run(ok.scale_by_adaptive_memory(0.1, "zero"), gradients)
    np.testing.assert_array_equal(out[1], [0.0, 0.0])
    np.testing.assert_array_equal(out[2], [0.0, 3.0])
    assert float(state.beta) == 0.0
    anchored, state = run(ok.scale_by_adaptive_memory(0.1), gradients[:2])
    np.testing.assert_allclose(anchored[1], [(0.1 - 1) / 1.1, 0.0], rtol=1e-6)  # beta is 0


def test_a_spike_is_ignored() -> None:
    out, state = run(
        ok.scale_by_adaptive_memory(), [jnp.array([1.0, 0.0]), jnp.array([1e15, 1e15])]
    )
    np.testing.assert_allclose(out[1], [1.0, 0.0], atol=1e-6)
    assert float(state.beta) == 1.0


def test_losses_raise_and_lower_the_plane_of_the_memory() -> None:
    tx = ok.scale_by_adaptive_memory(0.0, "value", learning_rate=0.5)
    params = jnp.zeros(2)
    _, state = tx.update(jnp.array([2.0, 0.0]), tx.init(params), params, value=3.0)
    assert float(state.plane_value) == 1.0  # 3 - 0.5 * |(2, 0)|^2
    # <g, g - d> = 4, (f_hat - f) / rate = (1 - 2) / 0.5, |g - d|^2 = 8
    _, state = tx.update(jnp.array([0.0, 2.0]), state, params, value=2.0)
    assert float(state.beta) == 0.25
    with pytest.raises(ValueError, match="needs the loss"):
        tx.update(jnp.ones(2), state, params)
    with pytest.raises(ValueError, match="needs learning_rate"):
        ok.scale_by_adaptive_memory(plane_gap="value")
    with pytest.raises(ValueError, match="needs scope='global'"):
        ok.am_sgd(0.1, plane_gap="value", scope="leaf")
    with pytest.raises(ValueError, match="plane_gap must be one of"):
        ok.am_sgd(0.1, plane_gap="one")
    with pytest.raises(ValueError, match="lam must be >= 0, got -1"):
        ok.am_adamw(0.1, lam=-1)


# -- signal and noise -------------------------------------------------------------------------


def test_equal_weights_give_the_mean_of_the_others() -> None:
    rewards, weights = jnp.array([1.0, 2.0, 6.0]), jnp.full(3, 0.7)
    assert float(optimal_baseline(rewards, weights, leave_one_out=False)) == pytest.approx(3.0)
    np.testing.assert_allclose(optimal_baseline(rewards, weights), [4.0, 3.5, 1.5], rtol=1e-6)
    assert optimal_baseline(jnp.ones((1, 2)), jnp.ones((1, 2)), axis=0).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match=r"rewards have shape \(3,\), score_sq_norms \(2,\)"):
        optimal_baseline(rewards, jnp.ones(2))


def test_a_dominant_weight_loses_no_digits() -> None:
    rewards, weights = jnp.array([1.0, 5.0, 7.0]), jnp.array([1e9, 1.0, 1.0])
    assert float(optimal_baseline(rewards, weights)[0]) == 6.0


def test_gradients_without_noise_and_without_signal() -> None:
    same = gradient_snr({"w": jnp.ones((4, 3))})
    assert (float(same.noise), float(same.snr), float(same.scale)) == (0.0, float("inf"), 1.0)
    nothing = gradient_snr(jnp.zeros((4, 3)))
    assert (float(nothing.signal), float(nothing.scale)) == (0.0, 1.0)
    noise = gradient_snr(jnp.array([[1.0], [-1.0]]))
    assert (float(noise.signal), float(noise.scale)) == (0.0, 0.0)
    with pytest.raises(ValueError, match="same leading axis of at least two"):
        gradient_snr({"a": jnp.ones((1, 3))})


def test_a_given_scale_takes_the_place_of_the_estimate() -> None:
    tx = ok.scale_by_snr(decay=None, min_scale=0.1)
    out, state = run(tx, [jnp.array([2.0])], snr_scale=0.25)
    assert out[0].tolist() == [0.5]
    assert state.mu is None
    assert run(tx, [jnp.array([2.0])], snr_scale=0.0)[0][0].tolist() == [pytest.approx(0.2)]
    with pytest.raises(ValueError, match="decay=None needs the scale"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    out, _ = run(ok.snr_learning_rate(optax.sgd(1.0)), [jnp.array([2.0])], snr_scale=0.25)
    assert out[0].tolist() == [-0.5]


def test_steady_gradients_keep_the_rate_and_a_spike_lowers_it() -> None:
    steady = [jnp.ones(2)] * 5
    out, _ = run(ok.snr_sgd(1.0), [*steady, jnp.full(2, 1e15), jnp.ones(2)])
    np.testing.assert_allclose(out[4], [-1.0, -1.0], rtol=1e-5)
    assert abs(float(out[6][0])) < 0.5
    beyond, _ = run(ok.snr_sgd(1.0), [*steady, jnp.full(2, 1e25), jnp.ones(2)])
    assert np.all(np.isfinite(beyond[6]))


def test_without_debias_it_is_the_squared_mean_over_the_mean_square() -> None:
    tx = ok.scale_by_snr(decay=0.5, debias=False)
    _, state = run(tx, [jnp.array([1.0]), jnp.array([0.5])])
    np.testing.assert_allclose(state.factor, (4 / 9) / (1 / 2), rtol=1e-6)  # (2/3)^2 over 1/2


# -- drift ------------------------------------------------------------------------------------


def quadratic(w):
    return jnp.sum(jnp.array([1.0, 4.0]) * w**2) / 2


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_hessian_times_gradient(method: str) -> None:
    w = jnp.array([2.0, 1.0])
    got = hessian_gradient(quadratic, w, jax.grad(quadratic)(w), method)
    np.testing.assert_allclose(got, [2.0, 16.0], rtol=1e-3)
    np.testing.assert_array_equal(hessian_gradient(quadratic, 0 * w, 0 * w, method), 0 * w)
    with pytest.raises(ValueError, match="method must be one of"):
        hessian_gradient(quadratic, w, w, "guess")


def test_the_interval_is_open_at_its_start() -> None:
    tx = ok.drift_adjusted_sgd(start=1, stop=3, static_learning_rate=0.25)
    params, rates = jnp.array([0.0, 1.0]), []
    state = tx.init(params)
    for _ in range(4):
        grads = jax.grad(quadratic)(params)
        _, state = tx.update(grads, state, params, value_fn=quadratic)
        rates.append(float(optax.tree.get(state, "learning_rate")))
    assert rates == [0.25, 0.25, 0.5, 0.25]  # two over the curvature of 4, at count 2 alone


def test_rates_at_the_edges() -> None:
    flat, _ = run(ok.scale_by_drift(), [jnp.ones(2)], hg=jnp.zeros(2))
    assert flat[0].tolist() == [5.0, 5.0]
    still, state = run(ok.scale_by_drift(), [jnp.zeros(2)], hg=jnp.zeros(2))
    assert (still[0].tolist(), float(state.learning_rate)) == ([0.0, 0.0], 5.0)
    root, _ = run(ok.scale_by_drift(0.5), [jnp.ones(1)], hg=jnp.array([16.0]))
    assert root[0].tolist() == [0.5]
    plain, _ = run(ok.scale_by_drift(0.0), [jnp.ones(1)], hg=jnp.array([16.0]))
    np.testing.assert_allclose(plain[0], [0.1])
    with pytest.raises(ValueError, match=r"update\(\.\.\., hg=tree\) or update"):
        run(ok.scale_by_drift(), [jnp.ones(2)])
    tx = ok.scale_by_drift()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value_fn=quadratic)
    with pytest.raises(ValueError, match="start must be an integer >= 0"):
        ok.drift_adjusted_sgd(start=-1)


def test_principal_flow() -> None:
    got = principal_flow_coefficient(jnp.array([0.0, 1e-6, 0.5, 1.0, 3.0, -1.0]))
    real = [-1.0, -1.0000005, -2 * np.log(2), -100.0, np.log(2) / 3, -np.log(2)]
    np.testing.assert_allclose(np.real(got), real, rtol=1e-6)
    np.testing.assert_allclose(np.imag(got), [0, 0, 0, 0, np.pi / 3, 0], rtol=1e-6)


def spiral(x, y):
    return x * y


def counter_spiral(x, y):
    return -x * y


@pytest.mark.parametrize("simultaneous", [True, False])
def test_a_cancelled_coupling_does_not_spiral_out(simultaneous: bool) -> None:
    def distance(multiplier: float) -> float:
        def gradients(x, y):
            return two_player_drift_gradients(
                spiral,
                counter_spiral,
                x,
                y,
                learning_rates=(0.3, 0.3),
                simultaneous=simultaneous,
                other_dot_prod=multiplier,
            )

        @jax.jit
        def turn(x, y):
            new = x - 0.3 * gradients(x, y)[0]
            return new, y - 0.3 * gradients(x if simultaneous else new, y)[1]

        x, y = jnp.float32(1.0), jnp.float32(0.0)
        for _ in range(20):
            x, y = turn(x, y)
        return float(jnp.hypot(x, y))

    assert distance(-1.0) < 1.03
    if simultaneous:
        assert distance(0.0) > 2.0


def test_coefficients_of_the_two_readings() -> None:
    paper = drift_coefficients((0.2, 0.6), simultaneous=False, num_updates=(2, 1))
    np.testing.assert_allclose(paper, [[0.05, 0.1], [0.3, 0.1]], rtol=1e-6)
    joint = {"coefficients": "joint_flow"}
    np.testing.assert_allclose(drift_coefficients((0.2, 0.6), **joint), [[0.1, 0.3], [0.3, 0.1]])
    second = drift_coefficients((0.2, 0.6), simultaneous=False, first_player="second", **joint)
    np.testing.assert_allclose(second, [[0.1, -0.3], [0.3, 0.1]])
    with pytest.raises(ValueError, match="first_player must be one of"):
        drift_coefficients((0.1, 0.1), first_player="disc")


def test_the_joint_flow_is_a_whole_order_more_exact_for_unequal_rates() -> None:
    def loss_1(x, y):
        return jnp.sum(jnp.sin(x) * y) + jnp.sum(x**2 * y**2) / 4

    def loss_2(x, y):
        return jnp.sum(x * jnp.cos(y)) - jnp.sum(x**3 * y) / 6

    def flow(x, y, rates):  # the joint flow over one unit of time, in small steps
        def step(carry, _):
            x, y = carry
            return (
                x - rates[0] / 400 * jax.grad(loss_1)(x, y),
                y - rates[1] / 400 * jax.grad(loss_2, argnums=1)(x, y),
            ), None

        return jax.lax.scan(step, (x, y), None, length=400)[0]

    def error(rate: float, coefficients: str) -> float:
        x, y, rates = jnp.array([0.7]), jnp.array([-0.4]), (rate, 3 * rate)
        g1, g2 = two_player_drift_gradients(
            loss_1, loss_2, x, y, learning_rates=rates, self_norm=-1.0, coefficients=coefficients
        )
        exact = jax.jit(flow, static_argnums=2)(x, y, rates)
        got = (x - rates[0] * g1, y - rates[1] * g2)
        return float(sum(jnp.sum(jnp.abs(a - b)) for a, b in zip(got, exact, strict=True)))

    with jax.enable_x64(True):
        joint, paper = error(0.04, "joint_flow"), error(0.04, "paper")
    assert joint < paper / 5
