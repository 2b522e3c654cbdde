"""Decompositions of stacks of matrices, on CPUs one matrix after the other.

On CPUs, jaxlib shares the matrices of a stack among the threads of a pool, and waits for them on a
thread of that pool. Two decompositions that do not depend on each other can so take all threads of
a small pool, and wait for ever: on two cores, QR of six independent stacks hangs within seconds
(jaxlib 0.10.2). A single matrix is decomposed by the thread that asks for it. It is also no slower:
LAPACK has threads of its own.

All functions take ``(..., m, n)``, whole matrices on every device where an explicit mesh divides
the stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.sharding import PartitionSpec as P

from optimkit.matrices import placement
from optimkit.protocols import Array


def _of_stacks(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of matrices as one of stacks, also of those that ``vmap`` makes."""
    alone = sequential_vmap(function)

    @jax.custom_jvp
    def one(*matrices: Array) -> Any:
        return jax.lax.platform_dependent(*matrices, cpu=alone, default=function)

    @one.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return jax.jvp(function, primals, tangents)

    def stacked(*stacks: Array) -> Any:
        lead = stacks[0].shape[:-2]
        if not lead or 0 in lead:
            return one(*stacks) if not lead else function(*stacks)
        results = jax.vmap(one)(*(x.reshape(-1, *x.shape[-2:]) for x in stacks))
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), results)

    @jax.jit
    def apply(*stacks: Array) -> Any:
        if not placement.explicit_axes(stacks[0]):
            return stacked(*stacks)
        # Each device maps over its own part of the stack.
        divided = P(*[names or None for names in placement.spec_of(stacks[0])[:-2]])
        return jax.shard_map(stacked, in_specs=divided, out_specs=divided, check_vma=False)(*stacks)

    return apply


# Lambdas: what maps a function over a stack takes its defaults for arrays.
_svd = _of_stacks(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))
_singular_values = _of_stacks(lambda x: jnp.linalg.svd(x, compute_uv=False))
_qr = _of_stacks(lambda x: tuple(jnp.linalg.qr(x)))
_eigh = _of_stacks(lambda x: tuple(jnp.linalg.eigh(x)))
_eigenvalues = _of_stacks(lambda x: jnp.linalg.eigvalsh(x))
_cholesky = _of_stacks(lambda x: jnp.linalg.cholesky(x))
_solve = _of_stacks(lambda a, x: jnp.linalg.solve(a, x))
_lower = _of_stacks(lambda a, x: jax.lax.linalg.triangular_solve(a, x, left_side=True, lower=True))
_upper = _of_stacks(
    lambda a, x: jax.lax.linalg.triangular_solve(a, x, left_side=True, lower=True, transpose_a=True)
)


def svd(x: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(U, s, V^T)`` with min(m, n) singular values, in falling order."""
    return _svd(x)


def singular_values(x: Array) -> jax.Array:
    """The singular values alone, in falling order."""
    return _singular_values(x)


def qr(x: Array) -> tuple[jax.Array, jax.Array]:
    """``(Q, R)`` with min(m, n) columns of Q."""
    return _qr(x)


def eigh(x: Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, in rising order, and eigenvectors of symmetric matrices."""
    return _eigh(x)


def eigenvalues(x: Array) -> jax.Array:
    """Eigenvalues of symmetric matrices, in rising order."""
    return _eigenvalues(x)


def cholesky(x: Array) -> jax.Array:
    """The lower factor of positive definite matrices; NaN for others."""
    return _cholesky(x)


def solve(matrix: Array, x: Array) -> jax.Array:
    """The inverse of (..., n, n) times (..., n, m), by LU with pivots."""
    return _solve(matrix, x)


def solve_lower(factor: Array, x: Array) -> jax.Array:
    """The inverse of lower triangles times (..., n, m)."""
    return _lower(factor, x)


def solve_positive(matrix: Array, x: Array) -> jax.Array:
    """The inverse of positive definite (..., n, n) times (..., n, m), by Cholesky factors."""
    factor = cholesky(matrix)
    return _upper(factor, _lower(factor, x))
