"""Spectra of matrices as shares that sum to one, and how many of them matter."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from optimkit.matrices import decompositions
from optimkit.numerics import compute_dtype, max_abs, safe_div
from optimkit.protocols import Array

SpectrumMethod = Literal["svd", "gram"]

NEGLIGIBLE = 1e-12
"""Eigenvalues below this share of the largest are zero, and take no part in a fit."""


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
        return decompositions.singular_values(x)
    # Divided by its largest entry, so that no square overflows.
    largest = max_abs(x)
    y = safe_div(x, largest)
    gram = y @ y.T if x.shape[0] < x.shape[1] else y.T @ y
    values = decompositions.eigenvalues(gram)[::-1]
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


def power_law_fit(values: Array, fit_range: tuple[int, int]) -> tuple[Array, Array]:
    """``(alpha, r2)`` of descending eigenvalues as rank to the minus alpha.

    The fit is that of ``optimkit.diagnostics.alpha_req``, which explains both numbers.

    >>> alpha, _ = power_law_fit(jnp.arange(1.0, 9.0) ** -2, (0, 8))
    >>> round(float(alpha), 3)
    2.0
    """
    first, last = fit_range[0], min(fit_range[1], values.shape[0])
    if first < 0 or last - first < 3:
        raise ValueError(
            f"fit_range {tuple(fit_range)} holds fewer than three of the {values.shape[0]} "
            "eigenvalues"
        )
    usable = values > NEGLIGIBLE * jnp.max(values)
    ranks = jnp.arange(1, values.shape[0] + 1, dtype=values.dtype)
    log_rank, log_value = jnp.log(ranks), jnp.log(jnp.where(usable, values, 1))
    index = np.arange(values.shape[0])
    weights = jnp.where(usable & ((index >= first) & (index < last)), 1 / ranks, 0)
    total = jnp.sum(weights)
    x_mean = safe_div(jnp.sum(weights * log_rank), total)
    y_mean = safe_div(jnp.sum(weights * log_value), total)
    products = jnp.sum(weights * (log_rank - x_mean) * (log_value - y_mean))
    slope = products / jnp.sum(weights * jnp.square(log_rank - x_mean))
    slope = jnp.where(jnp.sum(weights > 0) >= 3, slope, jnp.nan)
    end = 500 if values.shape[0] >= 512 else values.shape[0] - 10
    judged = usable & ((index > first) & (index < end))
    fitted = y_mean + slope * (log_rank - x_mean)
    number = jnp.sum(judged)
    mean = safe_div(jnp.sum(jnp.where(judged, log_value, 0)), number.astype(values.dtype))
    left = jnp.sum(jnp.where(judged, jnp.square(log_value - fitted), 0))
    spread = jnp.sum(jnp.where(judged, jnp.square(log_value - mean), 0))
    r2 = jnp.where(number >= 2, 1 - safe_div(left, spread, otherwise=jnp.nan), jnp.nan)
    return -slope, r2
