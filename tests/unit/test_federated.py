"""Federated rounds on numbers a reader can check, and what they refuse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimkit import federated
from optimkit.federated import (
    fedavg_m,
    fedavg_m_vr,
    federated_averaging,
    federated_momentum,
    fedhyper,
    scaffold_m,
    server_direction_as_update,
)

ALGORITHMS = ("fedavg_m", "fedavg_m_vr", "scaffold_m", "scaffold_m_vr")


def pull(w: Any, target: Any) -> Any:
    """The gradient of 0.5 * (w - target)**2."""
    return jax.tree.map(lambda w: w - target.astype(w.dtype), w)


def targets(*of_clients: float, steps: int = 1) -> jax.Array:
    return jnp.repeat(jnp.array(of_clients)[:, None], steps, axis=1)


def make(algorithm: str = "fedavg_m", **changed: Any) -> federated.FederatedMethod:
    given: Any = {"local_learning_rate": 0.5, "server_learning_rate": 1.0, "local_steps": 1}
    return federated_momentum(pull, algorithm=algorithm, **{**given, **changed})  # type: ignore


def test_fedavg_is_beta_one_with_the_server_at_rate_times_steps() -> None:
    ours = make(beta=1.0, local_steps=3, local_learning_rate=0.1, server_learning_rate=0.1 * 3)
    plain = federated_averaging(pull, optax.sgd(0.1), local_steps=3)
    states = [method.init(jnp.zeros(()), 2) for method in (ours, plain)]
    for _ in range(2):
        batches, who = targets(1.0, 4.0, steps=3), jnp.array([0, 1])
        states = [m.round(s, batches, who)[0] for m, s in zip((ours, plain), states, strict=True)]
    np.testing.assert_allclose(states[0].params, states[1].params, rtol=1e-6)


def test_the_momentum_is_the_last_rounds_mean_direction() -> None:
    method = make(beta=0.5)
    state = method.init(jnp.zeros(()), 2)
    state, _ = method.round(state, targets(1.0, 3.0), jnp.array([0, 1]))
    assert float(state.direction) == -1.0  # half of the mean gradient -2
    state, metrics = method.round(state, targets(1.0, 3.0), jnp.array([0, 1]))
    assert float(state.direction) == -1.0  # half of -1, at 1, and half of the last -1
    assert float(state.params) == 2.0
    assert float(metrics["update_norm"]) == 1.0


def test_only_participants_renew_their_controls() -> None:
    method = make("scaffold_m", beta=1.0)
    state = method.init(jnp.zeros(()), 4)
    state, _ = method.round(state, targets(2.0, 6.0), jnp.array([1, 3]))
    assert state.client_controls.tolist() == [0, -2, 0, -6]
    assert float(state.server_control) == -2.0  # (-2 - 6) / 4


def test_option_ii_keeps_what_the_steps_added_up_to() -> None:
    mean, second = (make("scaffold_m", beta=1.0, control=c) for c in ("mean_gradient", "option_ii"))
    for method in (mean, second):  # without momentum the two are the same
        state = method.init(jnp.zeros(()), 2)
        for who in (0, 1, 0):
            state, _ = method.round(state, targets(2.0), jnp.array([who]))
        np.testing.assert_allclose(state.client_controls, [1.0, 0.0], atol=1e-6)
    with_momentum = make("scaffold_m", beta=0.5, control="option_ii")
    state = with_momentum.init(jnp.zeros(()), 1)
    state, _ = with_momentum.round(state, targets(2.0), jnp.array([0]))
    assert state.client_controls.tolist() == [-1.0]  # the direction, not the gradient -2


def test_controls_take_away_the_bias_that_local_steps_bring() -> None:
    """Clients 0.5 * a * (w - b)**2 with (a, b) = (1, 0) and (3, 4): the optimum is 3."""
    gap = {}
    for name, algorithm, beta in (
        ("FedAvg", "fedavg_m", 1.0),
        ("FedAvg-M", "fedavg_m", 0.1),
        ("SCAFFOLD-M", "scaffold_m", 0.1),
    ):
        method = federated_momentum(
            lambda w, ab: ab[0] * (w - ab[1]),
            algorithm=algorithm,
            local_learning_rate=0.1,
            server_learning_rate=0.3,
            beta=beta,
            local_steps=10,
        )
        batches = targets(1.0, 3.0, steps=10), targets(0.0, 4.0, steps=10)

        def one(state: Any, _: Any, method: Any = method, batches: Any = batches) -> Any:
            return method.round(state, batches, jnp.array([0, 1]))[0], None

        state, _ = jax.lax.scan(one, method.init(jnp.zeros(()), 2), length=400)
        gap[name] = abs(float(state.params) - 3)
    assert gap["SCAFFOLD-M"] < 1e-4 < gap["FedAvg-M"] < gap["FedAvg"] / 5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weight_zero_is_absence_and_a_broken_client_is_left_out(algorithm: str) -> None:
    method = make(algorithm, beta=0.5, local_steps=2)
    step = jax.jit(method.round)
    start = method.init(jnp.ones(()), 3)
    alone, _ = step(start, targets(2.0, steps=2), jnp.array([1]))
    batches, who = targets(2.0, 9.0, steps=2), jnp.array([1, 2])
    masked, _ = step(start, batches, who, jnp.array([1.0, 0.0]))
    broken, metrics = step(start, batches.at[1].set(jnp.nan), who)
    for state in (masked, broken):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, alone)
    assert (float(metrics["clients"]), float(metrics["refused"])) == (1.0, 1.0)
    nobody, metrics = step(start, batches, who, jnp.zeros(2))
    jax.tree.map(np.testing.assert_array_equal, nobody._replace(round=start.round), start)
    assert float(metrics["update_norm"]) == 0.0


def test_weights_are_shares_of_the_mean() -> None:
    method = make(beta=1.0)
    state = method.init(jnp.zeros(()), 2)
    state, _ = method.round(state, targets(1.0, 5.0), jnp.array([0, 1]), jnp.array([3.0, 1.0]))
    assert float(state.params) == 2.0


def test_state_keeps_its_types_and_low_precision_is_summed_in_f32() -> None:
    method = make("scaffold_m_vr", local_steps=2)
    params = {"a": jnp.zeros((), jnp.bfloat16), "b": jnp.zeros(2)}
    before = jax.eval_shape(lambda p: method.init(p, 3), params)
    after, _ = jax.eval_shape(
        method.round, before, targets(1.0, 2.0, steps=2), jnp.array([0, 1]), None
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), after
    )
    assert before.direction["a"].dtype == jnp.float32


def test_a_round_may_donate_its_state() -> None:
    method = make("fedavg_m_vr")
    params = jnp.ones(3)
    state = method.init(params, 1)
    jax.jit(method.round, donate_argnums=0)(state, targets(0.0), jnp.array([0]))
    assert params.tolist() == [1, 1, 1]


def test_schedules_count_rounds_and_aux_comes_back() -> None:
    method = federated_momentum(
        lambda w, b: (w - b, 10 * b),
        local_learning_rate=lambda r: 0.1 * r,
        server_learning_rate=lambda r: 1.0 * r,
        beta=1.0,
        local_steps=2,
    )
    state, metrics = method.round(
        method.init(jnp.zeros(()), 1), targets(3.0, steps=2), jnp.array([0])
    )
    assert float(state.params) == 0.0  # rate 0 in round 0
    assert metrics["aux"].tolist() == [[30, 30]]


def test_the_server_may_run_any_optimizer() -> None:
    method = server_direction_as_update(optax.sgd(1.0, momentum=0.5))(make(beta=1.0))
    state = method.init(jnp.zeros(()), 1)
    for _ in range(2):
        state, _ = method.round(state, targets(1.0), jnp.array([0]))
    assert float(state.params) == 1.5  # 1, then 0 + 0.5 * 1
    broken, _ = method.round(state, targets(jnp.nan), jnp.array([0]))
    jax.tree.map(np.testing.assert_array_equal, broken.inner_state, state.inner_state)


@pytest.mark.parametrize(
    "variant", ["global", "global_momentum", "server_local", "client_local", "full"]
)
def test_fedhyper_takes_longer_steps_while_they_agree(variant: Any) -> None:
    method = fedhyper(
        pull, variant=variant, local_learning_rate=0.1, local_steps=2, clients_per_round=2,
        momentum=0.0,
    )  # fmt: skip
    plain = federated_averaging(pull, optax.sgd(0.1), local_steps=2)
    reached = []
    for one in (method, plain):
        state, step = one.init(jnp.zeros(()), 2), jax.jit(one.round)
        for _ in range(3):
            state, _ = step(state, targets(1.0, 3.0, steps=2), jnp.array([0, 1]))
        reached.append(float(state.params))
    assert reached[1] < reached[0] < 2.0


def test_bad_input() -> None:
    method = make("scaffold_m", local_steps=2)
    start = method.init(jnp.zeros(2), 3)
    batches, who = targets(1.0, 2.0, steps=2), jnp.array([0, 1])
    for call, message in (
        (lambda: method.round(start, batches, jnp.array([], int)), "participants is empty"),
        (lambda: method.round(start, batches, []), "participants is empty"),
        (lambda: method.round(start, batches, jnp.array([0.0, 1.0])), "vector of client indices"),
        (lambda: method.round(start, batches, jnp.array([0, 3])), "must be >= 0 and < 3"),
        (lambda: method.round(start, batches, jnp.array([1, 1])), "holds a client twice"),
        (lambda: method.round(start, {}, who), "batches is empty"),
        (lambda: method.round(start, {"x": batches[:, :1]}, who), r"'x' has shape \(2, 1\), but"),
        (lambda: method.round(start, batches, who, jnp.ones(3)), "one weight a client"),
        (lambda: method.round(start, batches, who, jnp.array([1, -1])), "weights must be >= 0"),
        (lambda: method.init(jnp.zeros(2), 0), "num_clients must be an integer >= 1"),
        (lambda: make(beta=0.0), "beta must be > 0 and <= 1"),
        (lambda: make("fedprox"), "algorithm must be one of 'fedavg_m'"),
        (lambda: make(control="option_i"), "control must be one of"),
        (lambda: make(local_steps=0), "local_steps must be an integer >= 1"),
        (lambda: make(mesh=jax.make_mesh((1,), ("x",))), "client_axis must be one of"),
        (lambda: federated_averaging(pull, optax.sgd, local_steps=1), "client must be"),
        (lambda: fedavg_m_vr(pull, local_learning_rate=-1, server_learning_rate=1, local_steps=1),
         "local_learning_rate must be >= 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    wrong = fedavg_m(
        lambda w, b: {"w": w}, local_learning_rate=1, server_learning_rate=1, local_steps=2
    )
    with pytest.raises(ValueError, match="gradient and the parameters are different trees"):
        wrong.round(wrong.init(jnp.zeros(2), 2), batches, who)
    with pytest.raises(TypeError, match=r"parameter leaf .* has dtype int32"):
        method.init(jnp.zeros(2, int), 2)


def test_one_client_alone_is_plain_sgd() -> None:
    method = scaffold_m(
        pull, local_learning_rate=0.7, server_learning_rate=0.25, beta=1.0, local_steps=1
    )
    state = method.init(jnp.zeros(()), 1)
    for _ in range(2):
        state, _ = method.round(state, targets(1.0), jnp.array([0]))
    np.testing.assert_allclose(state.params, 1 - 0.75**2, rtol=1e-6)
