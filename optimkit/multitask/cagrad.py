"""CAGrad: near the mean gradient, the direction that helps the worst task most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import narrow_like
from optimkit.matrices import decompositions
from optimkit.multitask.pcgrad import init_cosines, measure_cosines
from optimkit.multitask.tasks import check_tasks, mix_tasks, task_gram
from optimkit.numerics import check_choice, check_count, check_range, safe_div
from optimkit.protocols import Array, GradientCombiner, Method, PyTree

STEP_SIZES = tuple(2.0**-k for k in range(12))
"""Parts of a Newton step that the solver chooses from."""

TO_WALL = 0.9
"""How far towards the simplex's wall a step may go."""


class CAGradState(NamedTuple):
    """``task_cosines``, (K, K), ``task_weights``, (K,), and ``metrics`` of the last update."""

    task_cosines: Array
    task_weights: Array
    metrics: Mapping[str, Array]


def worst_case_weights(gram: Array, radius: Any, iters: int = 50, eps: Any = 1e-8) -> Array:
    r"""Minimises :math:`w^T A 1/K + C \sqrt{w^T A w + \epsilon}` over the simplex.

    Two tasks: ``iters`` bisections. More: ``iters`` Newton steps inside the simplex, whose wall
    (a logarithmic barrier) becomes weaker in every step. The error falls by half or more a step.

    Args:
      gram: the inner products, shape ``(K, K)``, scaled so that their diagonal averages about 1.
      radius: C, >= 0.
      iters: number of steps.
      eps: smooths the root, > 0.

    Returns:
      Weights, >= 0, that sum to 1.

    >>> [round(float(w), 3) for w in worst_case_weights(jnp.eye(2), 0.5)]
    [0.5, 0.5]
    """
    tasks = gram.shape[0]
    linear = jnp.mean(gram, axis=1)

    def slope(w: Array) -> Array:
        image = gram @ w
        return linear + radius * image / jnp.sqrt(jnp.maximum(w @ image, 0) + eps)

    if tasks == 1:
        return jnp.ones_like(linear)
    if tasks == 2:

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            down = slope(jnp.stack([middle, 1 - middle]))
            falls = down[0] < down[1]
            return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

        first = linear[0]
        low, high = jax.lax.fori_loop(
            0, iters, halve, (jnp.zeros_like(first), jnp.ones_like(first))
        )
        # The ends themselves are never a middle: closer than rounding, the end is meant.
        x = (low + high) / 2
        near = 2.0 ** -min(iters, 20)
        x = jnp.where(low == 0, jnp.where(high <= near, 0, x), x)
        x = jnp.where((high == 1) & (1 - low <= near), 1, x).astype(gram.dtype)
        return jnp.stack([x, 1 - x])

    precision = jnp.finfo(gram.dtype).eps
    sizes = jnp.asarray(STEP_SIZES, gram.dtype)
    identity = jnp.eye(tasks, dtype=gram.dtype)

    def newton(index: Any, w: Array) -> Array:
        wall = jnp.maximum(0.5 ** (index + 2.0), precision).astype(gram.dtype)
        image = gram @ w
        root = jnp.sqrt(jnp.maximum(w @ image, 0) + eps)
        turned = image / root
        down = linear + radius * turned
        curved = radius * (gram - turned[:, None] * turned[None]) / root
        # In units of w, where the barrier's curvature is the identity.
        scaled = w[:, None] * curved * w[None] + wall * identity
        # The cone is flat along w itself. Steps have no part there, so a curvature may be added.
        scaled += jnp.trace(scaled) * (w[:, None] * w[None] / (w @ w) + precision * identity)
        solved = decompositions.solve(scaled, jnp.stack([w * down - wall, w], axis=1))
        level = safe_div(w @ solved[:, 0], w @ solved[:, 1])
        step = level * solved[:, 1] - solved[:, 0]
        longest = jnp.minimum(1, TO_WALL / jnp.maximum(jnp.max(-step), TO_WALL))
        direction = w * step

        def ascent(size: Array) -> Array:
            moved = w + size * longest * direction
            return (slope(moved) - wall / moved) @ direction

        # The longest part of the step at whose end the way still leads down, or hardly up: beyond
        # rounding, by which alone the last steps rise.
        rises = jax.vmap(ascent)(sizes)
        noise = 16 * precision * jnp.sum(jnp.abs(direction) * (jnp.abs(down) + wall / w))
        fine = rises <= 0.25 * jnp.abs(ascent(jnp.zeros((), gram.dtype))) + noise
        size = jnp.max(jnp.where(fine, sizes, 0)) * longest
        w = w + size * direction
        return w / jnp.sum(w)

    return jax.lax.fori_loop(0, iters, newton, jnp.full_like(linear, 1 / tasks))


def cagrad(
    c: Any = 0.5,
    *,
    rescale: Literal[0, 1, 2] = 1,
    solver: Literal["exact"] = "exact",
    solver_iters: int = 50,
    eps: Any = 1e-8,
    scale_by_num_tasks: bool = False,
) -> GradientCombiner:
    r"""Within a ball round the mean gradient, takes the step that helps the worst-off task most.

    With the mean gradient :math:`g_0` and :math:`C = c \|g_0\|`, over weights w of the simplex:

    .. math::

        w^* = \arg\min_w \langle g_w, g_0 \rangle + C \|g_w\|, \quad g_w = \sum_k w_k g_k, \qquad
        g = g_0 + \frac{C}{\|g_{w^*}\|}\, g_{w^*}

    Args:
      c: radius of the ball in units of the mean gradient's norm, >= 0; 0 gives the mean. The
        authors use 0.4 and 0.5 for scenes and 0.5 on their toy.
      rescale: 0: g as it is; 1: over :math:`1 + c^2`; 2: over :math:`1 + c`.
      solver: ``"exact"``: the optimum to rounding.
      solver_iters: steps of the solver, >= 1; bisections for two tasks, Newton steps for more.
      eps: added to the squared norms under the roots and to C and the norm of :math:`g_w`, > 0, in
        units in which the mean squared norm of the tasks is 1.
      scale_by_num_tasks: multiply the result by K, to compare with a sum of losses.

    Returns:
      A combiner. No state but telemetry: ``task_cosines``, ``task_weights`` (w), ``min_cosine`` and
      ``conflict_fraction``.

    Raises:
      ValueError: if an argument is out of range; from ``update``, for a leaf whose task axis or
        shape does not fit.
      TypeError: for complex or integer leaves.

    A single task comes back times :math:`(1 + c)` over the rescaling: it does not pass unchanged.
    The result follows the scale of the gradients; published programs add eps to unscaled norms and
    call a solver with absolute tolerances, which stops at its start for norms below 5e-3. Where
    the tasks' gradients cancel in :math:`g_w` to less than rounding, its norm counts as
    :math:`\sqrt{\text{machine epsilon}}` of theirs, so that noise is not blown up.

    >>> import jax.numpy as jnp
    >>> combiner = cagrad(c=0.5, rescale=0)
    >>> task_grads = jnp.array([[2.0, 0.0], [0.0, 2.0]])  # mean (1, 1), which both like best
    >>> grads, _ = combiner.update(task_grads, combiner.init(jnp.zeros(2), 2))
    >>> [round(float(g), 4) for g in grads]
    [1.5, 1.5]

    Reference: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", 2021,
    arXiv 2110.14048.
    """
    check_range(c=c, ge=0)
    check_range(eps=eps, gt=0)
    check_count(solver_iters=solver_iters, least=1)
    check_choice(("exact",), solver=solver)
    if rescale not in (0, 1, 2):
        raise ValueError(f"rescale must be 0, 1 or 2, got {rescale!r}")

    def init(params: PyTree, num_tasks: int) -> CAGradState:
        cosines, metrics = init_cosines(params, num_tasks)
        weights = jnp.full(num_tasks, 1 / num_tasks, cosines.dtype)
        return CAGradState(cosines, weights, metrics)

    def update(
        task_grads: PyTree, state: CAGradState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, CAGradState]:
        del extra
        tasks = check_tasks(task_grads, state.task_weights.shape[0], params)
        gram = task_gram(task_grads, tasks)
        unit = safe_div(gram, jnp.mean(jnp.diagonal(gram)))
        radius = c * jnp.sqrt(jnp.maximum(jnp.mean(unit), 0) + eps) + eps
        w = worst_case_weights(unit, radius.astype(unit.dtype), solver_iters, eps)
        # A norm that is nothing but the rounding of terms that cancel is not smaller than that.
        rounding = jnp.finfo(unit.dtype).eps * (w @ jnp.diagonal(unit))
        norm = jnp.sqrt(jnp.maximum(w @ unit @ w, rounding))
        mix = 1 / tasks + radius / (norm + eps) * w
        mix = mix / (1, 1 + c**2, 1 + c)[rescale] * (tasks if scale_by_num_tasks else 1)
        combined = narrow_like(mix_tasks(task_grads, mix), task_grads)
        cosines, metrics = measure_cosines(gram, state.task_cosines.dtype)
        return combined, CAGradState(cosines, w.astype(state.task_weights.dtype), metrics)

    return GradientCombiner(init, update)


RECORD = Method(
    factory=cagrad,
    kind="combiner",
    summary="near the mean gradient, the direction that helps the worst-off task most",
    traced=("c", "eps"),
    static=("rescale", "solver", "solver_iters", "scale_by_num_tasks"),
    position="first",
    communication="reduce",
    response="proportional",
    moved_bytes=20,
    paper='Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", 2021, '
    "arXiv 2110.14048",
    reference="median-research-group/LibMTL@4336804847eaa5e0b924b743d76beec7ac3fdc97:"
    "LibMTL/weighting/CAGrad.py",
    licence="MIT",
)
