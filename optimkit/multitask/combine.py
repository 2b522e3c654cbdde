"""A combiner in front of an optimizer: one gradient a task in, one update out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from optimkit.leaves import check_real, narrow_like, widen
from optimkit.multitask.tasks import check_tasks, mix_tasks, sum_tasks
from optimkit.numerics import check_count
from optimkit.protocols import (
    Array,
    GradientCombiner,
    GradientTransformation,
    Method,
    PyTree,
    transformation,
)


class WithCombinerState(NamedTuple):
    """``combiner_state``: state of the combiner. ``inner_state``: state of the optimizer."""

    combiner_state: PyTree
    inner_state: PyTree


def with_combiner(
    combiner: GradientCombiner, inner: optax.GradientTransformation, *, num_tasks: int
) -> GradientTransformation:
    """Feeds the combined gradient of several tasks to an ordinary optimizer.

    ``update`` takes a stacked tree: the structure of the parameters with a leading axis of one
    entry a task on every leaf. Everything after it in a chain sees ordinary updates.

    Combiner and inner optimizer see gradients and parameters in f32 at least; the update comes back
    in the parameter's dtype. Extra arguments reach both.

    Args:
      combiner: for example ``sam_gs()``.
      inner: any optax transformation; it receives the combined gradient.
      num_tasks: number of tasks K, >= 1; it shapes the state.

    Returns:
      A transformation whose ``init`` takes the parameters and whose ``update`` takes the stacked
      gradients. Its state is the combiner's and the inner optimizer's.

    Raises:
      ValueError: if ``num_tasks`` is below 1; from ``update``, for a leaf whose task axis is
        missing or of another length, or that does not belong to the parameters.
      TypeError: for complex or integer leaves, naming the leaf.

    Parameters that only one task uses (heads) go to another branch of ``optax.partition``, with
    ``sum_combiner()`` in front: they must not enter the norms of the shared ones.

    ``optax.apply_if_finite`` and ``optax.MultiSteps`` assume that updates are shaped like
    gradients: use them as ``inner``, not around the result.

    >>> import jax.numpy as jnp, optax
    >>> tx = with_combiner(sum_combiner(), optax.sgd(0.1), num_tasks=2)
    >>> params = jnp.array([1.0, 1.0])
    >>> task_grads = jnp.array([[1.0, 0.0], [2.0, 4.0]])  # one row a task
    >>> updates, _ = tx.update(task_grads, tx.init(params), params)
    >>> [round(float(u), 3) for u in updates]
    [-0.3, -0.4]
    """
    check_count(num_tasks=num_tasks, least=1)
    inner_tx = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> WithCombinerState:
        check_real(params, "parameter")
        wide = widen(params)
        return WithCombinerState(combiner.init(wide, num_tasks), inner_tx.init(wide))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, WithCombinerState]:
        check_tasks(updates, num_tasks, params)
        like = updates if params is None else params
        wide = None if params is None else widen(params)
        grads, combiner_state = combiner.update(
            widen(updates, like), state.combiner_state, wide, **extra
        )
        new, inner_state = inner_tx.update(grads, state.inner_state, wide, **extra)
        return narrow_like(new, like), WithCombinerState(combiner_state, inner_state)

    return transformation(init, update)


def sum_combiner(weights: Array | None = None) -> GradientCombiner:
    """Adds the tasks' gradients: plain multi-task training, and the rule for task-specific heads.

    Args:
      weights: one factor a task, shape ``(K,)``; default all 1.

    Returns:
      A combiner without state. Its output has the dtype of the stacked leaf and is summed in f32 at
      least; a sum above a narrow type's largest number becomes that number.

    Raises:
      ValueError: from ``init``, if there is not one weight a task; from ``update``, for a leaf
        whose task axis is missing or differs.

    >>> import jax.numpy as jnp
    >>> combiner = sum_combiner([1.0, 0.5])
    >>> combiner.update(jnp.array([[1.0], [4.0]]), combiner.init(jnp.zeros(1), 2))[0].tolist()
    [3.0]
    """

    def init(params: PyTree, num_tasks: int) -> optax.EmptyState:
        check_real(params, "parameter")
        check_count(num_tasks=num_tasks, least=1)
        if weights is not None and np.shape(weights) != (num_tasks,):
            raise ValueError(
                f"weights must have shape ({num_tasks},), one a task, got {np.shape(weights)}"
            )
        return optax.EmptyState()

    def update(
        task_grads: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        given = None if weights is None else np.shape(weights)[0]
        check_tasks(task_grads, given, params)
        if weights is None:
            total = sum_tasks(task_grads)
        else:
            total = mix_tasks(task_grads, jnp.asarray(weights))
        return narrow_like(total, task_grads), state

    return GradientCombiner(init, update)


RECORDS = (
    Method(
        factory=sum_combiner,
        kind="combiner",
        summary="the sum of the tasks' gradients, weighted or not",
        traced=("weights",),
        communication="none",
        response="proportional",
        differentiable=True,
        moved_bytes=12,  # two tasks: two gradients read, one written
    ),
    Method(
        factory=with_combiner,
        kind="combiner",
        summary="a combiner in front of any optimizer; takes stacked gradients",
        example={"num_tasks": 2},
        example_made={"combiner": sum_combiner, "inner": lambda: optax.sgd(1e-2)},
        static=("combiner", "inner", "num_tasks"),
        position="first",
        communication="none",
        response="proportional",
        moved_bytes=16,
    ),
)
