"""Measures the spectrum of gradient or update matrices while training runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimkit import layout
from optimkit.layout import MatrixAxesOverride, matrix_shape, matrix_tree, named_leaves
from optimkit.leaves import check_match, check_real, zero_count
from optimkit.matrices.engine import gather
from optimkit.matrices.spectrum import (
    SpectrumMethod,
    power_law_fit,
    singular_values,
    spectral_entropy,
)
from optimkit.numerics import (
    check_choice,
    check_count,
    compute_dtype,
    due,
    max_abs,
    next_count,
    safe_div,
)
from optimkit.protocols import (
    Array,
    GradientTransformation,
    LeafSelector,
    MatrixAxes,
    Method,
    PyTree,
    transformation,
)


class TrackUpdateSpectrumState(NamedTuple):
    """``count``: int32. The others: (n,) in the place of a leaf of n matrices, else a 0-d zero."""

    count: Array
    effective_rank: PyTree
    stable_rank: PyTree
    spectral_decay: PyTree


def track_update_spectrum(
    every: int,
    *,
    matrix_leaves: LeafSelector = None,
    matrix_axes: MatrixAxesOverride = None,
    fit_range: tuple[int, int] = (10, 100),
    method: SpectrumMethod = "svd",
) -> GradientTransformation:
    r"""Records two ranks and the decay of each matrix's singular values; changes no update.

    .. math::

        \exp\Big(-\sum_i p_i \log p_i\Big),\; p_i = \frac{s_i}{\sum_j s_j}; \qquad
        \frac{\sum_i s_i^2}{s_1^2}; \qquad s_i^2 \propto i^{-\alpha}

    Args:
      every: steps from one measurement to the next, >= 1; the first step is measured.
      matrix_leaves: which leaves are measured: a tree of bools, ``(path, leaf) -> bool``, or path
        patterns. Default: hidden matrices, by shape and path (see ``by_kind``).
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.
      fit_range: the first index and the index after the last, from 0, to which alpha is fitted, as
        in ``optimkit.diagnostics.alpha_req``; cut to the singular values there are.
      method: ``"svd"``, or ``"gram"``: eigenvalues of the smaller Gram matrix, faster on
        accelerators, and in f32 blind below 3e-4 of the largest singular value.

    Returns:
      A transformation that keeps 12 bytes a matrix. In front of a chain it sees gradients, behind
      it updates. ``optimkit.diagnostics.metrics`` reports ``effective_rank/<leaf>``,
      ``stable_rank/<leaf>`` and ``spectral_decay/<leaf>`` (alpha), zeros before the first step.

    Raises:
      ValueError: if an argument is out of range, a chosen leaf is no matrix, a layout is ambiguous,
        or a gradient has another shape.

    Under ``jit`` it costs nothing between measurements; one takes O(m n min(m, n)) for (m, n), and
    whole matrices on every device. Under ``jax.vmap`` every step pays. Both ranks lie between 1, of
    a zero matrix too, and min(m, n). Alpha is 0 where fewer than three singular values are left to
    fit, so for matrices of less than 13 rows or columns by default. Nothing is centred: these are
    ranks of directions, not of a covariance. A matrix that is not finite has NaN until the next
    measurement.

    >>> import jax.numpy as jnp
    >>> from optimkit.diagnostics import metrics
    >>> tx = track_update_spectrum(every=10)
    >>> grads = {"kernel": jnp.array([[3.0, 0.0], [0.0, 3.0]]), "bias": jnp.ones(2)}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> {name: round(float(value), 3) for name, value in metrics(state).items() if "/" in name}
    {'effective_rank/kernel': 2.0, 'stable_rank/kernel': 2.0, 'spectral_decay/kernel': 0.0}

    The measures are those of Huang et al., arXiv 2509.23808, and Agrawal et al., "alpha-ReQ",
    NeurIPS 2022, who apply them to representations.
    """
    check_count(every=every, least=1)
    check_choice(("svd", "gram"), method=method)
    first, last = fit_range
    check_count(fit_range=first, least=0)
    if last - first < 3:
        raise ValueError(f"fit_range must hold at least three indices, got {tuple(fit_range)}")

    def numbers(leaf: Array, axes: MatrixAxes) -> Array:
        """(3, n): the state's three numbers for each matrix of a leaf."""
        x = gather(jnp.asarray(leaf, compute_dtype(leaf)))
        x = jnp.transpose(x, (*axes.batch, *axes.inputs, *axes.outputs))
        stack = jnp.reshape(x, matrix_shape(leaf.shape, axes))
        return jax.vmap(lambda x: _numbers(x, fit_range, method), out_axes=1)(stack)

    def measured(tree: PyTree) -> list[MatrixAxes | None]:
        """The axes of the leaves that are measured, None for the others."""
        chosen = jax.tree.leaves(matrix_tree(tree, matrix_leaves, matrix_axes))
        return [
            layout.matrix_axes(name, leaf, matrix_axes) if use and np.size(leaf) else None
            for (name, leaf), use in zip(named_leaves(tree), chosen, strict=True)
        ]

    def init(params: PyTree) -> TrackUpdateSpectrumState:
        structure, leaves = jax.tree.structure(params), jax.tree.leaves(params)

        def zeros() -> PyTree:
            return structure.unflatten(
                jnp.zeros(
                    () if axes is None else matrix_shape(np.shape(leaf), axes)[:1],
                    compute_dtype(leaf),
                )
                for leaf, axes in zip(leaves, measured(params), strict=True)
            )

        return TrackUpdateSpectrumState(zero_count(), zeros(), zeros(), zeros())

    def update(
        updates: PyTree,
        state: TrackUpdateSpectrumState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, TrackUpdateSpectrumState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        structure, leaves = jax.tree.structure(updates), jax.tree.leaves(updates)
        axes = measured(updates)
        columns = [jax.tree.leaves(tree) for tree in state[1:]]

        def measure() -> list[list[Array]]:
            new = [list(column) for column in columns]
            for place, seen_as in enumerate(axes):
                if seen_as is not None:
                    for column, row in zip(new, numbers(leaves[place], seen_as), strict=True):
                        column[place] = row.astype(column[place].dtype)
            return new

        columns = jax.lax.cond(due(state.count, every), measure, lambda: columns)
        trees = (structure.unflatten(column) for column in columns)
        return updates, TrackUpdateSpectrumState(next_count(state.count), *trees)

    return transformation(init, update)


def _numbers(x: Array, fit_range: tuple[int, int], method: SpectrumMethod) -> Array:
    """Effective rank, stable rank and alpha of one matrix."""
    # Over its largest entry: no sum and no square overflows.
    values = singular_values(safe_div(x, max_abs(x)), method=method)
    shares = safe_div(values, jnp.sum(values))
    squares = jnp.square(safe_div(values, values[0]))
    alpha = jnp.zeros((), values.dtype)
    if min(fit_range[1], len(values)) - fit_range[0] >= 3:
        fitted, _ = power_law_fit(squares, fit_range)
        alpha = jnp.where(jnp.isnan(fitted) & jnp.isfinite(values[0]), 0, fitted)
    rank = jnp.maximum(jnp.sum(squares), 1)
    return jnp.stack([jnp.exp(spectral_entropy(shares)), rank, alpha])


RECORD = Method(
    factory=track_update_spectrum,
    kind="piece",
    summary="ranks and decay of the singular values of each matrix; changes no update",
    example={"every": 2},
    static=("every", "matrix_leaves", "matrix_axes", "fit_range", "method"),
    position="any",
    communication="matrix",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    exempt={"fidelity": "made here: the measures' recordings are of representations"},
)
