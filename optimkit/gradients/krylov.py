"""Krylov methods on trees: conjugate gradients and Lanczos, from products with a matrix alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, widen
from optimkit.matrices.decompositions import eigh
from optimkit.matrices.placement import place_like
from optimkit.numerics import check_count, check_range, compute_dtype, safe_div, tree_vdot
from optimkit.protocols import Array, PyTree


def _axpy(a: Any, x: PyTree, y: PyTree) -> PyTree:
    """``a x + y``."""
    return jax.tree.map(lambda u, v: jnp.asarray(a, v.dtype) * u + v, x, y)


def random_direction(key: Array, like: PyTree, *, signs: bool = False) -> PyTree:
    """A tree of standard normal entries, or of random signs, in f32 or better.

    Args:
      key: a random key.
      like: its structure and shapes.
      signs: entries of one and minus one.
    """
    leaves, structure = jax.tree.flatten(like)
    draw: Any = jax.random.rademacher if signs else jax.random.normal
    drawn = []
    for index, leaf in enumerate(leaves):
        entries = draw(jax.random.fold_in(key, index), jnp.shape(leaf), compute_dtype(leaf))
        drawn.append(place_like(entries, jnp.asarray(leaf)))
    return structure.unflatten(drawn)


class Solution(NamedTuple):
    """``x``; whether the residual is small; whether the matrix showed no negative curvature."""

    x: PyTree
    converged: Array
    positive: Array


def conjugate_gradient(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree | None = None,
    *,
    shift: Any = 0.0,
    maxiter: int = 50,
    tol: Any = 1e-6,
) -> Solution:
    """Solves ``(A + shift I) x = b`` for a symmetric A.

    Args:
      matvec: v -> A v, on trees like ``b``.
      b: the right-hand side.
      x0: where to start; default zero.
      shift: added to the diagonal.
      maxiter: most iterations, >= 1.
      tol: stop when the residual is below ``tol`` times the norm of ``b``, >= 0.

    Returns:
      ``Solution(x, converged, positive)``. At the first direction along which ``A + shift I`` is
      not positive it stops, and ``positive`` is False.

    Raises:
      ValueError: if the trees differ or an argument is out of range.

    >>> import jax.numpy as jnp
    >>> found = conjugate_gradient(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), shift=1.0)
    >>> [round(float(x), 3) for x in found.x], bool(found.converged)
    ([0.5, 0.25], True)
    """
    check_count(maxiter=maxiter, least=1)
    check_range(tol=tol, ge=0)
    b = widen(b)
    x = jax.tree.map(jnp.zeros_like, b) if x0 is None else widen(x0, b)
    check_match(x, b, what="x0", like="b")

    def apply(v: PyTree) -> PyTree:
        return _axpy(shift, v, widen(matvec(v), b))

    r = b if x0 is None else _axpy(-1, apply(x), b)
    square = tree_vdot(r, r)
    limit = jnp.asarray(tol, square.dtype) ** 2 * tree_vdot(b, b).astype(square.dtype)

    def going(carry: Any) -> Array:
        _, _, _, square, count, positive = carry
        return (square > limit) & (count < maxiter) & positive

    def step(carry: Any) -> Any:
        x, r, p, square, count, _ = carry
        image = apply(p)
        curvature = tree_vdot(p, image).astype(square.dtype)
        positive = curvature > 0
        length = jnp.where(positive, safe_div(square, curvature), 0)
        x, r = _axpy(length, p, x), _axpy(-length, image, r)
        new = tree_vdot(r, r).astype(square.dtype)
        return x, r, _axpy(safe_div(new, square), p, r), new, count + 1, positive

    start = (x, r, r, square, jnp.zeros((), jnp.int32), square >= 0)
    x, _, _, square, _, positive = jax.lax.while_loop(going, step, start)
    return Solution(x, square <= limit, positive)


class Tridiagonal(NamedTuple):
    """What ``lanczos`` gives: the diagonal, what stands beside it, and the basis."""

    alphas: Array
    betas: Array
    basis: PyTree


def lanczos(
    hvp: Callable[[PyTree], PyTree],
    v0: PyTree,
    num_iters: int,
    *,
    reorthogonalize: bool = True,
) -> Tridiagonal:
    r"""Lanczos' iteration: a small tridiagonal matrix whose extremes are those of a large one.

    .. math:: \beta_j v_{j+1} = H v_j - \alpha_j v_j - \beta_{j-1} v_{j-1}, \qquad
        \alpha_j = v_j^T H v_j

    Args:
      hvp: v -> H v for a symmetric H, on trees like ``v0``.
      v0: the start, of any length but zero.
      num_iters: m, the number of products, >= 1. 10 to 20 find eigenvalues that stand out.
      reorthogonalize: against all earlier vectors, twice. Without it, copies of extreme eigenvalues
        appear; m copies of the parameters are kept either way.

    Returns:
      ``alphas`` (m,), ``betas`` (m - 1,), and ``basis``, a tree like ``v0`` with a leading axis of
      m. Where the space is used up, the rest is zero.

    Raises:
      ValueError: if ``num_iters`` is out of range.

    >>> import jax.numpy as jnp
    >>> found = lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.array([1.0, 1.0]), 2)
    >>> [round(float(a), 3) for a in found.alphas], round(float(found.betas[0]), 3)
    ([2.0, 2.0], 1.0)
    """
    check_count(num_iters=num_iters, least=1)
    v0 = widen(v0)
    dtype = compute_dtype(*jax.tree.leaves(v0), jnp.float32)
    rounding = float(jnp.finfo(dtype).eps)

    def unit(v: PyTree, norm: Array, alive: Array) -> PyTree:
        scale = jnp.where(alive, safe_div(1.0, norm), 0)
        return jax.tree.map(lambda x: scale.astype(x.dtype) * x, v)

    def against(w: PyTree, basis: PyTree) -> PyTree:
        def along(b: Array, x: Array) -> Array:
            return jnp.sum(b * x[None], axis=tuple(range(1, b.ndim)), dtype=dtype)

        shares = jax.tree.leaves(jax.tree.map(along, basis, w))
        share = functools.reduce(jnp.add, shares)
        return jax.tree.map(
            lambda b, x: x - jnp.tensordot(share.astype(x.dtype), b, 1, precision="highest"),
            basis,
            w,
        )

    norm = jnp.sqrt(tree_vdot(v0, v0)).astype(dtype)
    alive = norm > 0
    v = unit(v0, norm, alive)
    # By a product, so that each vector lies on a mesh where the start does.
    basis = jax.tree.map(
        lambda x: jnp.zeros((num_iters, *(1 for _ in x.shape)), x.dtype) * x[None], v
    )
    zero = jnp.zeros((), dtype)

    def step(carry: Any, index: Array) -> Any:
        v, before, beta, alive, scale, basis = carry
        basis = jax.tree.map(
            lambda b, x: jax.lax.dynamic_update_index_in_dim(b, x, index, 0), basis, v
        )
        with jax.default_matmul_precision("highest"):
            w = widen(hvp(v), v)
        alpha = tree_vdot(v, w).astype(dtype)
        w = _axpy(-beta, before, _axpy(-alpha, v, w))
        if reorthogonalize:
            w = against(against(w, basis), basis)
        norm = jnp.sqrt(tree_vdot(w, w)).astype(dtype)
        scale = jnp.maximum(scale, jnp.abs(alpha) + beta)
        # What is left of an exhausted space is rounding.
        alive = alive & (norm > 8 * num_iters * rounding * scale)
        new_beta = jnp.where(alive, norm, 0)
        return (unit(w, norm, alive), v, new_beta, alive, scale, basis), (alpha, new_beta)

    start = (v, jax.tree.map(jnp.zeros_like, v), zero, alive, zero, basis)
    (*_, basis), (alphas, betas) = jax.lax.scan(step, start, jnp.arange(num_iters))
    return Tridiagonal(alphas, betas[:-1], basis)


def slq_density(alphas: Array, betas: Array) -> tuple[jax.Array, jax.Array]:
    """Ritz values and their weights: the spectral measure that the start vector sees.

    Args:
      alphas: (m,), from ``lanczos``.
      betas: (m - 1,). From a zero on, what follows has no weight, and repeats ``alphas[0]``.

    Returns:
      ``(nodes, weights)``, each (m,): ascending Ritz values, and weights that sum to 1.
      ``sum(weights * nodes**k)`` is ``v0^T H^k v0`` for k < 2 m. For a random start that is, on
      average, the trace of H^k over the number of parameters.

    >>> import jax.numpy as jnp
    >>> nodes, weights = slq_density(jnp.array([2.0, 2.0]), jnp.array([1.0]))
    >>> [round(float(x), 3) for x in (*nodes, *weights)]
    [1.0, 3.0, 0.5, 0.5]
    """
    # After the end, values that stand for nothing: inside the spectrum, so that its ends are right.
    over = jnp.cumsum(jnp.concatenate([jnp.zeros(1, betas.dtype), betas == 0])) > 0
    alphas = jnp.where(over, alphas[0], alphas)
    matrix = jnp.diag(alphas) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
    nodes, vectors = eigh(matrix)
    return nodes, jnp.square(vectors[0])
