"""Frequent directions: a few columns that stand for the sum of many matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.matrices.statistics import column_norms
from optimkit.matrices.subspace import (
    canonical_signs,
    leading_vectors,
    orthonormal_columns,
    product,
)
from optimkit.numerics import check_choice, check_count, check_range, compute_dtype, safe_div
from optimkit.protocols import Array

DECOMPOSITIONS = ("svd", "gram")


class FrequentDirections(NamedTuple):
    """The functions that ``frequent_directions`` returns; a sketch is one array.

    ``init(d, dtype)``: an empty sketch. ``insert(sketch, matrix)``: the sketch with (..., d, n)
    added. ``insert_directions(sketch, vectors, values)``: the same for left singular vectors
    (..., d, k) and singular values (..., k), in falling order; k is above ``rank``, or that of all
    there are. ``basis(sketch)``: orthonormal columns, zero where the sketch has none, and sigma.
    """

    init: Callable[..., jax.Array]
    insert: Callable[[Array, Array], jax.Array]
    insert_directions: Callable[[Array, Array, Array], jax.Array]
    basis: Callable[[Array], tuple[jax.Array, jax.Array]]


def frequent_directions(
    rank: int, decay: Any = 1.0, *, method: Literal["svd", "gram"] = "svd"
) -> FrequentDirections:
    r"""Keeps the leading directions of matrices that come one after another, in ``rank`` columns.

    .. math::

        G = U S V^T, \qquad B &= U_r \sqrt{S_r^2 - S_{r+1}^2} \\
        [\beta C, B] = \hat U \hat S \hat V^T, \qquad
            C &\leftarrow \hat U_r \sqrt{\hat S_r^2 - \hat S_{r+1}^2}

    where C has columns sigma times basis, and all squares are shrunk by the largest one that is
    dropped: a direction stays only if it comes often. Whatever the stream,
    :math:`C C^T \preceq \sum G G^T` for a decay of 1.

    Args:
      rank: r, columns of the sketch, >= 1; no more than d are kept.
      decay: beta, of the old sketch at each insertion, in [0, 1].
      method: ``"svd"``, or ``"gram"``, which is faster and loses directions below 3e-4 of the
        largest in f32.

    Returns:
      ``init``, ``insert``, ``insert_directions`` and ``basis``: see ``FrequentDirections``.

    Raises:
      ValueError: if an argument is out of range.

    The usual sketch shrinks the merged matrix alone; here, as in CoSO, the increment is shrunk as
    well. Where a matrix has no singular value r + 1, zero is subtracted. A sketch of (..., d, r)
    arrays treats each matrix on its own; one with a non-finite entry makes its sketch NaN.

    >>> sketch = frequent_directions(rank=1)
    >>> state = sketch.insert(sketch.init(2), jnp.array([[5.0, 0.0], [0.0, 3.0]]))
    >>> basis, sigma = sketch.basis(state)
    >>> basis[:, 0].tolist(), round(float(sigma[0]), 3)  # sqrt(25 - 9)
    ([1.0, 0.0], 4.0)

    Reference: Liberty, "Simple and deterministic matrix sketching", KDD 2013; Cheng et al.,
    "Continuous Subspace Optimization for Continual Learning", NeurIPS 2025, arXiv 2505.11816.
    """
    check_count(rank=rank, least=1)
    check_range(decay=decay, ge=0, le=1)
    check_choice(DECOMPOSITIONS, method=method)

    def init(d: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros((d, min(rank, d)), dtype)

    def insert(sketch: Array, matrix: Array) -> jax.Array:
        return insert_directions(sketch, *leading_vectors(matrix, rank + 1, method))

    def insert_directions(sketch: Array, vectors: Array, values: Array) -> jax.Array:
        both = jnp.concatenate([decay * sketch, _shrunk(vectors, values)], axis=-1)
        return _shrunk(*_decomposed(both))[..., : sketch.shape[-1]].astype(sketch.dtype)

    def _shrunk(vectors: Array, values: Array) -> jax.Array:
        """The leading columns by their singular values, less the first that is dropped."""
        dropped = values[..., rank : rank + 1]
        least = dropped if dropped.shape[-1] else jnp.zeros_like(values[..., :1])
        kept = values[..., :rank]
        # Two roots: the squares themselves would overflow in f32.
        sigma = jnp.sqrt(jnp.maximum(kept - least, 0)) * jnp.sqrt(kept + least)
        return vectors[..., :rank] * sigma[..., None, :]

    def _decomposed(x: Array) -> tuple[jax.Array, jax.Array]:
        if method == "gram" or x.shape[-2] <= x.shape[-1]:
            return leading_vectors(x, rank + 1, method)
        # Few columns: the decomposition sees a square of their number.
        span = orthonormal_columns(x)
        inner, values = leading_vectors(product(jnp.swapaxes(span, -2, -1), x), rank + 1)
        return canonical_signs(product(span, inner)), values

    def basis(sketch: Array) -> tuple[jax.Array, jax.Array]:
        sketch = jnp.asarray(sketch, compute_dtype(sketch))
        sigma = column_norms(sketch)
        return safe_div(sketch, sigma), sigma[..., 0, :]

    return FrequentDirections(init, insert, insert_directions, basis)
