"""ROOT's soft threshold: the largest entries of a matrix are cut back to a quantile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import check_match, map_leaves
from optimkit.matrices.engine import axes_tree
from optimkit.matrices.statistics import magnitude_quantile as magnitude_quantile
from optimkit.numerics import check_range
from optimkit.protocols import (
    Array,
    GradientTransformation,
    MatrixAxes,
    Method,
    PyTree,
    transformation,
)


def suppress_outliers(
    quantile: Any = 0.9,
    threshold: Any = None,
    eps: Any = 1e-9,
    *,
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""Cuts every entry above a quantile of its matrix back to that quantile.

    .. math::

        e = \operatorname{quantile}_q(|u|) + \epsilon, \qquad
        u \leftarrow u - \operatorname{sign}(u)\max(|u| - e, 0) = \operatorname{clip}(u, -e, e)

    With quantile 0.9 a tenth of the entries is clipped at every step: it bounds the tail of every
    update, and is no filter for rare events.

    Args:
      quantile: q, in [0, 1], linear between two entries; 0.9 is the authors' code. 1 clips nothing.
      threshold: a fixed e instead, >= 0, for all entries of all leaves: the paper's algorithm.
      eps: added to the quantile, >= 0; 1e-9 is the authors'. Not added to ``threshold``.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``. Not needed with ``threshold``.

    Returns:
      A transformation without state, useful in front of any other. One quantile a matrix, so each
      layer of a stack has its own; a vector counts as one matrix. It reads each leaf 31 times (f32)
      and sorts nothing.

    Raises:
      ValueError: if an argument is out of range, the layout of a leaf is ambiguous, or a gradient
        has another shape.

    Where more than a tenth of the entries are spikes, the quantile is one too. Infinite entries are
    clipped like any other; NaN counts as larger than all and stays NaN in its place.

    >>> import jax.numpy as jnp
    >>> tx = suppress_outliers(0.5)
    >>> updates, _ = tx.update(jnp.array([1.0, -2.0, 3.0, -100.0, 2.0]), tx.init(None))
    >>> updates.tolist()
    [1.0, -2.0, 2.0, -2.0, 2.0]

    Reference: He et al., "ROOT: Robust Orthogonalized Optimizer for Neural Network Training", 2025,
    arXiv 2511.20626. The authors clip the momentum with Nesterov's mix, before orthogonalising it.
    """
    check_range(quantile=quantile, ge=0, le=1)
    check_range(threshold=threshold, eps=eps, ge=0)

    def all_axes(tree: PyTree) -> PyTree:
        """How each leaf is seen as matrices; None for vectors."""
        if threshold is not None:
            return jax.tree.map(lambda _: None, tree)
        return axes_tree(tree, matrix_axes)

    def init(params: PyTree) -> optax.EmptyState:
        all_axes(params)  # an ambiguous layout shows before training starts
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")

        def step(u: Array, axes: MatrixAxes | None) -> Array:
            if u.size == 0:
                return u
            if threshold is not None:
                return jnp.clip(u, -threshold, threshold)
            one_matrix = (*axes.inputs, *axes.outputs) if axes else tuple(range(u.ndim))
            limit = magnitude_quantile(u, quantile, one_matrix) + eps
            return jnp.clip(u, -limit, limit)

        return map_leaves(step, updates, reads=(all_axes(updates),)), state

    return transformation(init, update)


RECORD = Method(
    factory=suppress_outliers,
    kind="piece",
    summary="clip every entry to a quantile of its matrix",
    traced=("quantile", "threshold", "eps"),
    static=("matrix_axes",),
    position="any",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='He et al., "ROOT: Robust Orthogonalized Optimizer for Neural Network Training", 2025, '
    "arXiv 2511.20626",
    reference="huawei-noah/noah-research@aa0f80c8ce:ROOT/examples/example_train.py:ROOT",
    licence="MIT",
)
