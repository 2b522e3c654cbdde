"""Spectra of matrices as shares that sum to one, and how many of them matter."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from optimkit.numerics import compute_dtype, max_abs, safe_div
from optimkit.protocols import Array

SpectrumMethod = Literal["svd", "gram"]


def singular_values(x: Array, *, centered: bool = False, method: SpectrumMethod = "svd") -> Array:
    """Singular values of (n, d), descending, min(n, d) of them, in f32 at least.

    ``"gram"`` takes roots of the eigenvalues of the smaller Gram matrix: faster, and wrong by the
    root of the dtype's rounding where they are small. ``centered`` subtracts the mean row.

    >>> singular_values(jnp.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).tolist()
    [4.0, 3.0]
    """
    x = jnp.asarray(x)
    x = x.astype(compute_dtype(x))
    if centered:
        x = x - jnp.mean(x, axis=0, keepdims=True)
    if method == "svd":
        return jnp.linalg.svd(x, compute_uv=False)
    # Divided by its largest entry, so that no square overflows.
    largest = max_abs(x)
    y = safe_div(x, largest)
    gram = y @ y.T if x.shape[0] < x.shape[1] else y.T @ y
    values = jnp.linalg.eigvalsh(gram)[::-1]
    return largest * jnp.sqrt(jnp.maximum(values, 0))


def normalized_spectrum(
    x: Array,
    *,
    centered: bool = False,
    squared: bool = False,
    eps: Any = 0.0,
    method: SpectrumMethod = "svd",
) -> Array:
    """Singular values, or their squares, over ``eps`` plus their sum; zeros for a zero matrix.

    >>> normalized_spectrum(jnp.array([[3.0, 0.0], [0.0, 1.0]])).tolist()
    [0.75, 0.25]
    """
    values = singular_values(x, centered=centered, method=method)
    if squared:
        # Shares of the squares do not depend on the scale: no overflow.
        values = jnp.square(safe_div(values, jnp.max(values, initial=0)))
    return safe_div(values, jnp.sum(values) + jnp.asarray(eps, values.dtype))


def spectral_entropy(p: Array, *, eps: Any = 0.0) -> Array:
    """``-sum p log(p + eps)``, where 0 log 0 is 0.

    >>> round(float(jnp.exp(spectral_entropy(jnp.array([0.5, 0.5, 0.0])))), 4)
    2.0
    """
    shifted = p + jnp.asarray(eps, p.dtype)
    return -jnp.sum(p * jnp.log(jnp.where(shifted == 0, 1, shifted)), axis=-1)
