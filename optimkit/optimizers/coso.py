"""CoSO: AdamW for one task after the other, in subspaces that leave earlier tasks alone."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

from optimkit.leaves import recipe
from optimkit.protocols import (
    GradientTransformation,
    LeafSelector,
    Mask,
    Method,
    PyTree,
    ScalarOrSchedule,
)
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.decay_after_step import decay_after_step
from optimkit.wrappers.projectors import select_matrices
from optimkit.wrappers.task_subspaces import TaskSubspacesState, in_task_subspaces, task_ended


def coso(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    proj_rank: int = 15,
    sketch_rank: int = 100,
    sketch_decay: Any = 1.0,
    update_proj_gap: int = 1,
    threshold: Any = 0.98,
    history_capacity: int | None = None,
    projected_axis: Literal["in", "out"] = "out",
    lowrank_leaves: LeafSelector = None,
    projector: Literal["svd", "gram", "subspace"] = "svd",
) -> GradientTransformation:
    r"""AdamW in the leading directions of each matrix's gradient that no earlier task has used.

    .. math::

        G &\leftarrow G - G H H^T, \qquad P = \text{leading right singular vectors of } G \\
        R &= G P, \qquad m = b_1 m + (1-b_1) R, \qquad v = b_2 v + (1-b_2) R^2 \\
        W &\leftarrow \Bigl(W - \eta\, \frac{\sqrt{1-b_2^t}}{1-b_1^t}\,
            \frac{m}{\sqrt v + \epsilon} P^T\Bigr)(1 - \eta\lambda)

    for (in, out) kernels, t counting the steps of the task. Whenever P is renewed, G also enters a
    sketch of ``frequent_directions``. ``coso_end_task`` moves the sketch's directions into the
    history H and lets the next task begin. Leaves that are not projected get the same AdamW, whose
    moments and count run on from task to task.

    Args:
      learning_rate: step size, or a schedule over the 0-based count, which no task restarts; 3e-4
        is the authors' for CIFAR-100, 4e-4 for ImageNet-R, 1e-4 for DomainNet.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0: in effect some 32 times as large at the first step.
      weight_decay: lambda, on the parameters after the step. It moves weights along H, too.
      mask: which leaves are decayed (True = decayed); default all.
      proj_rank: columns of P, >= 1, clamped to the smaller side; the authors take 15 for CIFAR-100,
        50 for ImageNet-R, 70 for DomainNet.
      sketch_rank: columns of the sketch, >= 1; the authors take 100, 120 and 160. A task adds fewer
        than that to the history.
      sketch_decay: of the sketch at each insertion, in [0, 1].
      update_proj_gap: T: P is renewed at the steps 1, 1 + T, 1 + 2T, ... (from 1) of each task. The
        authors take 1, and 20 for DomainNet.
      threshold: share of the sketch's energy below which directions join the history, in [0, 1];
        the one that crosses it does not.
      history_capacity: columns reserved for H, at least ``sketch_rank``. None: as many as the side
        has, so that nothing is ever left out. When fewer are full, the most frequent directions
        that fit are kept, later ones are not protected, and ``history_count`` says so.
      projected_axis: ``"out"`` as the authors have it, or ``"in"``. They speak of the first axis of
        an (out, in) matrix; that is the last one of a kernel here.
      lowrank_leaves: which leaves are projected: a tree of bools, ``(path, leaf) -> bool``, or
        patterns. Default: all of rank two, heads and embeddings included. The authors project the
        output kernels of attention, train the task's head without projection, and nothing else. A
        leaf of more axes is a stack of (in, out) matrices.
      projector: how gradients are decomposed: ``"svd"``; ``"gram"``, from a Gram matrix, faster and
        blind below 3e-4 of the largest singular value in f32; ``"subspace"``, a randomised range
        finder, faster still if ``sketch_rank`` is much smaller than the matrix.

    Returns:
      An optimizer that needs ``params``. For a projected (in, out) kernel it keeps
      4 (out (proj_rank + sketch_rank + capacity) + 2 in proj_rank) bytes: 2.8 MB for 768 x 768 by
      default, 0.8 MB with a capacity of 100, where AdamW keeps 4.7 MB.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a chosen leaf is
        no matrix.

    With a gap of 1 each step decomposes two matrices a leaf, (in, out) and (out, 2 sketch_rank):
    that is the method's cost. A gradient of zeros adds nothing to the sketch; one with a NaN leaves
    sketch and P as they were, but not Adam's moments: see ``skip_bad_steps``. Once H spans the
    whole side, a leaf no longer learns. P is made orthogonal to H, and so are new columns of H,
    because singular vectors of tiny singular values need not be so. From the authors' code that
    differs by rounding.

    >>> import jax.numpy as jnp
    >>> tx = coso(0.1, proj_rank=1, sketch_rank=2)
    >>> params = {"kernel": jnp.zeros((2, 3))}
    >>> grads = {"kernel": jnp.array([[9.0, 0.0, 0.0], [0.0, 0.0, 3.0]])}
    >>> state = tx.init(params)
    >>> for _ in range(2):  # the second task leaves output 0 alone
    ...     updates, state = tx.update(grads, state, params)
    ...     state = coso_end_task(state)
    ...     print([[round(float(u), 3) + 0.0 for u in row] for row in updates["kernel"]])
    [[-0.1, 0.0, 0.0], [0.0, 0.0, 0.0]]
    [[0.0, 0.0, 0.0], [0.0, 0.0, -0.1]]

    Reference: Cheng et al., "Continuous Subspace Optimization for Continual Learning",
    NeurIPS 2025, arXiv 2505.11816. Agrees with the authors' code.
    """
    adam = scale_by_adam(b1, b2, eps, eps_form="before_bias_correction")
    low = in_task_subspaces(
        adam,
        proj_rank=proj_rank,
        sketch_rank=sketch_rank,
        sketch_decay=sketch_decay,
        update_proj_gap=update_proj_gap,
        threshold=threshold,
        history_capacity=history_capacity,
        projected_axis=projected_axis,
        projector=projector,
    )

    def kinds(tree: PyTree) -> PyTree:
        chosen = select_matrices(lowrank_leaves, tree)
        return jax.tree.map(lambda is_low: "low" if is_low else "rest", chosen)

    return recipe(
        optax.partition({"low": low, "rest": adam}, kinds),
        optax.scale_by_learning_rate(learning_rate),
        decay_after_step(weight_decay, learning_rate, mask),
    )


def coso_end_task(state: PyTree) -> PyTree:
    r"""Ends a task: the directions of its gradients join the history, and everything else is reset.

    With the sketch's basis and sigma, :math:`e_i = \sigma_i^2 / \sum_j \sigma_j^2` and n the number
    of :math:`e_1 + \dots + e_i` below the threshold, the first n columns of the basis are appended
    to H. Sketch, projector, Adam's moments and the counts of projected leaves become zero; other
    leaves keep theirs.

    Args:
      state: one of ``coso`` in it, however deep: in a chain, under a mask, with injected
        hyperparameters.

    Returns:
      The state for the next task: of the same shapes, so that nothing compiles anew. It may run
      under ``jit``.

    Raises:
      ValueError: if there is no state of ``coso`` in it.

    New columns are taken off H first: in exact arithmetic that changes nothing.

    >>> import jax.numpy as jnp
    >>> tx = coso(0.1, proj_rank=1, sketch_rank=2)
    >>> params = {"kernel": jnp.array([[5.0, 0.0], [0.0, 1.0]])}
    >>> state = tx.update(params, tx.init(params), params)[1]
    >>> node = coso_end_task(state)[0].inner_states["low"].inner_state
    >>> node.history["kernel"].tolist(), int(node.history_count["kernel"])
    ([[1.0, 0.0], [0.0, 0.0]], 1)
    """
    if not any(map(_is_coso, jax.tree.leaves(state, is_leaf=_is_coso))):
        raise ValueError("coso_end_task found no state of coso: nothing to end a task of")
    return jax.tree.map(lambda x: task_ended(x) if _is_coso(x) else x, state, is_leaf=_is_coso)


def _is_coso(node: Any) -> bool:
    return isinstance(node, TaskSubspacesState)


RECORD = Method(
    factory=coso,
    kind="recipe",
    summary="AdamW for task after task, in subspaces that earlier tasks do not use",
    example={
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "proj_rank": 2,
        "sketch_rank": 2,
        "update_proj_gap": 2,
    },
    traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "sketch_decay", "threshold"),
    static=(
        "mask",
        "proj_rank",
        "sketch_rank",
        "update_proj_gap",
        "history_capacity",
        "projected_axis",
        "lowrank_leaves",
        "projector",
    ),
    needs=("params",),
    position="alone",
    communication="matrix",
    response="bounded",
    state_bytes=4.1,  # the history; 4 (3 proj_rank + sketch_rank) / d more, here of 256 x 256
    moved_bytes=16,
    paper='Cheng et al., "Continuous Subspace Optimization for Continual Learning", NeurIPS 2025, '
    "arXiv 2505.11816",
    reference="quinn-ch/CoSO@1a50a11000a2d562c71ec201593e789a5db47e39:coso/adamw.py:CoSOAdamW",
    licence="MIT",
)
