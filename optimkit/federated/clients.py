"""The clients of one round: run side by side, checked, and their results averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from optimkit.layout import path_name
from optimkit.leaves import check_match, check_real, narrow_like, widen
from optimkit.numerics import check_range, hyperparameter_dtype, safe_div
from optimkit.protocols import Array, PyTree

GradFn = Callable[[PyTree, Any], Any]
"""``(params, batch) -> gradient``, or ``-> (gradient, aux)``."""


class FederatedMethod(NamedTuple):
    """Pure functions that ``jax.jit`` takes as they are.

    ``init(params, num_clients) -> state``; ``round(state, batches, participants, weights=None) ->
    (state, metrics)``. Every leaf of ``batches`` begins with the axes (clients of the round, local
    steps); ``participants`` holds the index of each of these clients; ``weights``, >= 0, says how
    much each counts, one each where they are not given. A weight of 0 leaves a client out, so that
    rounds of different sizes share one compilation. ``metrics`` has f32 scalars: ``clients``, how
    many counted; ``refused``, how many were left out because their result was not finite;
    ``update_norm``, the l2 norm of the server's step; and ``aux``, what the gradient function
    returned beside the gradient, with the two axes of the batches.

    Indices and weights are checked where they are known; under ``jit`` a wrong index passes unseen.
    All clients that share a device run at once, each with its own copy of the parameters.

    ``client_update`` is one client's part of a round, for a loop of your own.
    """

    init: Callable[[PyTree, int], Any]
    round: Callable[..., tuple[Any, dict[str, Any]]]
    client_update: Callable[..., Any]


class Gathered(NamedTuple):
    """``mean``: weighted mean of what clients sent. ``kept``, ``aux``: by client. ``used``: bools.

    ``refused``: number of clients with a weight whose result was not finite.
    """

    mean: PyTree
    kept: PyTree
    aux: PyTree
    used: Array
    refused: Array


def gather(
    local: Callable[[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]],
    shared: PyTree,
    own: PyTree,
    weights: Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
    client_axis: str = "clients",
) -> Gathered:
    """Runs every client of a round: vmapped on a device, divided among those of a mesh.

    Args:
      local: ``(shared, own) -> (sent, kept, aux)``, one client.
      shared: what all clients get.
      own: what each gets for itself, on a leading axis.
      weights: (clients,), >= 0.
      mesh: devices to divide the clients among, or None.
      client_axis: the mesh axis.

    A client whose ``sent`` or ``kept`` is not finite counts as one of weight 0.
    """

    def on_device(shared: PyTree, own: PyTree, weights: Array) -> Any:
        sent, kept, aux = jax.vmap(local, in_axes=(None, 0))(shared, own)
        fine = _finite((sent, kept), weights.shape)
        used = fine & (weights > 0)

        def total(x: Array) -> Array:
            beside = (slice(None),) + (None,) * (x.ndim - 1)
            share = weights.astype(x.dtype)[beside] * x
            return jnp.sum(jnp.where(used[beside], share, 0), axis=0)

        sums = jax.tree.map(total, sent)
        whole, refused = jnp.sum(jnp.where(used, weights, 0)), jnp.sum(~fine & (weights > 0))
        if mesh is not None:
            sums, whole, refused = jax.lax.psum((sums, whole, refused), client_axis)
        mean = jax.tree.map(lambda x: safe_div(x, whole.astype(x.dtype)), sums)
        return mean, refused, kept, aux, used

    if mesh is not None:
        rows, everywhere = jax.P(client_axis), jax.P()
        # Without the check of varying axes, a gradient inside stays that of the client alone: with
        # it, differentiating by replicated parameters adds up the clients of all devices.
        on_device = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(everywhere, rows, rows),
            out_specs=(everywhere, everywhere, rows, rows, rows),
            check_vma=False,
        )
        own, weights = _placed((own, weights), mesh, rows)
    mean, refused, kept, aux, used = on_device(shared, own, weights)
    if mesh is not None:
        kept, used = _placed((kept, used), mesh, jax.P())
    return Gathered(mean, kept, aux, used, refused)


def _placed(tree: PyTree, mesh: jax.sharding.Mesh, spec: Any) -> PyTree:
    """The arrays divided as ``spec`` says, where types hold it; elsewhere the compiler does it."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    return jax.reshard(tree, jax.sharding.NamedSharding(mesh, spec))


def _finite(tree: PyTree, shape: tuple[int, ...]) -> Array:
    fine = jnp.ones(shape, bool)
    for x in jax.tree.leaves(tree):
        fine &= jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    return fine


def gradient_at(grad_fn: GradFn, params: PyTree, like: PyTree, batch: Any) -> tuple[PyTree, PyTree]:
    """``(gradient, aux)`` at parameters in the dtypes of ``like``; the gradient in f32 or better.

    Raises:
      ValueError: if the gradient is another tree than the parameters.
    """
    made = grad_fn(narrow_like(params, like), batch)
    aux = None
    if isinstance(made, tuple) and len(made) == 2 and not _same(made, like):
        made, aux = made
    check_match(made, like, what="gradient", like="the parameters")
    check_real(made, "gradient")
    return widen(made, like), aux


def _same(a: PyTree, b: PyTree) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b)


def copied(params: PyTree) -> PyTree:
    """The parameters in buffers of their own: a round may donate its state."""
    check_real(params, "parameter")
    return jax.tree.map(lambda p: jnp.array(p, copy=True), params)


def check_round(
    batches: PyTree,
    participants: Array,
    weights: Array | None,
    *,
    num_clients: int | None,
    local_steps: int,
    mesh: jax.sharding.Mesh | None,
    client_axis: str,
) -> tuple[Array, Array]:
    """``(participants, weights)`` as arrays.

    Raises:
      ValueError: for an empty round, a client that does not exist or comes twice, batches without
        the two leading axes, bad weights, or clients that a mesh axis does not divide.
    """
    if not isinstance(participants, jax.Array):
        participants = np.asarray(participants)
    shape = participants.shape
    if shape == (0,):
        raise ValueError("participants is empty: a round needs at least one client")
    if len(shape) != 1 or not jnp.issubdtype(participants.dtype, jnp.integer):
        raise ValueError(
            "participants must be a vector of client indices, got "
            f"{participants.dtype} of shape {shape}"
        )
    _check_known(participants, num_clients)
    if weights is None:
        weights = jnp.ones(shape, hyperparameter_dtype())
    elif np.shape(weights) != shape:
        raise ValueError(
            f"weights has shape {np.shape(weights)}, but participants {shape}: one weight a client"
        )
    else:
        check_range(weights=weights, ge=0, lt=np.inf)
    if not jax.tree.leaves(batches):
        raise ValueError("batches is empty: every client needs a batch for every local step")
    for path, leaf in jax.tree_util.tree_leaves_with_path(batches):
        if np.shape(leaf)[:2] != (shape[0], local_steps):
            raise ValueError(
                f"batches leaf {path_name(path)!r} has shape {np.shape(leaf)}, but must begin with "
                f"(clients, local steps) = {(shape[0], local_steps)}"
            )
    if mesh is not None and shape[0] % mesh.shape[client_axis]:
        raise ValueError(
            f"{shape[0]} participants cannot be divided among the {mesh.shape[client_axis]} "
            f"devices of mesh axis {client_axis!r}: fill up with clients of weight 0"
        )
    return jnp.asarray(participants), jnp.asarray(weights, hyperparameter_dtype())


def _check_known(participants: Array, num_clients: int | None) -> None:
    try:
        known = np.asarray(participants)
    except jax.errors.JAXTypeError:  # traced: not known yet
        return
    if num_clients is not None and not np.all((known >= 0) & (known < num_clients)):
        raise ValueError(
            f"participants must be >= 0 and < {num_clients}, the number of clients, got "
            f"{known.tolist()}"
        )
    if np.unique(known).size < known.size:
        raise ValueError(f"participants holds a client twice: {known.tolist()}")


def check_mesh(mesh: jax.sharding.Mesh | None, client_axis: str) -> None:
    """Raises unless the mesh has the axis that clients are divided over."""
    if mesh is not None and client_axis not in mesh.axis_names:
        raise ValueError(f"client_axis must be one of {mesh.axis_names}, got {client_axis!r}")
