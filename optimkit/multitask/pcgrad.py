"""PCGrad: each task gives up what points against another task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.leaves import check_real, narrow_like
from optimkit.multitask.tasks import (
    check_tasks,
    conflict_metrics,
    cosines_of,
    mix_tasks,
    task_gram,
)
from optimkit.numerics import check_choice, check_count, check_range, compute_dtype, safe_div
from optimkit.protocols import Array, GradientCombiner, Method, PyTree

REDUCTIONS = ("sum", "mean")


class CosineState(NamedTuple):
    """``task_cosines``: those of the last update, (K, K). ``metrics``: what they say in short."""

    task_cosines: Array
    metrics: Mapping[str, Array]


def init_cosines(params: PyTree, num_tasks: int) -> CosineState:
    """The state before the first update: no conflict."""
    check_real(params, "parameter")
    check_count(num_tasks=num_tasks, least=1)
    dtype = compute_dtype(jnp.float32, *jax.tree.leaves(params))
    cosines = jnp.eye(num_tasks, dtype=dtype)
    return CosineState(cosines, conflict_metrics(cosines, dtype))


def measure_cosines(gram: Array, dtype: Any) -> CosineState:
    """The state after an update with these inner products."""
    cosines = cosines_of(gram).astype(dtype)
    return CosineState(cosines, conflict_metrics(cosines, dtype))


def project_conflicts(gram: Array, order: Array, eps: Any, include_self: bool = False) -> Array:
    r"""The coefficients of the projected gradients in the given ones, shape ``(K, K)``.

    Row i starts as task i alone. For every j of ``order[i]`` in turn, where the row's inner product
    :math:`d` with task j is negative, it loses :math:`d / (\|g_j\|^2 + \epsilon)` of task j.

    >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])
    >>> project_conflicts(gram, jnp.array([[1, 0], [0, 1]]), 0.0).tolist()
    [[1.0, 0.25], [1.0, 1.0]]
    """
    tasks = gram.shape[0]
    numbers = jnp.arange(tasks)

    def one(task: Array, turns: Array) -> Array:
        def meet(step: Array, row: Array) -> Array:
            other = (numbers == turns[step]).astype(gram.dtype)
            product = row @ gram @ other
            share = safe_div(product, other @ jnp.diagonal(gram) + eps)
            conflict = product < 0
            if not include_self:
                conflict &= turns[step] != task
            return (row - jnp.where(conflict, share, 0) * other).astype(row.dtype)

        own = (numbers == task).astype(gram.dtype)
        return jax.lax.fori_loop(0, turns.shape[0], meet, own)

    return jax.vmap(one)(numbers, order)


def _order_array(order: Any, tasks: int) -> Array:
    if isinstance(order, str):
        return jnp.tile(jnp.arange(tasks), (tasks, 1))
    if np.shape(order) != (tasks, tasks) or not jnp.issubdtype(jnp.result_type(order), jnp.integer):
        raise ValueError(
            f"order must hold integers of shape ({tasks}, {tasks}), one row a task, got "
            f"{jnp.result_type(order)} of shape {np.shape(order)}"
        )
    return jnp.asarray(order)


def pcgrad(
    *,
    reduction: Literal["sum", "mean"] = "sum",
    eps: Any = 1e-8,
    include_self: bool = False,
    order: Any = None,
) -> GradientCombiner:
    r"""Projects each task's gradient off every other task's that it conflicts with, and adds.

    For every task i, and the other tasks j in random order:

    .. math::

        p_i \leftarrow p_i - \frac{\langle p_i, g_j \rangle}{\|g_j\|^2 + \epsilon}\, g_j
        \quad\text{if } \langle p_i, g_j \rangle < 0, \qquad g = \sum_i p_i

    starting at :math:`p_i = g_i`, with the other tasks' original gradients.

    Args:
      reduction: ``"sum"`` (paper) or ``"mean"`` over the tasks.
      eps: added to the squared norm, >= 0. It is absolute: gradients whose norm is below 1e-4 are
        hardly projected. With 0 they are, and zero gradients still change nothing.
      include_self: let every task meet itself, too, as published programs do. It matters only for
        three tasks or more, where an earlier projection turned a task against its own gradient.
      order: None: random, and ``update`` needs ``key=``; ``"fixed"``: by number, for all tasks; or
        integers of shape ``(K, K)``, row i being the order in which task i meets the tasks.

    Returns:
      A combiner; its ``update`` also takes ``key=``, a random key, and ``order=``, which comes
      before the factory's. No state but telemetry: ``task_cosines``, ``min_cosine`` and
      ``conflict_fraction``.

    Raises:
      ValueError: if an argument is out of range; from ``update``, without ``key`` where the order
        is random, or for a leaf whose task axis or shape does not fit.
      TypeError: for complex or integer leaves.

    Two passes over the gradients: all projections are computed on the K x K inner products. Two
    tasks in full conflict cancel to 0. Only shared parameters belong here; see ``with_combiner``.

    Programs differ: LibMTL sums and shuffles for each task, the authors' TensorFlow code drops its
    shuffle, a widespread PyTorch version always averages and has no eps. All are settings here.

    >>> import jax, jax.numpy as jnp
    >>> combiner = pcgrad(eps=0.0)
    >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])  # projected: (0.5, 0.5) and (0, 1)
    >>> state = combiner.init(jnp.zeros(2), 2)
    >>> grads, state = combiner.update(task_grads, state, key=jax.random.key(0))
    >>> grads.tolist(), round(float(state.metrics["min_cosine"]), 3)
    ([0.5, 1.5], -0.707)

    Reference: Yu et al., "Gradient Surgery for Multi-Task Learning", 2020, arXiv 2001.06782.
    """
    check_choice(REDUCTIONS, reduction=reduction)
    check_range(eps=eps, ge=0)
    if isinstance(order, str):
        check_choice(("fixed",), order=order)
    default_order = order

    def update(
        task_grads: PyTree,
        state: CosineState,
        params: PyTree | None = None,
        *,
        key: Any = None,
        order: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, CosineState]:
        del extra
        tasks = check_tasks(task_grads, state.task_cosines.shape[0], params)
        chosen = default_order if order is None else order
        if chosen is not None:
            turns = _order_array(chosen, tasks)
        elif key is None:
            raise ValueError(
                "pcgrad projects in random order: give update key=, a random key, or order="
            )
        else:
            keys = jax.random.split(key, tasks)
            turns = jax.vmap(lambda k: jax.random.permutation(k, tasks))(keys)
        gram = task_gram(task_grads, tasks)
        rows = project_conflicts(gram, turns, eps, include_self)
        weights = jnp.sum(rows, axis=0) / (tasks if reduction == "mean" else 1)
        combined = narrow_like(mix_tasks(task_grads, weights), task_grads)
        return combined, measure_cosines(gram, state.task_cosines.dtype)

    return GradientCombiner(init_cosines, update)


RECORD = Method(
    factory=pcgrad,
    kind="combiner",
    summary="project each task's gradient off those that it conflicts with, and add",
    extras=lambda params, grads: {"key": jax.random.key(0)},
    traced=("eps",),
    static=("reduction", "include_self", "order"),
    needs=("key",),
    position="first",
    communication="reduce",
    response="proportional",
    moved_bytes=20,  # two tasks: two gradients read twice, one written
    paper='Yu et al., "Gradient Surgery for Multi-Task Learning", 2020, arXiv 2001.06782',
    reference="median-research-group/LibMTL@4336804847eaa5e0b924b743d76beec7ac3fdc97:"
    "LibMTL/weighting/PCGrad.py",
    licence="MIT",
)
