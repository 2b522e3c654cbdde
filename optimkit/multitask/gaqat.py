"""GAQAT's freezing: the task's gradient rests where it hardly ever changes its sign."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.layout import select_leaves
from optimkit.leaves import check_match, check_real, narrow_like, widen
from optimkit.multitask.orthogonal_gradient import check_two
from optimkit.multitask.tasks import check_tasks
from optimkit.numerics import check_choice, check_count, check_range
from optimkit.protocols import Array, GradientCombiner, LeafSelector, Method, PyTree
from optimkit.transforms.gradient_disorder import (
    GradientDisorderState,
    advance_disorder,
    check_window,
    init_disorder,
)

SOURCES = ("task", "smooth")
REDUCTIONS = ("leaf_mean", "none")
REFERENCES = ("above", "below")


class FreezeLowDisorderState(NamedTuple):
    """``inner_state``: the measurement. ``frozen``: bools, one a leaf or an entry."""

    inner_state: GradientDisorderState
    frozen: PyTree


def freeze_low_disorder(
    window: int,
    threshold: Any,
    *,
    mask: LeafSelector = None,
    source: Literal["task", "smooth"] = "task",
    reduce: Literal["leaf_mean", "none"] = "leaf_mean",
    reference: Literal["above", "below"] = "above",
) -> GradientCombiner:
    r"""Adds two gradients, but drops the first where its sign has changed too seldom.

    With the disorder d of the last window of n steps (see ``track_gradient_disorder``):

    .. math::

        g = \begin{cases} g_{smooth} & d < \tau \\ g_{task} + g_{smooth} & \text{else}
        \end{cases}

    Args:
      window: steps in a window, n, >= 2; there is no established value.
      threshold: :math:`\tau`, in [0, 1]; there is no established value.
      mask: the leaves that may freeze (None, paths, a tree of bools or a function): quantiser
        scales. Default all. In the others the two gradients are added.
      source: whose disorder is measured, the task's or the smoothness gradient's.
      reduce: ``"leaf_mean"``: a leaf freezes as a whole, by its mean; ``"none"``: entry by entry.
      reference: ``"above"``: what is above the threshold stays free; ``"below"``: what is below
        stays free, for comparison.

    Returns:
      A combiner of exactly two stacked gradients, [task, smooth]. State: 9 bytes an entry of the
      chosen leaves.

    Raises:
      ValueError: if an argument is out of range, or there are not two gradients; from ``update``,
        for a leaf whose task axis or shape does not fit.
      TypeError: for complex or integer leaves.

    Provisional: the paper's equations and code were not at hand; this follows public reviews of it.
    Nothing is frozen in the first window. A frozen gradient is still measured, so that it can thaw.
    Windows do not overlap. Momentum in a later optimizer goes on while the task's gradient rests.

    >>> combiner = freeze_low_disorder(2, 0.5)
    >>> state = combiner.init(jnp.zeros(()), 2)
    >>> for task in (1.0, 1.0, 1.0):  # the sign never changes: frozen from the third step
    ...     grads, state = combiner.update(jnp.array([task, 0.25]), state)
    ...     print(float(grads))
    1.25
    1.25
    0.25

    Reference: Jiang et al., "GAQAT: Gradient-adaptive Quantization-aware Training for Domain
    Generalization", 2024, arXiv 2412.05551.
    """
    check_window(window)
    check_range(threshold=threshold, ge=0, le=1)
    check_choice(SOURCES, source=source)
    check_choice(REDUCTIONS, reduce=reduce)
    check_choice(REFERENCES, reference=reference)
    measured = SOURCES.index(source)

    def chosen(tree: PyTree) -> PyTree:
        return select_leaves(mask, tree, default=lambda name, leaf: True, argument="mask")

    def init(params: PyTree, num_tasks: int) -> FreezeLowDisorderState:
        check_real(params, "parameter")
        check_count(num_tasks=num_tasks, least=1)
        check_two(num_tasks, "[task, smooth]")
        # Leaves that never freeze keep one number each.
        kept = jax.tree.map(
            lambda use, p: p if use else jnp.zeros((), jnp.result_type(p)),
            chosen(params),
            params,
        )

        def free(p: Array) -> Array:
            return jnp.zeros_like(p, dtype=bool) if reduce == "none" else jnp.zeros((), bool)

        return FreezeLowDisorderState(init_disorder(kept), jax.tree.map(free, kept))

    def update(
        task_grads: PyTree,
        state: FreezeLowDisorderState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, FreezeLowDisorderState]:
        del extra
        check_tasks(task_grads, 2, params)
        first = jax.tree.map(lambda g: g[0], task_grads)
        may_freeze = chosen(first)
        wanted = jax.tree.map(
            lambda use, g, kept: kept if use else g, may_freeze, first, state.inner_state.sign
        )
        check_match(first, wanted, what="gradient", like="the state")
        watched = jax.tree.map(
            lambda use, g: g[measured] if use else jnp.zeros((), g.dtype), may_freeze, task_grads
        )
        inner = advance_disorder(watched, state.inner_state, window)
        ready = state.inner_state.count >= window

        def freeze(disorder: Array) -> Array:
            if reduce == "leaf_mean":
                disorder = jnp.sum(disorder) / max(disorder.size, 1)
            low = disorder < threshold if reference == "above" else disorder > threshold
            return ready & low

        frozen = jax.tree.map(freeze, inner.disorder)

        def combine(use: bool, g: Array, rests: Array) -> Array:
            task, smooth = g[0], g[1]
            return jnp.where(rests, 0, task) + smooth if use else task + smooth

        combined = jax.tree.map(combine, may_freeze, widen(task_grads), frozen)
        return narrow_like(combined, task_grads), FreezeLowDisorderState(inner, frozen)

    return GradientCombiner(init, update)


RECORD = Method(
    factory=freeze_low_disorder,
    kind="combiner",
    summary="add a task's and a smoothness gradient, but drop the task's where it is too steady",
    example={"window": 3, "threshold": 0.3},
    traced=("threshold",),
    static=("window", "mask", "source", "reduce", "reference"),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=9,
    moved_bytes=30,
    status="provisional",
    paper='Jiang et al., "GAQAT: Gradient-adaptive Quantization-aware Training for Domain '
    'Generalization", 2024, arXiv 2412.05551',
)
