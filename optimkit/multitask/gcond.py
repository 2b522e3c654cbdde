"""GCond: accumulate, resolve conflicts, and smooth the sum by a momentum that replaces Adam's."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_real, narrow_like, widen, zero_count
from optimkit.multitask.arbitrate import arbitrate_conflicts, buffers
from optimkit.multitask.tasks import check_tasks, sum_tasks
from optimkit.numerics import check_count, check_range, next_count, one_minus_power, safe_norm
from optimkit.protocols import Array, GradientCombiner, GradientTransformation, Method, PyTree


class GCondState(NamedTuple):
    """``count``: int32. ``mu``: momentum of the sum. ``combiner_state``: the arbitrator's."""

    count: Array
    mu: PyTree
    combiner_state: PyTree


def gcond(
    momentum: Any = 0.85,
    *,
    conflict_thresholds: tuple[float, float, float] = (-0.8, -0.5, 0.0),
    smooth: bool = True,
    remap_power: Any = 2.0,
    tie_breaking_weights: tuple[float, float] = (0.8, 0.2),
    dominance_window: int = 3,
    norm_ema_decay: Any = 0.95,
    max_iters: int | None = None,
    norm_cap: Any = None,
    return_raw: bool = False,
    use_lion: bool = False,
    trust_ratio_coef: Any = 1e-4,
    trust_ratio_clip: Any = 100.0,
    eps: Any = 1e-8,
    buffer_dtype: Any = jnp.float32,
    conflict_tolerance: Any = 0.0,
) -> GradientCombiner:
    r"""``arbitrate_conflicts``, whose sum then passes a bias-corrected average.

    .. math::

        M_t = \beta M_{t-1} + (1 - \beta) \sum_k g_k^{resolved}, \qquad
        \hat M_t = M_t / (1 - \beta^t)

    With ``use_lion``, leaf by leaf,
    :math:`\operatorname{sign}(\hat M) \cdot c \min(\|p\| / \|\hat M\|, \text{clip})`.

    Args:
      momentum: :math:`\beta`, in [0, 1). An optimizer after it should have no first moment of its
        own: the authors use 0.9 with AdamW (b1 = 0, b2 = 0.95).
      conflict_thresholds: see ``arbitrate_conflicts``, as for all that are not named here.
      smooth: smooth or zoned projection.
      remap_power: shape of the smooth form.
      tie_breaking_weights: weights of stability and strength.
      dominance_window: wins in a row after which a task loses.
      norm_ema_decay: decay of the norms' running means.
      max_iters: most pairs resolved in one update; default 2 K.
      norm_cap: limit on each task's norm.
      return_raw: give the resolved sum itself; the momentum still advances.
      use_lion: give signs times a trust ratio; ``update`` then needs the parameters.
      trust_ratio_coef: c, > 0.
      trust_ratio_clip: largest ratio, > 0. The ratio is 1 where either norm is below eps.
      eps: see ``arbitrate_conflicts``.
      buffer_dtype: dtype of momentum and previous gradients; f32 stands for f32 or better. The
        authors use bfloat16.
      conflict_tolerance: how far below weak a cosine must be; 0 is the authors', 1e-5 is safe.

    Returns:
      A combiner. State: 4 (K + 1) bytes a f32 parameter, and ``arbitrate_conflicts``'s telemetry.

    Raises:
      ValueError: if an argument is out of range; from ``update``, for a leaf whose task axis or
        shape does not fit, and without parameters under ``use_lion``.
      TypeError: for complex or integer leaves.

    A single task is averaged like a sum. Task weights belong on the losses; several batches an
    update are ``accumulate_task_grads``. Under ``use_lion`` the result does not vanish with the
    gradient, and every leaf takes a step of like relative size.

    >>> combiner = gcond(momentum=0.5)
    >>> state = combiner.init(jnp.zeros(2), 2)
    >>> for size in (1.0, 4.0):  # no conflict: sums (1, 1) and (4, 4), then (1/2 + 4) / 1.5
    ...     grads, state = combiner.update(size * jnp.eye(2), state)
    >>> grads.tolist()
    [3.0, 3.0]

    Reference: Alves Limarenko et al., "GCond: Gradient Conflict Resolution via Accumulation-based
    Stabilization for Large-Scale Multi-Task Learning", 2025, arXiv 2509.07252. Agrees with the
    authors' code, in f32.
    """
    check_range(momentum=momentum, ge=0, lt=1)
    check_range(trust_ratio_coef=trust_ratio_coef, trust_ratio_clip=trust_ratio_clip, gt=0)
    arbitrator = arbitrate_conflicts(
        conflict_thresholds=conflict_thresholds,
        smooth=smooth,
        remap_power=remap_power,
        tie_breaking_weights=tie_breaking_weights,
        dominance_window=dominance_window,
        norm_ema_decay=norm_ema_decay,
        max_iters=max_iters,
        norm_cap=norm_cap,
        eps=eps,
        buffer_dtype=buffer_dtype,
        conflict_tolerance=conflict_tolerance,
    )

    def init(params: PyTree, num_tasks: int) -> GCondState:
        combiner_state = arbitrator.init(params, num_tasks)
        return GCondState(zero_count(), buffers(params, buffer_dtype), combiner_state)

    def update(
        task_grads: PyTree, state: GCondState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, GCondState]:
        if use_lion and params is None:
            raise ValueError("gcond with use_lion needs the parameters: give update params")
        check_tasks(task_grads, state.combiner_state.norm_mean.shape[0], params)
        total, combiner_state = arbitrator.update(
            widen(task_grads), state.combiner_state, params, **extra
        )
        count = next_count(state.count)
        correction = one_minus_power(momentum, count)

        def average(m: Array, g: Array) -> Array:
            return (momentum * m + (1 - momentum) * g).astype(g.dtype)

        def lion(m: Array, p: Array) -> Array:
            norm, own = safe_norm(m), safe_norm(jnp.asarray(p, m.dtype))
            small = (norm < eps) | (own < eps)
            ratio = jnp.where(small, 1, own / jnp.where(small, 1, norm))
            return jnp.sign(m) * (jnp.minimum(ratio, trust_ratio_clip) * trust_ratio_coef)

        wide = jax.tree.map(average, state.mu, total)
        result = jax.tree.map(lambda m: (m / correction).astype(m.dtype), wide)
        if return_raw:
            result = total
        elif use_lion:
            result = jax.tree.map(lion, result, params)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), wide, state.mu)
        return narrow_like(result, task_grads), GCondState(count, mu, combiner_state)

    return GradientCombiner(init, update)


class AccumulateTaskGradsState(NamedTuple):
    """``count``: int32. ``task_sum``: the window's task gradients added up. ``inner_state``."""

    count: Array
    task_sum: PyTree
    inner_state: PyTree


def accumulate_task_grads(
    every_k: int, inner: optax.GradientTransformation, *, num_tasks: int
) -> GradientTransformation:
    r"""Averages stacked gradients over several calls, then makes one update of them.

    .. math::

        \bar g_k = \frac{1}{n} \sum_{s=1}^{n} g_{k,s}

    Calls in between give zero updates and leave ``inner`` as it is: ``optax.MultiSteps`` for
    stacked gradients.

    Args:
      every_k: calls in a window, n, >= 1.
      inner: a transformation of stacked gradients: ``with_combiner(...)``.
      num_tasks: number of tasks K, >= 1.

    Returns:
      A transformation of stacked gradients. State: 4 K bytes a f32 parameter and the inner state.

    Raises:
      ValueError: if ``every_k`` or ``num_tasks`` is below 1; from ``update``, for a leaf whose task
        axis or shape does not fit.
      TypeError: for complex or integer leaves.

    Conflicts between averages are fewer than between the noisy gradients of single batches. Extra
    arguments reach ``inner`` in the last call of a window only.

    >>> import jax.numpy as jnp, optax
    >>> from optimkit.multitask import sum_combiner, with_combiner
    >>> tx = accumulate_task_grads(
    ...     2, with_combiner(sum_combiner(), optax.sgd(1.0), num_tasks=2), num_tasks=2
    ... )
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for size in (1.0, 3.0):  # means 2 and 2, then their sum
    ...     updates, state = tx.update(jnp.full((2, 1), size), state, params)
    ...     print(updates.tolist())
    [0.0]
    [-4.0]

    Reference: Alves Limarenko et al., "GCond: Gradient Conflict Resolution via Accumulation-based
    Stabilization for Large-Scale Multi-Task Learning", 2025, arXiv 2509.07252.
    """
    check_count(every_k=every_k, least=1)
    check_count(num_tasks=num_tasks, least=1)
    inner_tx = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> AccumulateTaskGradsState:
        check_real(params, "parameter")
        task_sum = buffers(params, jnp.float32, num_tasks)
        return AccumulateTaskGradsState(zero_count(), task_sum, inner_tx.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AccumulateTaskGradsState]:
        check_tasks(updates, num_tasks, params)
        count = next_count(state.count)
        total = jax.tree.map(
            lambda s, g: s + g.astype(s.dtype) / every_k, state.task_sum, widen(updates)
        )

        def full(total: PyTree, inner_state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            like = updates if params is None else params
            new, inner_state = inner_tx.update(
                narrow_like(total, updates), inner_state, params, **extra
            )
            return narrow_like(new, like), jax.tree.map(jnp.zeros_like, total), inner_state

        shapes: Any = jax.eval_shape(full, total, state.inner_state)[0]

        def partial(total: PyTree, inner_state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            zeros = jax.tree.map(lambda t, s: jnp.zeros_like(t[0], dtype=s.dtype), total, shapes)
            return zeros, total, inner_state

        new, total, inner_state = jax.lax.cond(
            count % every_k == 0, full, partial, total, state.inner_state
        )
        return new, AccumulateTaskGradsState(count, total, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


_PAPER = (
    'Alves Limarenko et al., "GCond: Gradient Conflict Resolution via Accumulation-based '
    'Stabilization for Large-Scale Multi-Task Learning", 2025, arXiv 2509.07252'
)
_REFERENCE = "AlevLab-dev/GCond@1b0518a962844a46ec956173e8a6d5bf64261f5b:grad_conductor.py"

RECORDS = (  # bytes are those of two tasks
    Method(
        factory=gcond,
        kind="combiner",
        summary="resolve conflicts pair by pair, then a momentum in place of the optimizer's own",
        example={"conflict_tolerance": 1e-4},
        traced=(
            "momentum",
            "remap_power",
            "norm_ema_decay",
            "norm_cap",
            "trust_ratio_coef",
            "trust_ratio_clip",
            "eps",
            "conflict_tolerance",
        ),
        static=(
            "conflict_thresholds",
            "smooth",
            "tie_breaking_weights",
            "dominance_window",
            "max_iters",
            "return_raw",
            "use_lion",
            "buffer_dtype",
        ),
        position="first",
        communication="reduce",
        response="proportional",
        state_bytes=12,
        moved_bytes=44,
        paper=_PAPER,
        reference=_REFERENCE,
    ),
    Method(
        factory=accumulate_task_grads,
        kind="combiner",
        summary="averages stacked gradients over several calls, then makes one update of them",
        example={"every_k": 2, "num_tasks": 2},
        example_made={"inner": lambda: optax.stateless(lambda grads, params: sum_tasks(grads))},
        static=("every_k", "inner", "num_tasks"),
        needs=("params",),
        position="alone",
        communication="none",
        response="proportional",
        state_bytes=8,
        moved_bytes=32,
        paper=_PAPER,
        reference=_REFERENCE,
    ),
)
