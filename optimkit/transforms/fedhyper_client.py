"""FedHyper's client: steps that grow while they agree with the last one and the global update."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import map_leaves, matching_leaves, widen, zero_count, zeros_like
from optimkit.numerics import check_count, check_range, hyperparameter_dtype, next_count
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.alignment import after, alignment
from optimkit.transforms.fedhyper import PAPER, checked_delta


class FedHyperClientState(NamedTuple):
    """``count``: int32 scalar, steps of this round. ``scale``: beta, for the next step.

    ``last_update``: the parameter change that the next one is compared with; one array a parameter.
    """

    count: Array
    scale: Array
    last_update: PyTree


def scale_by_fedhyper_client(
    *,
    global_weight: Any,
    max_growth: Any = 1.1,
    min_scale: Any = 0.1,
    max_scale: Any = 10.0,
    steps_per_epoch: int,
) -> GradientTransformation:
    r"""A client's steps grow while they agree with its last one and with the last global update.

    With G the last round's change of the global model, u the parameter change of this step, and
    :math:`\beta = 1`, :math:`u_{last} = G` at the start of a round:

    .. math::

        u = \beta\, u_{in}, \qquad
        \gamma = \min(\gamma_{max},\; 1 + g\langle u, G\rangle + \langle u, u_{last}\rangle), \qquad
        \beta \leftarrow \operatorname{clip}(\gamma\beta, \beta_{min}, \beta_{max})

    except in the first step of a local epoch, which changes neither beta nor the last step.

    Args:
      global_weight: g, >= 0; the authors use 0.1 over the number of clients in a round.
      max_growth: largest gamma, >= 0; there is no smallest.
      min_scale: lower bound of beta, > 0.
      max_scale: upper bound of beta.
      steps_per_epoch: steps of a local epoch, >= 1; with 1, beta never changes.

    Returns:
      A transformation that comes last, after the rate and its sign. ``update`` needs the extra
      argument ``global_update``, a tree like the parameters; zeros in the first round. 4 bytes a
      f32 parameter and two scalars. Call ``init`` anew for every client and round.

    Raises:
      ValueError: if an argument is out of range, ``global_update`` is missing, or a shape differs.

    >>> tx = scale_by_fedhyper_client(global_weight=0.1, steps_per_epoch=9)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(3):
    ...     step, state = tx.update(jnp.array([-0.1]), state, global_update=jnp.array([-0.5]))
    >>> round(float(step[0]), 6)  # second step: gamma = 1 + 0.1 * 0.05 + 0.05
    -0.1055

    Reference: Wang et al., ICLR 2024, arXiv 2310.03156. Agrees with the authors' code.
    """
    check_range(global_weight=global_weight, max_growth=max_growth, ge=0)
    check_range(min_scale=min_scale, max_scale=max_scale, gt=0)
    check_range(**{"max_scale - min_scale": max_scale - min_scale}, ge=0)
    check_count(least=1, steps_per_epoch=steps_per_epoch)

    def init(params: PyTree) -> FedHyperClientState:
        scale = jnp.ones((), hyperparameter_dtype())
        return FedHyperClientState(zero_count(), scale, zeros_like(params))

    def update(
        updates: PyTree,
        state: FedHyperClientState,
        params: PyTree | None = None,
        *,
        global_update: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, FedHyperClientState]:
        del params, extra
        if global_update is None:
            raise ValueError(
                "scale_by_fedhyper_client needs the extra argument global_update: the last round's "
                "change of the global model, zeros in the first round"
            )
        wide = checked_delta(updates, state.last_update)
        overall = widen(
            matching_leaves(global_update, updates, what="global_update"), state.last_update
        )
        first = state.count == 0
        skipped = state.count % steps_per_epoch == 0

        # Products of the incoming steps, scaled afterwards: a scaled step would be stored for them.
        with_global = state.scale * alignment(wide, overall)
        with_last = state.scale * alignment(wide, state.last_update)
        with_last = jnp.where(first, with_global, with_last)
        growth = jnp.minimum(1 + global_weight * with_global + with_last, max_growth)
        scale = jnp.clip(growth * state.scale, min_scale, max_scale)
        scale = jnp.where(skipped, state.scale, scale).astype(state.scale.dtype)

        def step(u: Array, last: Array, overall: Array) -> tuple[Array, Array]:
            change = state.scale.astype(u.dtype) * u
            return change, jnp.where(skipped, jnp.where(first, overall, last), change)

        updates, last = map_leaves(step, after(scale, updates), state.last_update, reads=(overall,))
        return updates, FedHyperClientState(next_count(state.count), scale, last)

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_fedhyper_client,
    kind="piece",
    summary="FedHyper's client: steps that grow while they agree with the last and the global",
    example={"global_weight": 0.01, "steps_per_epoch": 4},
    extras=lambda params, grads: {"global_update": grads},
    traced=("global_weight", "max_growth", "min_scale", "max_scale"),
    static=("steps_per_epoch",),
    needs=("global_update",),
    position="last",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=36,  # also the global update, and all three once more for the products
    paper=PAPER,
    reference="ATP-1010/FedHyper@d6a57c54d7e9293cabedc8f80c7d61d3cc321633:"
    "src/update.py:LocalUpdate.update_weights",
    licence="",
)
