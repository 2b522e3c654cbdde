"""Rates that follow the product of successive steps: hypergradient descent and FedHyper."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.transforms import fedhyper_server_local


def rates(tx, gradients):
    state, found = tx.init(jnp.zeros(1)), []
    for g in gradients:
        _, state = tx.update(jnp.array([g]), state, jnp.zeros(1))
        found.append(float(ok.get_learning_rate(state)))
    return found


def test_the_rate_follows_the_product():
    # products 0, 2 * 3, 3 * -4
    tx = ok.hypergradient(optax.identity(), 0.5, hyper_lr=0.1)
    np.testing.assert_allclose(rates(tx, [2.0, 3.0, -4.0]), [0.5, 1.1, -0.1], rtol=1e-6)


def test_bounds_hold():
    tx = ok.hypergradient(optax.identity(), 0.5, hyper_lr=0.1, min_lr=0.0, max_lr=1.0)
    np.testing.assert_allclose(rates(tx, [2.0, 3.0, -4.0, 1e15]), [0.5, 1.0, 0.0, 0.0], atol=1e-6)


def test_the_multiplicative_form_does_not_see_the_scale():
    tx = ok.hypergradient(optax.identity(), 0.5, hyper_lr=0.1, multiplicative=True)
    expected = [0.5, 0.55, 0.495]  # cosines 0, 1, -1
    for scale in (1.0, 1e6):
        np.testing.assert_allclose(
            rates(tx, [2.0 * scale, 3.0 * scale, -4.0 * scale]), expected, rtol=1e-6
        )


def test_a_zero_gradient_leaves_the_rate():
    assert rates(ok.sgd_hd(0.25), [0.0, 0.0, 1.0]) == [0.25, 0.25, 0.25]


def test_the_rate_is_found_beside_an_injected_one():
    tx = ok.inject_hyperparams(ok.adam_hd)(learning_rate=0.5)
    assert float(ok.get_learning_rate(optax.chain(optax.clip(1.0), tx).init(jnp.ones(2)))) == 0.5


def test_fedhyper_global_is_clipped_and_first_round_is_plain():
    tx = ok.fedhyper_global(max_rate=1.5)
    state = tx.init(jnp.zeros(1))
    found = []
    for delta in (2.0, 3.0, -1.0):
        update, state = tx.update(jnp.array([delta]), state)
        found.append(float(update[0]))
    # products 6, clipped to 0.5, then 0.5 - 3, clipped to -0.8
    np.testing.assert_allclose(found, [2.0, 4.5, -0.2], rtol=1e-5)


def test_fedhyper_server_local_bounds_the_rate_and_not_the_sum():
    init, update = fedhyper_server_local(0.01, max_lr=0.02)
    state = init(jnp.zeros(1))
    found = []
    for delta in (2.0, 3.0, -1.8):
        rate, state = update(jnp.array([delta]), state)
        found.append(float(rate))
    # sums 0, 6, 6 - 5.4
    np.testing.assert_allclose(found, [0.01, 0.02, 0.016], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ok.sgd_hd(0.1, nesterov=True), r"momentum \(with nesterov=True\) must be > 0"),
        (
            lambda: ok.sgd_hd(0.1, nesterov=True, momentum=0.9, dampening=0.1),
            r"dampening \(with nesterov=True\) must be <= 0",
        ),
        (lambda: ok.sgd_hd(0.1, momentum=1.5), "momentum must be >= 0 and <= 1"),
        (lambda: ok.adam_hd(-0.1), "learning_rate must be >= 0"),
        (lambda: ok.adam_hd(hyper_lr=-1.0), "hyper_lr must be >= 0"),
        (
            lambda: ok.hypergradient(optax.identity(), 0.1, hyper_lr=0.1, min_lr=0.2),
            "learning_rate - min_lr must be >= 0",
        ),
        (
            lambda: ok.hypergradient(optax.identity(), 0.1, hyper_lr=0.1, max_lr=0.05),
            "max_lr - learning_rate must be >= 0",
        ),
        (lambda: ok.fedhyper_global(min_rate=2.0), "init_rate - min_rate must be >= 0"),
        (lambda: fedhyper_server_local(0.1, min_lr=1.0), "max_lr - min_lr must be >= 0"),
        (
            lambda: ok.scale_by_fedhyper_client(global_weight=0.1, steps_per_epoch=0),
            "steps_per_epoch must be an integer >= 1",
        ),
        (lambda: ok.get_learning_rate(()), "opt_state holds no states with a learning_rate"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_is_refused():
    with pytest.raises(TypeError, match="learning_rate must be a number, the first rate"):
        ok.sgd_hd(optax.constant_schedule(0.1))


def test_the_client_needs_the_global_update():
    tx = ok.fedhyper_client_local(0.1, global_weight=0.1, steps_per_epoch=2)
    w = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="needs the extra argument global_update"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="global_update leaf 'w' has shape"):
        tx.update(w, tx.init(w), w, global_update={"w": jnp.ones((1, 2))})
