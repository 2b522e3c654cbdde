"""Federated averaging whose clients mix in the last round's direction: FedAvg-M, SCAFFOLD-M, VR."""

from __future__ import annotations

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
from optimkit.leaves import narrow_like, widen, zero_count, zeros_like
from optimkit.numerics import check_choice, check_count, check_range, next_count, tree_norm
from optimkit.protocols import Array, PyTree, ScalarOrSchedule

Algorithm = Literal["fedavg_m", "fedavg_m_vr", "scaffold_m", "scaffold_m_vr"]
Control = Literal["mean_gradient", "option_ii"]


class FedState(NamedTuple):
    """What the server keeps.

    ``params``: x. ``prev_params``: x of the round before, or None. ``direction``: g, the mean
    direction of the last round, in gradient units. ``server_control``: c, or None.
    ``client_controls``: c_i with a leading axis of all clients, or None. ``round``: int32.
    """

    params: PyTree
    prev_params: PyTree
    direction: PyTree
    server_control: PyTree
    client_controls: PyTree
    round: Array


class _Shared(NamedTuple):
    params: PyTree
    direction: PyTree
    prev_params: PyTree
    rate: Array


def federated_momentum(
    grad_fn: GradFn,
    *,
    algorithm: Algorithm = "fedavg_m",
    local_learning_rate: ScalarOrSchedule,
    server_learning_rate: ScalarOrSchedule,
    beta: Any = 0.1,
    local_steps: int,
    control: Control = "mean_gradient",
    mesh: jax.sharding.Mesh | None = None,
    client_axis: str = "clients",
) -> FederatedMethod:
    r"""Clients that hold different data mix the last round's direction into their local steps.

    In round r, each of the S participants starts at :math:`y = x^r` and makes K steps
    :math:`y \leftarrow y - \eta d`. With :math:`G = \nabla F(y; \xi)` and
    :math:`P = \nabla F(x^{r-1}; \xi)` on the same batch,

    .. math::

        d &= \beta G + (1-\beta) g^r & \text{(fedavg\_m)} \\
        d &= G + (1-\beta)(g^r - P) & \text{(fedavg\_m\_vr)} \\
        d &= \beta (G - c_i + c) + (1-\beta) g^r & \text{(scaffold\_m)} \\
        d &= G - \beta (c_i - c) + (1-\beta)(g^r - P) & \text{(scaffold\_m\_vr)}

    The server takes the mean over participants and steps,
    :math:`g^{r+1} = \operatorname{mean} d` and :math:`x^{r+1} = x^r - \gamma g^{r+1}`; the controls
    of the participants become :math:`\operatorname{mean}_k G`, and c moves by the sum of their
    changes over the number of all clients.

    Args:
      grad_fn: ``(params, batch) -> gradient`` or ``-> (gradient, aux)``.
      algorithm: one of the four; ``fedavg_m`` and so on are the same under names of their own.
      local_learning_rate: eta, >= 0, or a schedule over the 0-based round.
      server_learning_rate: gamma, >= 0, or a schedule over the 0-based round. FedAvg's server,
        which puts the mean of the clients' parameters in place, has gamma = eta * K.
      beta: weight of the client's own gradient, in (0, 1]; 1 gives FedAvg and SCAFFOLD. 0.1 is a
        common default of such momentum, not this paper's.
      local_steps: K, >= 1.
      control: how SCAFFOLD's controls are renewed. ``"option_ii"`` is
        :math:`c_i - c + \operatorname{mean} d`, which needs no gradient sum but mixes the momentum
        into the controls.
      mesh: divides the clients of a round among the devices of one of its axes; None: they run
        side by side on one device.
      client_axis: that axis.

    Returns:
      A ``FederatedMethod``. The server keeps 4 bytes a f32 parameter for g, 4 more for the VR
      forms, and for SCAFFOLD 4 for c and 4 for each of all clients. Clients keep nothing. Local
      steps are f32 or better; ``grad_fn`` sees the parameters' own dtype.

    Raises:
      ValueError: if an argument is out of range; from ``round``, if it has no participants or its
        arrays do not fit.

    The first round moves beta of a FedAvg round, for g is zero then. A client whose result is not
    finite counts for nothing in its round and is reported; a round without any usable client
    leaves the model as it is. Batch-norm statistics are not averaged.

    Provisional: no code of the paper was found; the four rules follow its equations as recalled
    from secondary sources, and ``fedavg_m`` agrees with FedCM.

    >>> def grad_fn(w, target):  # of 0.5 * (w - target)**2
    ...     return w - target
    >>> method = federated_momentum(
    ...     grad_fn, local_learning_rate=0.5, server_learning_rate=1.0, beta=1.0, local_steps=1)
    >>> state = method.init(jnp.zeros(()), num_clients=3)
    >>> state, metrics = method.round(state, jnp.array([[1.0], [3.0]]), jnp.array([0, 2]))
    >>> float(state.params), float(metrics["clients"])  # the mean of two targets
    (2.0, 2.0)

    Reference: Cheng et al., "Momentum Benefits Non-IID Federated Learning Simply and Provably",
    ICLR 2024, arXiv 2306.16504.
    """
    check_choice(("fedavg_m", "fedavg_m_vr", "scaffold_m", "scaffold_m_vr"), algorithm=algorithm)
    check_choice(("mean_gradient", "option_ii"), control=control)
    check_range(
        local_learning_rate=local_learning_rate, server_learning_rate=server_learning_rate, ge=0
    )
    check_range(beta=beta, gt=0, le=1)
    check_count(least=1, local_steps=local_steps)
    check_mesh(mesh, client_axis)
    reduced, controlled = algorithm.endswith("_vr"), algorithm.startswith("scaffold")

    def init(params: PyTree, num_clients: int) -> FedState:
        check_count(least=1, num_clients=num_clients)
        params = copied(params)
        zeros = zeros_like(params)
        return FedState(
            params=params,
            prev_params=copied(params) if reduced else None,
            direction=zeros,
            server_control=zeros_like(params) if controlled else None,
            client_controls=jax.tree.map(
                lambda z: jnp.zeros((num_clients, *z.shape), z.dtype), zeros
            )
            if controlled
            else None,
            round=zero_count(),
        )

    def descent(gradient: PyTree, shared: _Shared, correction: PyTree, before: PyTree) -> PyTree:
        def one(g: Array, last: Array, c: Array | None, p: Array | None) -> Array:
            if p is not None:
                return g + (0 if c is None else beta * c) + (1 - beta) * (last - p)
            return beta * (g if c is None else g + c) + (1 - beta) * last

        trees = (gradient, shared.direction, *(_or_none(t, gradient) for t in (correction, before)))
        return jax.tree.map(one, *trees)

    def local(shared: _Shared, own: Any) -> tuple[PyTree, PyTree, PyTree]:
        correction, batches = own
        like, start = shared.params, widen(shared.params)
        zeros = zeros_like(start)

        def step(carry: Any, batch: Any) -> Any:
            y, directions, gradients = carry
            gradient, aux = gradient_at(grad_fn, y, like, batch)
            before = None
            if reduced:
                before, _ = gradient_at(grad_fn, widen(shared.prev_params), like, batch)
            d = descent(gradient, shared, correction, before)
            y = jax.tree.map(lambda y, d: y - shared.rate.astype(y.dtype) * d, y, d)
            directions = jax.tree.map(jnp.add, directions, d)
            if gradients is not None:
                gradients = jax.tree.map(jnp.add, gradients, gradient)
            return (y, directions, gradients), aux

        summed = zeros if controlled and control == "mean_gradient" else None
        (_, directions, gradients), aux = jax.lax.scan(step, (start, zeros, summed), batches)
        mean = jax.tree.map(lambda d: d / local_steps, directions)
        kept = None
        if controlled and control == "mean_gradient":
            kept = jax.tree.map(lambda g: g / local_steps, gradients)
        elif controlled:
            kept = jax.tree.map(jnp.subtract, mean, correction)
        return mean, kept, aux

    def client_update(
        params: PyTree,
        direction: PyTree,
        control_correction: PyTree,
        prev_params: PyTree,
        batches: PyTree,
        round: Any = 0,
    ) -> tuple[PyTree, PyTree]:
        """Mean direction over the local steps, and the new control, of one client."""
        shared = _Shared(params, direction, prev_params, _at(local_learning_rate, round))
        return local(shared, (control_correction, batches))[:2]

    def round(
        state: FedState, batches: PyTree, participants: Array, weights: Array | None = None
    ) -> tuple[FedState, dict[str, Any]]:
        controls = jax.tree.leaves(state.client_controls)
        participants, weights = check_round(
            batches,
            participants,
            weights,
            num_clients=controls[0].shape[0] if controls else None,
            local_steps=local_steps,
            mesh=mesh,
            client_axis=client_axis,
        )
        rate = _at(local_learning_rate, state.round)
        shared = _Shared(state.params, state.direction, state.prev_params, rate)
        old = jax.tree.map(lambda c: c[participants], state.client_controls)
        correction = jax.tree.map(lambda c, own: c[None] - own, state.server_control, old)
        done = gather(
            local, shared, (correction, batches), weights, mesh=mesh, client_axis=client_axis
        )
        some = jnp.any(done.used)
        direction = _choose(some, done.mean, state.direction)
        gamma = jnp.where(some, _at(server_learning_rate, state.round), 0)
        change = jax.tree.map(lambda g: -gamma.astype(g.dtype) * g, direction)
        params = optax.apply_updates(widen(state.params), change)
        server_control, client_controls = state.server_control, state.client_controls
        if controlled:
            kept = jax.tree.map(
                lambda new, old: jnp.where(
                    done.used[(slice(None),) + (None,) * (new.ndim - 1)], new, old
                ),
                done.kept,
                old,
            )
            server_control = jax.tree.map(
                lambda c, new, old, every: c + jnp.sum(new - old, axis=0) / every.shape[0],
                server_control,
                kept,
                old,
                client_controls,
            )
            client_controls = jax.tree.map(
                lambda every, new: every.at[participants].set(new), client_controls, kept
            )
        new = FedState(
            params=narrow_like(params, state.params),
            prev_params=_choose(some, state.params, state.prev_params) if reduced else None,
            direction=direction,
            server_control=server_control,
            client_controls=client_controls,
            round=next_count(state.round),
        )
        return new, round_metrics(done.used, done.refused, change, done.aux)

    return FederatedMethod(init, round, client_update)


def _at(rate: ScalarOrSchedule, round: Any) -> Array:
    return jnp.asarray(rate(round) if callable(rate) else rate)


def _or_none(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda _: None, like) if tree is None else tree


def _choose(condition: Array, chosen: PyTree, otherwise: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)


def round_metrics(used: Array, refused: Array, change: PyTree, aux: PyTree) -> dict[str, Any]:
    """What a round reports."""
    found: dict[str, Any] = {
        "clients": jnp.sum(used).astype(jnp.float32),
        "refused": refused.astype(jnp.float32),
        "update_norm": tree_norm(change).astype(jnp.float32),
    }
    return found if aux is None else {**found, "aux": aux}
