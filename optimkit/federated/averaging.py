"""Federated averaging with any optimizer on the clients and on the server; FedHyper's forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.federated.clients import (
    FederatedMethod,
    GradFn,
    check_mesh,
    check_round,
    copied,
    gather,
    gradient_at,
)
from optimkit.federated.momentum import round_metrics
from optimkit.leaves import narrow_like, widen, zero_count, zeros_like
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    hyperparameter_dtype,
    next_count,
)
from optimkit.optimizers.fedhyper import fedhyper_client_local
from optimkit.protocols import Array, PyTree
from optimkit.transforms.fedhyper import (
    RateController,
    fedhyper_global,
    fedhyper_server_local,
)

ClientOptimizer = optax.GradientTransformation | Callable[[Array], optax.GradientTransformation]


class FedAvgState(NamedTuple):
    """What the server keeps.

    ``params``. ``global_update``: their last change, zero at first. ``server_state``: of the
    server's optimizer. ``rate_state``: of the rate controller, or None. ``learning_rate``: the
    clients' rate in the next round, or None. ``round``: int32.
    """

    params: PyTree
    global_update: PyTree
    server_state: PyTree
    rate_state: PyTree
    learning_rate: Array | None
    round: Array


def federated_averaging(
    grad_fn: GradFn,
    client: ClientOptimizer,
    server: optax.GradientTransformation | None = None,
    *,
    local_steps: int,
    rate_controller: RateController | None = None,
    init_rate: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    client_axis: str = "clients",
) -> FederatedMethod:
    r"""FedAvg: each client trains from the server's parameters, the server takes the mean change.

    .. math:: D_r = \operatorname{mean}_i (y_i - x^r), \qquad x^{r+1} = x^r + s(D_r)

    Args:
      grad_fn: ``(params, batch) -> gradient`` or ``-> (gradient, aux)``.
      client: the optimizer of the local steps, begun anew by every client and round. It gets the
        extra argument ``global_update``, the last change of the server's parameters. With a
        ``rate_controller``: a function from the rate to the optimizer.
      server: s, a transformation of the mean change whose output is added; None adds it as it is.
        An optimizer that descends gradients needs ``optax.chain(optax.scale(-1), ...)``.
      local_steps: steps of a client in a round, >= 1.
      rate_controller: sets the clients' rate of the next round from the mean change.
      init_rate: that rate in the first round.
      mesh: as in ``federated_momentum``.
      client_axis: as in ``federated_momentum``.

    Returns:
      A ``FederatedMethod``; its state has ``params``. ``client_update(params, global_update,
      batches, learning_rate=None)`` gives one client's change.

    Raises:
      ValueError: if an argument is out of range; from ``round``, if it has no participants or its
        arrays do not fit.

    A client whose result is not finite counts for nothing in its round and is reported; a round
    without any usable client leaves everything as it is.

    >>> method = federated_averaging(lambda w, b: w - b, optax.sgd(1.0), local_steps=1)
    >>> state = method.init(jnp.zeros(()), num_clients=2)
    >>> state, _ = method.round(state, jnp.array([[1.0], [3.0]]), jnp.array([0, 1]))
    >>> float(state.params)
    2.0

    Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", AISTATS 2017, arXiv 1602.05629.
    """
    check_count(least=1, local_steps=local_steps)
    check_mesh(mesh, client_axis)
    # Optax's transformations are tuples of functions, never functions.
    if callable(client) != (rate_controller is not None) or (init_rate is None) != (
        rate_controller is None
    ):
        raise ValueError(
            "client must be an optimizer, or with rate_controller and init_rate a function from "
            "the rate to an optimizer"
        )
    check_range(init_rate=init_rate, gt=0)
    apply = optax.with_extra_args_support(server or optax.identity())

    def local(shared: Any, batches: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        like, global_update, rate = shared
        made: Any = client(rate) if callable(client) else client
        tx, start = optax.with_extra_args_support(made), widen(like)

        def step(carry: Any, batch: Any) -> Any:
            y, state = carry
            gradient, aux = gradient_at(grad_fn, y, like, batch)
            updates, state = tx.update(gradient, state, y, global_update=global_update)
            return (optax.apply_updates(y, updates), state), aux

        (y, _), aux = jax.lax.scan(step, (start, tx.init(start)), batches)
        return jax.tree.map(jnp.subtract, y, start), None, aux

    def init(params: PyTree, num_clients: int) -> FedAvgState:
        check_count(least=1, num_clients=num_clients)
        params = copied(params)
        wide = widen(params)
        return FedAvgState(
            params=params,
            global_update=zeros_like(params),
            server_state=apply.init(wide),
            rate_state=rate_controller.init(wide) if rate_controller else None,
            learning_rate=None
            if init_rate is None
            else jnp.asarray(init_rate, hyperparameter_dtype()),
            round=zero_count(),
        )

    def round(
        state: FedAvgState, batches: PyTree, participants: Array, weights: Array | None = None
    ) -> tuple[FedAvgState, dict[str, Any]]:
        participants, weights = check_round(
            batches,
            participants,
            weights,
            num_clients=None,
            local_steps=local_steps,
            mesh=mesh,
            client_axis=client_axis,
        )
        shared = (state.params, state.global_update, state.learning_rate)
        done = gather(local, shared, batches, weights, mesh=mesh, client_axis=client_axis)
        wide = widen(state.params)
        change, server_state = apply.update(done.mean, state.server_state, wide)
        rate, rate_state = state.learning_rate, state.rate_state
        if rate_controller is not None:
            rate, rate_state = rate_controller.update(done.mean, rate_state)
        new = FedAvgState(
            params=narrow_like(optax.apply_updates(wide, change), state.params),
            global_update=change,
            server_state=server_state,
            rate_state=rate_state,
            learning_rate=rate,
            round=next_count(state.round),
        )
        some = jnp.any(done.used)
        new = jax.tree.map(lambda n, o: jnp.where(some, n, o).astype(o.dtype), new, state)
        new = new._replace(round=next_count(state.round))
        made = jax.tree.map(lambda u: jnp.where(some, u, 0), change)
        metrics = round_metrics(done.used, done.refused, made, done.aux)
        return new, metrics if rate is None else {**metrics, "learning_rate": state.learning_rate}

    def client_update(
        params: PyTree, global_update: PyTree, batches: PyTree, learning_rate: Any = None
    ) -> PyTree:
        """The change of one client's parameters over its local steps."""
        return local((params, global_update, learning_rate), batches)[0]

    return FederatedMethod(init, round, client_update)


def fedhyper(
    grad_fn: GradFn,
    *,
    variant: Literal["global", "global_momentum", "server_local", "client_local", "full"],
    local_learning_rate: Any,
    local_steps: int,
    clients_per_round: int,
    steps_per_epoch: int | None = None,
    momentum: Any = 0.5,
    mesh: jax.sharding.Mesh | None = None,
    client_axis: str = "clients",
) -> FederatedMethod:
    """FedAvg whose rates follow the agreement of successive steps, on the server or the clients.

    Args:
      grad_fn: as in ``federated_averaging``.
      variant: ``"global"``: the server's rate (G); ``"global_momentum"``: with momentum (GM, which
        the authors recommend); ``"server_local"``: the server sets the clients' rate (SL);
        ``"client_local"``: each client its own (CL); ``"full"``: GM and CL.
      local_learning_rate: the clients' rate, > 0; with ``"server_local"`` that of the first round.
      local_steps: steps of a client in a round, >= 1.
      clients_per_round: the weight of the global update in CL is 0.1 over this.
      steps_per_epoch: local steps of one pass over a client's data; None: all of them. CL does not
        adapt in the first of each pass.
      momentum: of the clients' SGD, in [0, 1]; 0.5 is the authors' value.
      mesh: as in ``federated_momentum``.
      client_axis: as in ``federated_momentum``.

    Returns:
      A ``FederatedMethod``, made with ``federated_averaging`` from ``optimkit.fedhyper_global``,
      ``optimkit.fedhyper_client_local`` and ``optimkit.transforms.fedhyper_server_local`` at the
      authors' bounds; put these together yourself for others. The bounds of SL are a tenth of
      ``local_learning_rate`` and ten times that, the authors' at their rate of 0.01.

    Raises:
      ValueError: if an argument is out of range.

    All products depend on the scale of the changes: where they are long, rates sit at a bound.

    >>> method = fedhyper(lambda w, b: w - b, variant="global", local_learning_rate=0.5,
    ...                   local_steps=1, clients_per_round=1)
    >>> state = method.init(jnp.zeros(()), num_clients=1)
    >>> for _ in range(2):
    ...     state, _ = method.round(state, jnp.ones((1, 1)), jnp.array([0]))
    >>> float(state.params)  # 0.5, then (1 + 0.5 * 0.25) * 0.25 more
    0.78125

    Reference: Wang et al., "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated
    Learning with Hypergradient Descent", ICLR 2024, arXiv 2310.03156.
    """
    check_choice(
        ("global", "global_momentum", "server_local", "client_local", "full"), variant=variant
    )
    check_range(local_learning_rate=local_learning_rate, gt=0)
    check_count(least=1, clients_per_round=clients_per_round, local_steps=local_steps)

    def sgd(rate: Any) -> optax.GradientTransformation:
        return optax.sgd(rate, momentum=momentum)

    client: Any = sgd if variant == "server_local" else sgd(local_learning_rate)
    server = controller = None
    if variant == "server_local":
        controller = fedhyper_server_local(
            local_learning_rate, min_lr=local_learning_rate / 10, max_lr=local_learning_rate * 10
        )
    if variant in ("client_local", "full"):
        client = fedhyper_client_local(
            local_learning_rate,
            momentum=momentum,
            global_weight=0.1 / clients_per_round,
            steps_per_epoch=local_steps if steps_per_epoch is None else steps_per_epoch,
        )
    if variant == "global":
        server = fedhyper_global()
    elif variant in ("global_momentum", "full"):
        server = fedhyper_global(momentum=0.9, min_rate=0.8)
    return federated_averaging(
        grad_fn,
        client,
        server,
        local_steps=local_steps,
        rate_controller=controller,
        init_rate=None if controller is None else local_learning_rate,
        mesh=mesh,
        client_axis=client_axis,
    )
