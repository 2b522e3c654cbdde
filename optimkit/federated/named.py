"""The four algorithms of ``federated_momentum`` by name, and a server with any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.federated.clients import FederatedMethod, GradFn
from optimkit.federated.momentum import Control, FedState, federated_momentum
from optimkit.leaves import narrow_like, widen
from optimkit.numerics import tree_norm
from optimkit.protocols import Array, PyTree, ScalarOrSchedule


def fedavg_m(
    grad_fn: GradFn,
    *,
    local_learning_rate: ScalarOrSchedule,
    server_learning_rate: ScalarOrSchedule,
    beta: Any = 0.1,
    local_steps: int,
    mesh: jax.sharding.Mesh | None = None,
    client_axis: str = "clients",
) -> FederatedMethod:
    r"""FedAvg with the last round's direction in every local step: :math:`\beta G + (1-\beta) g`.

    Clients keep nothing between rounds. Arguments and return value as in ``federated_momentum``.

    >>> method = fedavg_m(lambda w, b: w - b, local_learning_rate=0.1, server_learning_rate=1.0,
    ...                   beta=0.5, local_steps=1)
    >>> state, _ = method.round(method.init(jnp.zeros(()), 1), jnp.ones((1, 1)), jnp.array([0]))
    >>> float(state.params)  # beta of the gradient -1
    0.5
    """
    return federated_momentum(
        grad_fn,
        algorithm="fedavg_m",
        local_learning_rate=local_learning_rate,
        server_learning_rate=server_learning_rate,
        beta=beta,
        local_steps=local_steps,
        mesh=mesh,
        client_axis=client_axis,
    )


def fedavg_m_vr(
    grad_fn: GradFn,
    *,
    local_learning_rate: ScalarOrSchedule,
    server_learning_rate: ScalarOrSchedule,
    beta: Any = 0.1,
    local_steps: int,
    mesh: jax.sharding.Mesh | None = None,
    client_axis: str = "clients",
) -> FederatedMethod:
    r"""FedAvg-M with less variance: :math:`G + (1-\beta)(g - P)`, two gradients a local step.

    P is the gradient of the same batch at the last round's parameters, which the server hands out
    as well. Arguments and return value as in ``federated_momentum``.
    """
    return federated_momentum(
        grad_fn,
        algorithm="fedavg_m_vr",
        local_learning_rate=local_learning_rate,
        server_learning_rate=server_learning_rate,
        beta=beta,
        local_steps=local_steps,
        mesh=mesh,
        client_axis=client_axis,
    )


def scaffold_m(
    grad_fn: GradFn,
    *,
    local_learning_rate: ScalarOrSchedule,
    server_learning_rate: ScalarOrSchedule,
    beta: Any = 0.1,
    local_steps: int,
    control: Control = "mean_gradient",
    mesh: jax.sharding.Mesh | None = None,
    client_axis: str = "clients",
) -> FederatedMethod:
    r"""SCAFFOLD with momentum: :math:`\beta (G - c_i + c) + (1-\beta) g`.

    The controls take out how far a client's data is from the mean; where few clients take part in a
    round, that helps more than momentum alone. Arguments and return value as in
    ``federated_momentum``.
    """
    return federated_momentum(
        grad_fn,
        algorithm="scaffold_m",
        local_learning_rate=local_learning_rate,
        server_learning_rate=server_learning_rate,
        beta=beta,
        local_steps=local_steps,
        control=control,
        mesh=mesh,
        client_axis=client_axis,
    )


def scaffold_m_vr(
    grad_fn: GradFn,
    *,
    local_learning_rate: ScalarOrSchedule,
    server_learning_rate: ScalarOrSchedule,
    beta: Any = 0.1,
    local_steps: int,
    control: Control = "mean_gradient",
    mesh: jax.sharding.Mesh | None = None,
    client_axis: str = "clients",
) -> FederatedMethod:
    r"""SCAFFOLD-M with less variance: :math:`G - \beta (c_i - c) + (1-\beta)(g - P)`.

    P is the gradient of the same batch at the last round's parameters. Arguments and return value
    as in ``federated_momentum``.
    """
    return federated_momentum(
        grad_fn,
        algorithm="scaffold_m_vr",
        local_learning_rate=local_learning_rate,
        server_learning_rate=server_learning_rate,
        beta=beta,
        local_steps=local_steps,
        control=control,
        mesh=mesh,
        client_axis=client_axis,
    )


class ServerOptimizedState(NamedTuple):
    """``clients``: the method's own state. ``inner_state``: the server optimizer's."""

    clients: FedState
    inner_state: PyTree

    @property
    def params(self) -> PyTree:
        """The server's parameters."""
        return self.clients.params


def server_direction_as_update(
    inner: optax.GradientTransformation,
) -> Callable[[FederatedMethod], FederatedMethod]:
    """Gives the mean direction of a round to any optimizer in place of the server's plain step.

    Args:
      inner: the server's optimizer, with its rate; it sees the direction as a gradient.

    Returns:
      A function from a ``federated_momentum`` method to another one; the server learning rate of
      the first has no effect then.

    An addition of ours: the paper's server makes plain steps. A round without a usable client
    leaves the server's optimizer as it is.

    >>> method = fedavg_m(lambda w, b: w - b, local_learning_rate=0.1, server_learning_rate=0.0,
    ...                   beta=1.0, local_steps=1)
    >>> method = server_direction_as_update(optax.sgd(0.25))(method)
    >>> state, _ = method.round(method.init(jnp.zeros(()), 1), jnp.ones((1, 1)), jnp.array([0]))
    >>> float(state.params)
    0.25
    """
    optimizer = optax.with_extra_args_support(inner)

    def wrap(method: FederatedMethod) -> FederatedMethod:
        def init(params: PyTree, num_clients: int) -> ServerOptimizedState:
            clients = method.init(params, num_clients)
            return ServerOptimizedState(clients, optimizer.init(clients.params))

        def round(
            state: ServerOptimizedState,
            batches: PyTree,
            participants: Array,
            weights: Array | None = None,
        ) -> tuple[ServerOptimizedState, dict[str, Any]]:
            clients, metrics = method.round(state.clients, batches, participants, weights)
            before = state.clients.params
            direction = narrow_like(clients.direction, before)
            change, inner_state = optimizer.update(direction, state.inner_state, before)
            some = metrics["clients"] > 0
            change = jax.tree.map(lambda u: jnp.where(some, u, 0), change)
            inner_state = jax.tree.map(
                lambda new, old: jnp.where(some, new, old), inner_state, state.inner_state
            )
            params = optax.apply_updates(before, change)
            metrics = {**metrics, "update_norm": tree_norm(widen(change)).astype(jnp.float32)}
            return ServerOptimizedState(clients._replace(params=params), inner_state), metrics

        return FederatedMethod(init, round, method.client_update)

    return wrap
