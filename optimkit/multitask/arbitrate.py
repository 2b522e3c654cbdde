"""Conflicts between tasks resolved pair by pair, the worst first: the core of GCond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.leaves import check_match, narrow_like
from optimkit.multitask.pcgrad import init_cosines, measure_cosines
from optimkit.multitask.tasks import (
    check_tasks,
    mix_tasks,
    sum_tasks,
    task_gram,
    task_products,
)
from optimkit.numerics import check_count, check_range, compute_dtype, safe_div
from optimkit.protocols import Array, GradientCombiner, Method, PyTree


class ArbitrateState(NamedTuple):
    """What the arbitrator remembers.

    ``previous_gradient``: every task's last gradient after its conflicts were resolved, stacked.
    ``norm_mean``: running mean of the tasks' norms, (K,). ``winners``: numbers of the last winners,
    the newest last, -1 where there was none yet. ``task_cosines`` and ``metrics``: of the last
    update, before conflicts were resolved.
    """

    previous_gradient: PyTree
    norm_mean: Array
    winners: Array
    task_cosines: Array
    metrics: Mapping[str, Array]


class Rules(NamedTuple):
    """The settings of ``resolve_conflicts``; ``arbitrate_conflicts`` explains them."""

    thresholds: tuple[Any, Any, Any]
    smooth: bool
    remap_power: Any
    weights: tuple[Any, Any]
    eps: Any
    tolerance: Any


def effective_angle(cosine: Array, rules: Rules) -> Array:
    """The angle by which the smooth form goes: 0 at the weak threshold, pi/2 at main, pi at crit.

    >>> rules = Rules((-0.8, -0.5, 0.0), True, 2.0, (0.8, 0.2), 0.0, 0.0)
    >>> [round(float(effective_angle(jnp.array(c), rules)), 3) for c in (0.0, -0.5, -0.65, -0.9)]
    [0.0, 1.571, 1.963, 3.142]
    """
    crit, main, weak = rules.thresholds
    mild = (np.pi / 2) * (1 - jnp.clip((cosine - main) / (weak - main + rules.eps), 0, 1))
    part = safe_div(cosine - main, jnp.asarray(crit - main + rules.eps, cosine.dtype))
    strong = (np.pi / 2) * (1 + jnp.clip(part, 0, 1) ** rules.remap_power)
    return jnp.where(cosine >= main, mild, jnp.where(cosine > crit, strong, np.pi))


def resolve_conflicts(
    gram: Array,
    cross: Array,
    previous_norms: Array,
    norm_mean: Array,
    winners: Array,
    start: Array,
    rules: Rules,
    max_iters: int,
) -> tuple[Array, Array, Array]:
    """All conflicts between K gradients, on their inner products alone.

    Args:
      gram: inner products of the gradients, (K, K).
      cross: their inner products with the previous gradients, (K, K).
      previous_norms: norms of the previous gradients, (K,).
      norm_mean: running means of the norms, (K,).
      winners: numbers of the last winners.
      start: factors that the gradients start with, (K,).
      rules: the settings.
      max_iters: how many pairs may be resolved.

    Returns:
      Coefficients of the resolved gradients in the given ones, (K, K); the winners; and how many
      pairs were resolved.
    """
    tasks = gram.shape[0]
    crit, main, weak = rules.thresholds
    eps = rules.eps
    numbers = jnp.arange(tasks)
    pairs = np.triu(np.ones((tasks, tasks), bool), k=1)
    window = winners.shape[0]

    def resolve(_: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        mix, winners, resolved, active = carry
        products = mix @ gram @ mix.T
        squares = jnp.maximum(jnp.diagonal(products), 0)
        norms = jnp.sqrt(squares)
        cosines = products / (norms[:, None] * norms[None] + eps)
        usable = squares >= eps
        cosines = jnp.where(pairs & usable[:, None] & usable[None], cosines, jnp.inf)
        cosine = jnp.min(cosines)
        active &= cosine < weak - rules.tolerance
        place = jnp.argmin(cosines)
        first, second = place // tasks, place % tasks

        # Who wins: whoever kept closer to the own last gradient and is stronger than usual, unless
        # the same task won every time.
        kept = jnp.sum(mix * cross.T, axis=1) / (norms * previous_norms + eps)
        strength = norms / (norm_mean + eps)

        def score(task: Array) -> Array:
            share = strength[task] / (strength[first] + strength[second] + eps)
            return rules.weights[0] * jnp.maximum(kept[task], 0) + rules.weights[1] * share

        second_wins = score(second) > score(first)
        if window:
            second_wins = jnp.where(jnp.all(winners == first), True, second_wins)
            second_wins = jnp.where(jnp.all(winners == second), False, second_wins)
        winner = jnp.where(second_wins, second, first)
        loser = jnp.where(second_wins, first, second)

        product = products[first, second]
        off_loser = product / (squares[loser] + eps)
        off_winner = product / (squares[winner] + eps)
        cosine = jnp.clip(cosine, -1, 1)
        if rules.smooth:
            angle = effective_angle(cosine, rules)
            new_winner = mix[winner] - jnp.sin(angle) * off_loser * mix[loser]
            turned = jnp.sin(jnp.minimum(angle, np.pi / 2))
            new_loser = mix[loser] - turned * off_winner * mix[winner]
            decided = active
        else:
            both = cosine >= main
            new_winner = mix[winner] - jnp.where(both, off_loser, 0) * mix[loser]
            new_loser = mix[loser] - off_winner * mix[winner]
            new_loser = jnp.where(cosine < crit, 0, new_loser)
            decided = active & ~both

        new = jnp.where((numbers == winner)[:, None], new_winner[None], mix)
        new = jnp.where((numbers == loser)[:, None], new_loser[None], new)
        mix = jnp.where(active, new, mix).astype(gram.dtype)
        if window:
            latest = jnp.concatenate([winners[1:], winner[None].astype(winners.dtype)])
            winners = jnp.where(decided, latest, winners)
        return mix, winners, resolved + active, active

    mix = jnp.eye(tasks, dtype=gram.dtype) * start[None]
    begin = (mix, winners, jnp.zeros((), jnp.int32), jnp.ones((), bool))
    mix, winners, resolved, _ = jax.lax.fori_loop(0, max_iters, resolve, begin)
    return mix, winners, resolved


def buffers(params: PyTree, dtype: Any, tasks: int | None = None) -> PyTree:
    """Zeros for every parameter, or for every task's, that take its sharding.

    f32 stands for f32 or better; another dtype is taken as it is.
    """
    wanted = jnp.dtype(dtype)

    def zeros(p: Any) -> Array:
        kind = compute_dtype(p) if wanted == jnp.float32 else wanted
        z = jnp.zeros_like(p, dtype=kind)
        if tasks is None:
            return z
        return jnp.broadcast_to(jnp.expand_dims(z, 0), (tasks, *np.shape(p)))

    return jax.tree.map(zeros, params)


def _check_rules(rules: Rules, window: int, max_iters: int | None, norm_cap: Any) -> None:
    for name, values, length in (
        ("conflict_thresholds", rules.thresholds, 3),
        ("tie_breaking_weights", rules.weights, 2),
    ):
        if not isinstance(values, Sequence) or len(values) != length:
            raise ValueError(f"{name} must be {length} numbers, got {values!r}")
    check_range(conflict_thresholds=np.asarray(rules.thresholds), ge=-1, le=1)
    if list(rules.thresholds) != sorted(rules.thresholds):
        raise ValueError(
            f"conflict_thresholds must not decrease (critical, main, weak), got {rules.thresholds}"
        )
    check_range(tie_breaking_weights=np.asarray(rules.weights), ge=0)
    check_range(remap_power=rules.remap_power, norm_cap=norm_cap, eps=rules.eps, gt=0)
    check_range(conflict_tolerance=rules.tolerance, ge=0)
    check_count(dominance_window=window)
    if max_iters is not None:
        check_count(max_iters=max_iters, least=1)


def arbitrate_conflicts(
    *,
    conflict_thresholds: tuple[float, float, float] = (-0.8, -0.5, 0.0),
    smooth: bool = True,
    remap_power: Any = 2.0,
    tie_breaking_weights: tuple[float, float] = (0.8, 0.2),
    dominance_window: int = 3,
    norm_ema_decay: Any = 0.95,
    max_iters: int | None = None,
    norm_cap: Any = None,
    eps: Any = 1e-8,
    buffer_dtype: Any = jnp.float32,
    conflict_tolerance: Any = 0.0,
) -> GradientCombiner:
    r"""Resolves conflicts pair by pair, worst first; a winner keeps more than the loser; then adds.

    While the smallest cosine between two tasks is below the weak threshold, that pair is resolved.
    The winner has the higher score

    .. math::

        0.8 \max\left(\cos(g_k, g_k^{prev}), 0\right) + 0.2\, \frac{q_k}{q_i + q_j}, \qquad
        q_k = \|g_k\| / e_k

    with the running mean :math:`e_k` of the norms; but a task that won ``dominance_window`` times
    in a row loses. In the smooth form, with an angle :math:`a` that grows from 0 at the weak
    threshold over :math:`\pi/2` at the main one to :math:`\pi` at the critical one, and
    :math:`d = \langle g_w, g_l \rangle`, both at once:

    .. math::

        g_w \leftarrow g_w - \sin(a)\, \frac{d}{\|g_l\|^2 + \epsilon}\, g_l, \qquad
        g_l \leftarrow g_l - \sin(\min(a, \pi/2))\, \frac{d}{\|g_w\|^2 + \epsilon}\, g_w

    Args:
      conflict_thresholds: cosines (critical, main, weak), not decreasing, in [-1, 1].
      smooth: the form above; False: below critical the loser becomes 0, below main it alone is
        projected, below weak both are, and nobody wins.
      remap_power: how the angle grows between main and critical, > 0.
      tie_breaking_weights: weights of stability and strength in the score, >= 0.
      dominance_window: wins in a row after which a task loses, >= 0; 0: never.
      norm_ema_decay: decay of the norms' running means, in [0, 1); they start at 1.
      max_iters: most pairs resolved in one update, >= 1; default 2 K.
      norm_cap: longer gradients are first scaled to this norm, > 0; default no cap.
      eps: added to norms and squares, > 0; a task whose squared norm is below it takes no part.
      buffer_dtype: dtype of the previous gradients; f32 stands for f32 or better. The authors use
        bfloat16.
      conflict_tolerance: a pair conflicts only if its cosine is this far below weak, >= 0. With 0,
        the authors' rule, a pair just made orthogonal may conflict again by rounding, and who wins
        later hangs on it; 1e-5 is safe in f32.

    Returns:
      A combiner. State: 4 K bytes a f32 parameter, K norms, the winners, and telemetry:
      ``task_cosines``, ``min_cosine``, ``conflict_fraction`` and ``resolved_pairs``.

    Raises:
      ValueError: if an argument is out of range; from ``update``, for a leaf whose task axis or
        shape does not fit.
      TypeError: for complex or integer leaves.

    A single task passes unchanged. eps is absolute: norms below 1e-4 count as no gradient, and as
    running means start at 1, the scale of the gradients matters for about 20 updates. At a cosine
    below critical the smooth form leaves the winner as it is and makes the loser orthogonal to it.
    What is compared with the next gradient is the resolved one, and the dominant task loses: so
    does the authors' code, though its comments say otherwise.

    >>> combiner = arbitrate_conflicts(conflict_tolerance=1e-5)
    >>> task_grads = jnp.array([[2.0, 0.0], [-2.0, 0.5]])  # cosine -0.97: the loser gives way
    >>> grads, state = combiner.update(task_grads, combiner.init(jnp.zeros(2), 2))
    >>> [round(float(g), 3) for g in grads], state.winners.tolist()
    ([-1.882, 0.971], [-1, -1, 1])

    Reference: Alves Limarenko et al., "GCond: Gradient Conflict Resolution via Accumulation-based
    Stabilization for Large-Scale Multi-Task Learning", 2025, arXiv 2509.07252. Agrees with the
    authors' code.
    """
    rules = Rules(
        conflict_thresholds, smooth, remap_power, tie_breaking_weights, eps, conflict_tolerance
    )
    _check_rules(rules, dominance_window, max_iters, norm_cap)
    check_range(norm_ema_decay=norm_ema_decay, ge=0, lt=1)

    def init(params: PyTree, num_tasks: int) -> ArbitrateState:
        cosines, metrics = init_cosines(params, num_tasks)
        metrics = {**metrics, "resolved_pairs": jnp.zeros((), cosines.dtype)}
        norm_mean = jnp.ones(num_tasks, cosines.dtype)
        winners = jnp.full(dominance_window, -1, jnp.int32)
        previous = buffers(params, buffer_dtype, num_tasks)
        return ArbitrateState(previous, norm_mean, winners, cosines, metrics)

    def update(
        task_grads: PyTree, state: ArbitrateState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ArbitrateState]:
        del extra
        dtype = state.norm_mean.dtype
        tasks = check_tasks(task_grads, state.norm_mean.shape[0], params)
        previous = state.previous_gradient
        check_match(task_grads, previous, what="task gradient", like="the state")
        gram = task_gram(task_grads, tasks).astype(dtype)
        cosines, metrics = measure_cosines(gram, dtype)
        if tasks == 1:
            stored = jax.tree.map(lambda g, old: g.astype(old.dtype), task_grads, previous)
            metrics = {**metrics, "resolved_pairs": state.metrics["resolved_pairs"]}
            combined = narrow_like(sum_tasks(task_grads), task_grads)
            return combined, state._replace(
                previous_gradient=stored, task_cosines=cosines, metrics=metrics
            )

        norms = jnp.sqrt(jnp.diagonal(gram))
        norm_mean = norm_ema_decay * state.norm_mean + (1 - norm_ema_decay) * norms
        norm_mean = jnp.maximum(norm_mean, eps).astype(dtype)
        start = jnp.ones_like(norms)
        if norm_cap is not None:
            start = jnp.where(norms > norm_cap, norm_cap / (norms + eps), 1).astype(dtype)
        mix, winners, resolved = resolve_conflicts(
            gram,
            task_products(task_grads, previous, tasks).astype(dtype),
            jnp.sqrt(jnp.diagonal(task_gram(previous, tasks))).astype(dtype),
            norm_mean,
            state.winners,
            start,
            rules,
            max_iters or 2 * tasks,
        )
        separate = mix_tasks(task_grads, mix)
        combined = narrow_like(sum_tasks(separate), task_grads)
        stored = jax.tree.map(lambda g, old: g.astype(old.dtype), separate, previous)
        metrics = {**metrics, "resolved_pairs": resolved.astype(dtype)}
        return combined, ArbitrateState(stored, norm_mean, winners, cosines, metrics)

    return GradientCombiner(init, update)


RECORD = Method(
    factory=arbitrate_conflicts,
    kind="combiner",
    summary="resolve conflicts pair by pair, worst first, in favour of the steadier task; add",
    example={"conflict_tolerance": 1e-4},
    traced=("remap_power", "norm_ema_decay", "norm_cap", "eps", "conflict_tolerance"),
    static=(
        "conflict_thresholds",
        "smooth",
        "tie_breaking_weights",
        "dominance_window",
        "max_iters",
        "buffer_dtype",
    ),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=8,
    moved_bytes=36,
    paper='Alves Limarenko et al., "GCond: Gradient Conflict Resolution via Accumulation-based '
    'Stabilization for Large-Scale Multi-Task Learning", 2025, arXiv 2509.07252',
    reference="AlevLab-dev/GCond@1b0518a962844a46ec956173e8a6d5bf64261f5b:grad_conductor.py",
)
