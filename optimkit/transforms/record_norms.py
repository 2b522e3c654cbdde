"""Writes down the global norm of every gradient, for a schedule made from it afterwards."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, check_real, zero_count
from optimkit.numerics import check_count, compute_dtype, narrow, next_count, tree_norm
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class RecordGradientNormsState(NamedTuple):
    """``count``: int32 scalar. ``norms``: f32 (total_steps,), zero for steps still to come."""

    count: Array
    norms: Array


def record_gradient_norms(total_steps: int, ord: Literal[1, 2] = 2) -> GradientTransformation:
    r"""Records the global norm of each step's gradient and passes the gradient on as it is.

    .. math:: G_t = \Big(\sum_i g_{t,i}^2\Big)^{1/2} \quad\text{or}\quad
        G_t = \sum_i |g_{t,i}|, \quad\text{over all leaves}

    Args:
      total_steps: number of steps to record, >= 1; later ones are not recorded.
      ord: 2 for a schedule for SGD, 1 for one for Adam and its kind.

    Returns:
      A transformation that keeps 4 bytes a step, whatever the parameters. Put it behind a clip, so
      that it sees what the optimizer sees. Afterwards ``refined_schedule(state.norms)`` (with
      ``power=1`` for ``ord=1``) is the schedule for the next run.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    A non-finite gradient is recorded as such, and a norm beyond f32's range as its largest number.

    >>> import jax.numpy as jnp
    >>> tx = record_gradient_norms(3)
    >>> state = tx.init(None)
    >>> for g in ([3.0, 4.0], [1.0, 0.0]):
    ...     _, state = tx.update(jnp.array(g), state)
    >>> state.norms.tolist()
    [5.0, 1.0, 0.0]

    Reference: Defazio et al., "When, Why and How Much? Adaptive Learning Rate Scheduling by
    Refinement", 2023, arXiv 2310.07831.
    """
    check_count(total_steps=total_steps, least=1)
    if ord not in (1, 2):
        raise ValueError(f"ord must be 1 or 2, got {ord!r}")

    def norm(updates: PyTree) -> Array:
        if ord == 2:
            return tree_norm(updates)
        sums = [jnp.sum(jnp.abs(g), dtype=compute_dtype(g)) for g in jax.tree.leaves(updates)]
        return sum(sums, start=jnp.zeros((), jnp.float32))

    def init(params: PyTree) -> RecordGradientNormsState:
        del params
        return RecordGradientNormsState(zero_count(), jnp.zeros(total_steps, jnp.float32))

    def update(
        updates: PyTree, state: RecordGradientNormsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, RecordGradientNormsState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        norms = state.norms.at[state.count].set(narrow(norm(updates), jnp.float32), mode="drop")
        return updates, RecordGradientNormsState(next_count(state.count), norms)

    return transformation(init, update)


RECORD = Method(
    factory=record_gradient_norms,
    kind="piece",
    summary="write down the global gradient norm of every step; changes no update",
    example={"total_steps": 4},
    static=("total_steps", "ord"),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    exempt={
        "fidelity": "a norm is no trajectory: the recordings start from norms",
        "state": "the norms of all steps are one array, which belongs to no parameter",
    },
    paper='Defazio et al., "When, Why and How Much? Adaptive Learning Rate Scheduling by '
    'Refinement", 2023, arXiv 2310.07831',
)
