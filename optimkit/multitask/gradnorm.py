"""GradNorm: learns weights of the tasks, so that all train at like rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import select_leaves
from optimkit.leaves import check_real, narrow_like, zero_count
from optimkit.multitask.pcgrad import init_cosines, measure_cosines
from optimkit.multitask.tasks import check_tasks, mix_tasks, task_gram
from optimkit.numerics import check_choice, check_range, next_count, safe_div
from optimkit.protocols import Array, GradientCombiner, LeafSelector, Method, PyTree

PARAMETRIZATIONS = ("renormalize", "softmax")
LEAST_WEIGHT = 1e-6
"""No task's weight falls below this in the ``"renormalize"`` form, so that it can come back."""
LEAST_LOSS = 1e-12
"""An initial loss below this counts as this."""


class GradNormState(NamedTuple):
    """What GradNorm remembers.

    ``count``: int32 scalar. ``task_weights``: weights, or their logits. ``initial_losses``: those
    that training rates refer to. ``inner_state``: the weight optimizer's. ``task_cosines`` and
    ``metrics``: of the last update.
    """

    count: Array
    task_weights: Array
    initial_losses: Array
    inner_state: PyTree
    task_cosines: Array
    metrics: Mapping[str, Array]


def weights_of(task_weights: Array, parametrization: str) -> Array:
    """The weights that the state stands for: themselves, or ``K softmax(logits)``."""
    if parametrization == "renormalize":
        return task_weights
    return task_weights.shape[0] * jax.nn.softmax(task_weights)


def gradnorm_weight_grads(
    weights: Array, norms: Array, losses: Array, initial_losses: Array, alpha: Any
) -> Array:
    r"""The gradient of GradNorm's objective in the weights, shape ``(K,)``.

    .. math::

        \frac{d}{dw_i} \sum_k |G_k - \bar G r_k^\alpha|, \qquad G_k = w_k \|g_k\|, \qquad
        r_k = \frac{L_k / L_k(0)}{\operatorname{mean}_j L_j / L_j(0)}

    The target :math:`\bar G r_k^\alpha` counts as a constant.

    >>> ones = jnp.ones(2)
    >>> gradnorm_weight_grads(ones, jnp.array([1.0, 3.0]), ones, ones, 1.5).tolist()
    [-1.0, 3.0]
    """
    scaled = weights * norms
    progress = losses / jnp.maximum(initial_losses, LEAST_LOSS)
    rates = jnp.maximum(safe_div(progress, jnp.mean(progress), otherwise=1.0), 0)
    # Rates are at most K where losses are positive; the limit keeps the power finite elsewhere.
    target = jnp.mean(scaled) * jnp.minimum(rates, 1e6) ** alpha
    return norms * jnp.sign(scaled - target)


def _renormalized(weights: Array) -> Array:
    tasks = weights.shape[0]

    def sum_to_tasks(w: Array) -> Array:
        return tasks * safe_div(w, jnp.sum(w), otherwise=1 / tasks)

    positive = sum_to_tasks(jnp.maximum(weights, 0))
    return sum_to_tasks(jnp.maximum(positive, LEAST_WEIGHT))


def _checked_losses(losses: Any, tasks: int, name: str, dtype: Any) -> Array:
    if np.shape(losses) != (tasks,):
        raise ValueError(f"{name} must have shape ({tasks},), one a task, got {np.shape(losses)}")
    check_range(**{name: losses}, ge=0)
    return jnp.asarray(losses, dtype)


def gradnorm(
    alpha: Any = 1.5,
    *,
    weight_optimizer: optax.GradientTransformation,
    parametrization: Literal["renormalize", "softmax"] = "renormalize",
    initial_losses: Any = None,
    norm_leaves: LeafSelector = None,
) -> GradientCombiner:
    r"""Weighs the tasks, and learns the weights so that slow tasks get larger gradients.

    .. math::

        g = \sum_k w_k g_k, \qquad
        w \leftarrow w - \eta \nabla_w \sum_k \left| w_k \|g_k\| - \bar G\, r_k^\alpha \right|

    with the mean weighted norm :math:`\bar G` as a constant, and the relative rate
    :math:`r_k = (L_k/L_k(0)) / \operatorname{mean}_j (L_j/L_j(0))`. The result uses the weights
    from before their step.

    Args:
      alpha: how strongly slow tasks are favoured, >= 0; 0 makes the norms equal. 1.5 is the paper's
        value for unlike tasks.
      weight_optimizer: any optax optimizer for the K weights; LibMTL uses the model's own.
      parametrization: ``"renormalize"`` (paper): weights are free, start at 1, and are scaled to
        sum to K after each step; ``"softmax"`` (LibMTL): ``w = K softmax(z)``, z starts at 1.
      initial_losses: :math:`L(0)`, shape ``(K,)``; default those of the first update. LibMTL gives
        the mean of the first epoch, in which it learns no weights.
      norm_leaves: leaves whose gradients enter the norms (None, paths, a tree of bools or a
        function); the paper takes the last layer that the tasks share. Default all.

    Returns:
      A combiner; its ``update`` needs ``losses=``, shape ``(K,)``. Its state is 2 K numbers, the
      weight optimizer's, and telemetry: ``task_cosines``, ``min_cosine``, ``conflict_fraction``.

    Raises:
      ValueError: if an argument is out of range; from ``update``, without ``losses`` or for losses
        of another shape or, where they are known, below 0; for a leaf whose task axis or shape does
        not fit.
      TypeError: for complex or integer leaves.

    Losses must be positive. An initial loss below 1e-12 counts as that, a negative rate as 0. In
    the paper's form no weight falls below 1e-6. A single task keeps the weight 1.

    >>> import jax.numpy as jnp, optax
    >>> combiner = gradnorm(weight_optimizer=optax.sgd(0.1))
    >>> task_grads = jnp.array([[1.0], [3.0]])
    >>> state = combiner.init(jnp.zeros(1), 2)
    >>> grads, state = combiner.update(task_grads, state, losses=jnp.ones(2))
    >>> grads.tolist(), [round(float(w), 3) for w in state.task_weights]  # (1.1, 0.7) times 2/1.8
    ([4.0], [1.222, 0.778])

    Reference: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
    Multitask Networks", 2018, arXiv 1711.02257. Agrees with LibMTL's softmax form; the paper's own
    form has no recording.
    """
    check_range(alpha=alpha, ge=0)
    check_choice(PARAMETRIZATIONS, parametrization=parametrization)
    optimizer = optax.with_extra_args_support(weight_optimizer)

    def init(params: PyTree, num_tasks: int) -> GradNormState:
        check_real(params, "parameter")
        cosines, metrics = init_cosines(params, num_tasks)
        dtype = cosines.dtype
        weights = jnp.ones(num_tasks, dtype)
        first = jnp.ones(num_tasks, dtype)
        if initial_losses is not None:
            first = first * _checked_losses(initial_losses, num_tasks, "initial_losses", dtype)
        inner_state = optimizer.init(weights)
        return GradNormState(zero_count(), weights, first, inner_state, cosines, metrics)

    def update(
        task_grads: PyTree,
        state: GradNormState,
        params: PyTree | None = None,
        *,
        losses: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, GradNormState]:
        del extra
        tasks = check_tasks(task_grads, state.task_weights.shape[0], params)
        if losses is None:
            raise ValueError("gradnorm needs the tasks' losses: call update(..., losses=losses)")
        dtype = state.task_weights.dtype
        losses = _checked_losses(losses, tasks, "losses", dtype)
        first = state.initial_losses
        if initial_losses is None:
            first = jnp.where(state.count == 0, losses, first)

        weights = weights_of(state.task_weights, parametrization)
        combined = narrow_like(mix_tasks(task_grads, weights), task_grads)

        gram = task_gram(task_grads, tasks)
        counted = gram
        if norm_leaves is not None:
            wanted = select_leaves(
                norm_leaves, task_grads, default=lambda name, leaf: True, argument="norm_leaves"
            )
            chosen = jax.tree.map(lambda use, g: g if use else None, wanted, task_grads)
            counted = task_gram(chosen, tasks)
        norms = jnp.sqrt(jnp.diagonal(counted)).astype(dtype)
        grads = gradnorm_weight_grads(weights, norms, losses, first, alpha).astype(dtype)
        if parametrization == "softmax":
            grads = weights * (grads - jnp.mean(weights * grads))
        step, inner_state = optimizer.update(grads, state.inner_state, state.task_weights)
        learned: Any = optax.apply_updates(state.task_weights, step)
        if parametrization == "renormalize":
            learned = _renormalized(learned)
        cosines, metrics = measure_cosines(gram, state.task_cosines.dtype)
        count = next_count(state.count)
        learned = learned.astype(dtype)
        return combined, GradNormState(count, learned, first, inner_state, cosines, metrics)

    return GradientCombiner(init, update)


RECORD = Method(
    factory=gradnorm,
    kind="combiner",
    summary="learned weights of the tasks, so that all train at like rates",
    example_made={"weight_optimizer": lambda: optax.adam(0.025)},
    extras=lambda params, grads: {
        "losses": jnp.ones(jax.tree.leaves(grads)[0].shape[0] if jax.tree.leaves(grads) else 3)
    },
    traced=("alpha", "initial_losses"),
    static=("weight_optimizer", "parametrization", "norm_leaves"),
    needs=("losses",),
    position="first",
    communication="reduce",
    response="proportional",
    moved_bytes=20,
    paper='Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep '
    'Multitask Networks", 2018, arXiv 1711.02257',
    reference="median-research-group/LibMTL@4336804847eaa5e0b924b743d76beec7ac3fdc97:"
    "LibMTL/weighting/GradNorm.py",
    licence="MIT",
)
