"""Leading directions of stacks of matrices: orthonormal bases, range finders, singular vectors.

All functions take ``(..., m, n)``, compute in f32 at least with full products, and treat each
matrix on its own: one with a non-finite entry comes out as NaN and leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.matrices.decompositions import cholesky, eigh, qr, solve_lower, svd
from optimkit.matrices.statistics import frobenius_norm
from optimkit.numerics import check_choice, check_count, compute_dtype, safe_div
from optimkit.protocols import Array

BASES = ("qr", "cholesky")
METHODS = ("svd", "gram", "subspace")


def orthonormal_columns(x: Array, method: Literal["qr", "cholesky"] = "qr") -> jax.Array:
    """An orthonormal basis of the columns, shape of ``x``, which needs m >= n.

    Args:
      x: shape (..., m, n); scale does not matter.
      method: ``"qr"`` (Householder), or ``"cholesky"``: three rounds of the Cholesky factor of the
        Gram matrix, the first shifted. That is products and small triangular solves alone, for
        accelerators on which QR is slow. Columns that depend on others come out orthonormal from
        ``"qr"``, and not from ``"cholesky"``: there the condition number must stay below 1e6 in
        f32.

    Raises:
      ValueError: for m < n, or an unknown method.

    >>> import jax.numpy as jnp
    >>> q = orthonormal_columns(jnp.array([[3.0], [4.0]]), "cholesky")
    >>> [round(abs(float(v)), 3) for v in q[:, 0]]
    [0.6, 0.8]
    """
    check_choice(BASES, method=method)
    _check_stack(x)
    if x.shape[-2] < x.shape[-1]:
        raise ValueError(f"orthonormal_columns needs rows >= columns, got shape {x.shape}")

    def basis(x: jax.Array) -> jax.Array:
        if method == "qr":
            return qr(x)[0]
        rows, cols = x.shape[-2:]
        eps = float(jnp.finfo(x.dtype).eps)
        for shift in (11 * (rows + cols) * eps, 0.0, 0.0):
            gram = product(_transposed(x), x)
            # Without a floor a zero matrix has no factor; it stays zero.
            floor = jnp.maximum(shift * _trace(gram), float(jnp.finfo(x.dtype).tiny) ** 0.5)
            factor = cholesky(gram + floor * _identity(gram))
            x = _transposed(solve_lower(factor, _transposed(x)))
        return x

    return _on_finite(basis, _normalized(x))


def canonical_signs(vectors: Array) -> jax.Array:
    """Columns with the sign that makes their entry of largest magnitude positive.

    >>> import jax.numpy as jnp
    >>> canonical_signs(jnp.array([[0.6, 0.8], [-0.8, 0.6]])).tolist()
    [[-0.6000000238418579, 0.800000011920929], [0.800000011920929, 0.6000000238418579]]
    """
    place = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
    largest = jnp.take_along_axis(vectors, place, axis=-2)
    return jnp.where(largest < 0, -vectors, vectors)


def range_finder(
    x: Array,
    size: int,
    *,
    key: Array | None = None,
    start: Array | None = None,
    power_steps: int = 1,
    basis: Literal["qr", "cholesky"] = "qr",
) -> jax.Array:
    r"""An orthonormal basis (..., m, size) that holds most of the range of each matrix.

    .. math:: Q = \operatorname{orth}(X \Omega), \qquad Q \leftarrow \operatorname{orth}(X X^T Q)

    Args:
      x: shape (..., m, n).
      size: columns of the basis, clamped to min(m, n); take some eight more than wanted.
      key: a random key for :math:`\Omega`; the same draw serves all matrices of a stack.
      start: in place of ``key``, a basis (..., m, size) from an earlier, similar matrix: subspace
        iteration goes on from there.
      power_steps: how often the second line is run; each sharpens the gap between kept and dropped
        singular values by its square. With ``start``, one at least is needed.
      basis: see ``orthonormal_columns``.

    Raises:
      ValueError: for neither or both of ``key`` and ``start``, or a count out of range.

    >>> import jax
    >>> x = jax.numpy.outer(jax.numpy.arange(3.0), jax.numpy.ones(4))
    >>> q = range_finder(x, 1, key=jax.random.key(0))
    >>> [round(abs(float(v)), 3) for v in q[:, 0]]  # (0, 1, 2) over its norm
    [0.0, 0.447, 0.894]

    Reference: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011.
    """
    _check_stack(x)
    check_count(size=size, least=1)
    check_count(power_steps=power_steps, least=0 if start is None else 1)
    if (key is None) == (start is None):
        raise ValueError("range_finder needs exactly one of key and start")
    x = _normalized(x)
    size = min(size, *x.shape[-2:])
    if key is not None:
        shape = (*(1 for _ in x.shape[:-2]), x.shape[-1], size)
        q = product(x, jax.random.normal(key, shape, x.dtype))
        q = orthonormal_columns(q, basis)
    else:
        q = jnp.asarray(start)[..., :size].astype(x.dtype)
    for _ in range(power_steps):
        q = orthonormal_columns(product(x, product(_transposed(x), q)), basis)
    return q


def leading_vectors(
    x: Array,
    rank: int,
    method: Literal["svd", "gram", "subspace"] = "svd",
    *,
    key: Array | None = None,
    start: Array | None = None,
    oversample: int = 8,
    power_steps: int = 1,
    basis: Literal["qr", "cholesky"] = "qr",
) -> tuple[jax.Array, jax.Array]:
    """Left singular vectors (..., m, rank) of the largest singular values (..., rank), in order.

    Args:
      x: shape (..., m, n); for right singular vectors hand in the transpose.
      rank: how many, clamped to min(m, n).
      method: ``"svd"``; ``"gram"``, eigenvectors of X X^T or X^T X, whichever is smaller, which
        lose directions below 3e-4 of the largest singular value in f32; or ``"subspace"``,
        ``range_finder`` followed by a small Gram matrix.
      key: for ``"subspace"``, a random key.
      start: for ``"subspace"``, an earlier basis in place of ``key``.
      oversample: for ``"subspace"`` with ``key``, further columns to search in.
      power_steps: for ``"subspace"``.
      basis: for ``"subspace"``, see ``orthonormal_columns``.

    Returns:
      Vectors whose largest entry is positive (see ``canonical_signs``), and singular values.

    Raises:
      ValueError: for an unknown method, or a count out of range.

    >>> import jax.numpy as jnp
    >>> vectors, values = leading_vectors(jnp.diag(jnp.array([1.0, -3.0])), 1, "gram")
    >>> vectors[:, 0].tolist(), values.tolist()
    ([0.0, 1.0], [3.0])
    """
    check_choice(METHODS, method=method)
    check_count(rank=rank, least=1)
    _check_stack(x)
    wide = jnp.asarray(x, compute_dtype(x))
    rank = min(rank, *wide.shape[-2:])
    if method == "subspace":
        found = range_finder(
            wide,
            rank + (oversample if start is None else 0),
            key=key,
            start=start,
            power_steps=power_steps,
            basis=basis,
        )
        inner, values = leading_vectors(product(_transposed(found), wide), rank, "gram")
        return canonical_signs(product(found, inner)), values

    def by_svd(x: jax.Array) -> jax.Array:
        u, s, _ = svd(x)
        return _with_values(u[..., :rank], s[..., :rank])

    def by_gram(x: jax.Array) -> jax.Array:
        rows, cols = x.shape[-2:]
        gram = product(x, _transposed(x)) if rows <= cols else product(_transposed(x), x)
        values, vectors = eigh(gram)  # in ascending order
        values = jnp.sqrt(jnp.maximum(values[..., ::-1][..., :rank], 0))
        vectors = vectors[..., ::-1][..., :rank]
        if rows > cols:
            vectors = orthonormal_columns(product(x, vectors))
        return _with_values(vectors, values)

    scale = _scale(wide)
    both = _on_finite(by_svd if method == "svd" else by_gram, wide / scale)
    return canonical_signs(both[..., :-1, :]), both[..., -1, :] * scale[..., 0, :]


def product(left: Array, right: Array) -> jax.Array:
    """A batched product in full precision, also where f32 products are rounded by default."""
    return jnp.matmul(left, right, precision="highest")


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def _check_stack(x: Any) -> None:
    if jnp.ndim(x) < 2 or 0 in jnp.shape(x)[-2:]:
        raise ValueError(f"needs matrices of shape (..., m, n), none empty, got {jnp.shape(x)}")


def _transposed(x: Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)


def _identity(square: Array) -> jax.Array:
    eye = jnp.eye(square.shape[-1], dtype=square.dtype)
    return jnp.expand_dims(eye, tuple(range(square.ndim - 2)))


def _trace(square: Array) -> jax.Array:
    return jnp.trace(square, axis1=-2, axis2=-1)[..., None, None]


def _scale(x: Array) -> jax.Array:
    """What to divide by, so that squares neither overflow nor vanish."""
    norm = frobenius_norm(x)
    return jnp.where(norm < float(jnp.finfo(x.dtype).smallest_normal), 1, norm)


def _normalized(x: Array) -> jax.Array:
    wide = jnp.asarray(x, compute_dtype(x))
    return safe_div(wide, _scale(wide))


def _with_values(vectors: Array, values: Array) -> jax.Array:
    return jnp.concatenate([vectors, values[..., None, :]], axis=-2)


def _on_finite(function: Callable[[jax.Array], jax.Array], x: Array) -> jax.Array:
    """Runs a decomposition with zeros for matrices that hold NaN, whose results become NaN."""
    finite = jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True)
    return jnp.where(finite, function(jnp.where(finite, x, 0)), jnp.nan)
