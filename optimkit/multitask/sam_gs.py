"""SAM-GS, Similarity-Aware Momentum Gradient Surgery: conflict read from gradient magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.leaves import check_match, check_real, narrow_like, widen, zero_count
from optimkit.multitask.combine import with_combiner
from optimkit.multitask.tasks import (
    check_tasks,
    over_pairs,
    pair_similarities,
    per_task,
    sum_tasks,
    task_norms,
    zeros_per_task,
)
from optimkit.numerics import (
    LARGE,
    check_choice,
    check_count,
    check_range,
    compute_dtype,
    next_count,
    one_minus_power,
    safe_div,
    saturate,
)
from optimkit.protocols import Array, GradientCombiner, GradientTransformation, Method, PyTree

SIMILARITY_TESTS = ("mean", "any")
CLIP_EPS = 1e-6
"""Added to the norm before the division, as torch's ``clip_grad_norm_`` does."""


class SamGsState(NamedTuple):
    """What SAM-GS remembers.

    ``count``: int32 scalar. ``mu``: first moment of every task, stacked like the gradients.
    ``dissimilarity``: second moment of ``1 - similarity``, one scalar. ``metrics``: the mean
    similarity of the last step, and whether the norms were equalised in it.
    """

    count: Array
    mu: PyTree
    dissimilarity: Array
    metrics: Mapping[str, Array]


def equalize_task_norms(task_grads: PyTree, norms: Array | None = None) -> PyTree:
    r"""Rescales every task's gradient to the mean norm of all: :math:`g_k \bar n / n_k`.

    Args:
      task_grads: the stacked tree, in f32 at least.
      norms: the tasks' norms, if at hand; default ``task_norms(task_grads)``.

    Returns:
      A stacked tree. A task of norm 0 stays 0.

    >>> equalize_task_norms(jnp.array([[1.0, 0.0], [0.0, 3.0]])).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    n: Array = task_norms(task_grads) if norms is None else norms
    mean = jnp.mean(n)
    # Direction first: the quotient mean/norm alone would overflow for a vanishing task.
    return jax.tree.map(lambda g: (safe_div(g, per_task(n, g)) * mean).astype(g.dtype), task_grads)


def modulate_by_task_momentum(task_grads: PyTree, mu: PyTree, dissimilarity: Array) -> PyTree:
    r"""Weighs every entry by its own momentum: :math:`g_k\, |\hat m_k| / \sqrt{\hat v}`.

    Args:
      task_grads: the stacked tree, in f32 at least; entries above 1e15 (f32) count as 1e15.
      mu: bias-corrected first moment of every task, stacked likewise.
      dissimilarity: bias-corrected second moment of the dissimilarity, a scalar > 0.

    Returns:
      A stacked tree.

    >>> g = jnp.array([[1.0, -2.0]])
    >>> modulate_by_task_momentum(g, jnp.array([[0.5, -0.5]]), jnp.array(0.25)).tolist()
    [[1.0, -2.0]]
    """
    root = jnp.sqrt(dissimilarity)

    def modulate(g: Array, m: Array) -> Array:
        # Not ``saturate``: shared with the moment's, it would be stored instead of fused.
        limit = LARGE[g.dtype.itemsize]
        return (jnp.clip(g, -limit, limit) * (jnp.abs(m) / root)).astype(g.dtype)

    return jax.tree.map(modulate, task_grads, mu)


def clip_combined(grads: PyTree, max_norm: Any) -> PyTree:
    """Scales a tree by ``min(1, max_norm / (norm + 1e-6))``: torch's clip of the global norm."""
    (norm,) = task_norms(jax.tree.map(lambda g: jnp.expand_dims(g, 0), grads))
    factor = jnp.minimum(1.0, max_norm / (norm + CLIP_EPS))
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)


def sam_gs(
    b1: Any = 0.9,
    b2: Any = 0.99,
    gamma: Any = 0.1,
    *,
    eps: Any = 1e-8,
    similarity: Literal["mean", "any"] = "mean",
    scale_by_num_tasks: bool = False,
    max_norm: Any = None,
) -> GradientCombiner:
    r"""Combines task gradients by the similarity of their norms; it turns no gradient.

    With the norms :math:`n_k` of the K tasks over the whole tree:

    .. math::

        s &= \operatorname{mean}_{i<j} \frac{2 n_i n_j}{n_i^2 + n_j^2} \\
        m_t &= b_1 m_{t-1} + (1-b_1) G, \qquad
        v_t = b_2 v_{t-1} + (1-b_2)(1-s)^2 + \epsilon \\
        g &= \sum_k G_k \frac{\bar n}{n_k} \;\text{ if } s < \gamma, \qquad
        g = \sum_k G_k \odot \frac{|m_{t,k}| / (1-b_1^t)}{\sqrt{v_t / (1-b_2^t)}} \;\text{ else}

    Both moments advance in both branches; eps is added in every step, inside the recursion.

    The second branch is quadratic in the gradient, and its scale jumps against the first: clip the
    result (``max_norm``), or let a scale-invariant optimizer follow.

    Args:
      b1: decay of every task's first moment, in [0, 1).
      b2: decay of the second moment of the dissimilarity, in [0, 1).
      gamma: norms are equalised below this similarity, in [0, 1]. The default 0.1 is the class
        default and the toys' value; the authors use 0.7 for CelebA, Cityscapes and NYUv2, and 0.9
        with ``similarity="any"`` for reinforcement learning. Tune it.
      eps: > 0. It bounds the gain ``1/sqrt(v)`` by ``sqrt((1-b2)/eps)``: 1000 at the defaults.
      similarity: equalise where the mean over pairs is below gamma, or where any pair is. ``v``
        uses the mean in both cases.
      scale_by_num_tasks: multiply the result by K, as the authors do before they clip.
      max_norm: clip the global norm of the result to this, > 0, by torch's
        ``min(1, max_norm / (norm + 1e-6))``. Default None: no clip; the authors use 1.

    Returns:
      A combiner. Its output has the dtype of the stacked leaf; it computes in f32 at least. Its
      state takes 4 K bytes a f32 parameter, and reports ``task_similarity`` and
      ``norms_equalized``.

    Raises:
      ValueError: if an argument is out of range; from ``update``, for a leaf whose task axis or
        shape is not the state's.
      TypeError: for complex or integer leaves.

    A task of norm 0 is equalised to 0; two tasks of norm 0 have similarity 1, a zero and a non-zero
    one 0 (the authors' code divides 0 by 0). A single task passes unchanged, before scale and clip.
    In the second branch entries above 1e15 (f32) count as 1e15. A non-finite gradient of one task
    shows in the result and poisons the moments for good: guard the stacked gradients.

    The authors' file for reinforcement learning also starts the moments from ones and shares them
    between networks; ``similarity="any"`` gives its test without that.

    >>> import jax.numpy as jnp
    >>> combiner = sam_gs(gamma=0.7)
    >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])  # similarity 0.6: both get norm 2
    >>> grads, state = combiner.update(task_grads, combiner.init(jnp.zeros(2), 2))
    >>> grads.tolist(), round(float(state.metrics["task_similarity"]), 3)
    ([2.0, 2.0], 0.6)

    Reference: Borsani et al., "Gradient Similarity Surgery in Multi-Task Deep Learning", 2025,
    arXiv 2506.06130. Agrees with the authors' code (goldens ``sam_gs__*``); the paper's equations
    were not at hand.
    """
    check_range(b1=b1, b2=b2, ge=0, lt=1)
    check_range(gamma=gamma, ge=0, le=1)
    check_range(eps=eps, max_norm=max_norm, gt=0)
    check_choice(SIMILARITY_TESTS, similarity=similarity)

    def init(params: PyTree, num_tasks: int) -> SamGsState:
        check_real(params, "parameter")
        check_count(num_tasks=num_tasks, least=1)
        dtype = compute_dtype(jnp.float32, *jax.tree.leaves(params))
        # One array each: a buffer that stands in a state twice cannot be donated.
        dissimilarity, equalized, alike = (jnp.zeros((), dtype) for _ in range(3))
        metrics = {"norms_equalized": equalized, "task_similarity": alike}
        mu = zeros_per_task(params, num_tasks)
        return SamGsState(zero_count(), mu, dissimilarity, metrics)

    def update(
        task_grads: PyTree, state: SamGsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SamGsState]:
        del extra
        known = {np.shape(m)[0] for m in jax.tree.leaves(state.mu)}
        num_tasks = check_tasks(task_grads, known.pop() if known else None, params)
        check_match(task_grads, state.mu, what="task gradient", like="the state")
        grads = widen(task_grads)

        norms = task_norms(grads)
        mean_similarity, least_similarity = over_pairs(pair_similarities(norms))
        tested = mean_similarity if similarity == "mean" else least_similarity
        equalize = tested < gamma

        count = next_count(state.count)
        mu = jax.tree.map(
            lambda m, g: (b1 * m + (1 - b1) * saturate(g)).astype(m.dtype), state.mu, grads
        )
        dissimilarity = (
            b2 * state.dissimilarity + (1 - b2) * jnp.square(1 - mean_similarity) + eps
        ).astype(state.dissimilarity.dtype)

        if num_tasks == 1:
            chosen = grads
        else:
            mu_correction = one_minus_power(b1, count)
            chosen = jax.tree.map(
                lambda equalized, modulated: jnp.where(equalize, equalized, modulated),
                equalize_task_norms(grads, norms),
                modulate_by_task_momentum(
                    grads,
                    jax.tree.map(lambda m: m / mu_correction, mu),
                    dissimilarity / one_minus_power(b2, count),
                ),
            )
        combined = sum_tasks(chosen)
        if scale_by_num_tasks:
            combined = jax.tree.map(lambda g: g * num_tasks, combined)
        if max_norm is not None:
            combined = clip_combined(combined, max_norm)

        metrics = {
            "norms_equalized": equalize.astype(dissimilarity.dtype),
            "task_similarity": mean_similarity.astype(dissimilarity.dtype),
        }
        return narrow_like(combined, task_grads), SamGsState(count, mu, dissimilarity, metrics)

    return GradientCombiner(init, update)


def sam_gs_optimizer(
    inner: optax.GradientTransformation,
    b1: Any = 0.9,
    b2: Any = 0.99,
    gamma: Any = 0.1,
    *,
    num_tasks: int,
    scale_by_num_tasks: bool = True,
    max_norm: Any = 1.0,
) -> GradientTransformation:
    r"""SAM-GS as published: combine, times K, clip the global norm to 1, then any optimizer.

    .. math::

        \tilde g = K\, g, \qquad u = \text{inner}\left(\tilde g \min\left(1,
        \frac{\text{max\_norm}}{\|\tilde g\| + 10^{-6}}\right)\right)

    with :math:`g` from ``sam_gs``. For the other options write
    ``with_combiner(sam_gs(...), inner, num_tasks=K)``.

    Args:
      inner: the optimizer; the authors use Adam, at 1e-3 on their toys.
      b1: decay of every task's first moment, in [0, 1).
      b2: decay of the second moment of the dissimilarity, in [0, 1).
      gamma: norms are equalised below this similarity, in [0, 1]; see ``sam_gs``.
      num_tasks: number of tasks K, >= 1.
      scale_by_num_tasks: multiply by K before the clip.
      max_norm: limit on the global norm, > 0; None for no clip, which only a scale-invariant inner
        optimizer should follow.

    Returns:
      An optimizer whose ``update`` takes stacked gradients. State: 4 K bytes a f32 parameter and
      the inner optimizer's; inner Adam may do without its own first moment (b1 = 0).

    Raises:
      ValueError: if an argument is out of range; from ``update``, for a leaf whose task axis or
        shape does not fit.

    Only parameters that all tasks share belong here; see ``with_combiner`` for heads.

    >>> import jax.numpy as jnp, optax
    >>> tx = sam_gs_optimizer(optax.sgd(1.0), gamma=0.7, num_tasks=2)
    >>> params = jnp.zeros(2)
    >>> updates, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 1.0]]), tx.init(params), params)
    >>> [round(float(u), 4) for u in updates]  # the combined (2, 2), times 2, clipped to norm 1
    [-0.7071, -0.7071]

    Reference: Borsani et al., "Gradient Similarity Surgery in Multi-Task Deep Learning", 2025,
    arXiv 2506.06130. Agrees with the authors' code (arrays ``clipped/`` of ``sam_gs__*``).
    """
    combiner = sam_gs(b1, b2, gamma, scale_by_num_tasks=scale_by_num_tasks, max_norm=max_norm)
    return with_combiner(combiner, inner, num_tasks=num_tasks)


_PAPER = (
    'Borsani et al., "Gradient Similarity Surgery in Multi-Task Deep Learning", 2025, '
    "arXiv 2506.06130"
)
_REFERENCE = (
    "ThomBors/samgs@7eee6a25aa9ac9a5b3f1bae9091bd7a1b2535156:methods/weight_methods.py:SAMGS"
)

RECORDS = (  # bytes are those of two tasks
    Method(
        factory=sam_gs,
        kind="combiner",
        summary="equalise the tasks' norms where they differ, else weigh by momentum",
        traced=("b1", "b2", "gamma", "eps", "max_norm"),
        static=("similarity", "scale_by_num_tasks"),
        position="first",
        communication="reduce",
        response="proportional",
        state_bytes=8,
        moved_bytes=28,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="MIT",
    ),
    Method(
        factory=sam_gs_optimizer,
        kind="combiner",
        summary="SAM-GS with the published scale and clip in front of any optimizer; takes stacked "
        "gradients",
        example={"num_tasks": 2, "gamma": 0.7},
        example_made={"inner": lambda: optax.adam(1e-3)},
        traced=("b1", "b2", "gamma", "max_norm"),
        static=("inner", "num_tasks", "scale_by_num_tasks"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="bounded",
        state_bytes=16,
        moved_bytes=48,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="MIT",
    ),
)
