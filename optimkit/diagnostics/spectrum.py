"""The spectrum of representations: effective ranks, power-law decay, and how they develop."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.matrices.spectrum import (
    SpectrumMethod,
    normalized_spectrum,
    power_law_fit,
    spectral_entropy,
)
from optimkit.numerics import check_choice, check_count, check_range, compute_dtype
from optimkit.protocols import Array


def eigenspectrum(x: Array, *, max_eigenvalues: int = 2048) -> Array:
    r"""Eigenvalues of the covariance of representations, as shares of the total variance.

    Args:
      x: (n, ...): n samples; further axes are flattened to d features. Cast to f32 at least before
        centring.
      max_eigenvalues: how many to give at most, >= 1.

    Returns:
      min(n, d, max_eigenvalues) shares, descending; they sum to 1 if none is cut off. Zeros for
      equal rows.

    Raises:
      ValueError: if ``x`` holds no sample or no feature, or an argument is out of range.

    With n <= d at most n - 1 are not zero: report n beside every number made of them.

    >>> x = jnp.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> [round(share, 4) for share in eigenspectrum(x).tolist()]
    [0.8, 0.2]
    """
    check_count(max_eigenvalues=max_eigenvalues, least=1)
    return normalized_spectrum(_rows(x), centered=True, squared=True)[:max_eigenvalues]


def rankme(
    x: Array, *, variant: Literal["covariance", "singular"] = "covariance", eps: Any = 1e-7
) -> Array:
    r"""The exponential of a spectrum's entropy: how many directions representations fill.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad
        p_i = \frac{s_i}{\sum_j s_j} + \epsilon

    Args:
      x: (n, ...) representations.
      variant: ``"covariance"``: s are eigenvalues of the covariance, as in ``reptrix``;
        ``"singular"``: uncentred singular values, as RankMe's authors define it. The two differ
        much: always say which.
      eps: added to each share, >= 0.

    Returns:
      A scalar; about 1 for equal rows.

    Raises:
      ValueError: if ``x`` holds no sample or no feature, or an argument is out of range.

    >>> round(float(rankme(jnp.eye(3), variant="singular")), 3)
    3.0

    Reference: Garrido et al., "RankMe", ICML 2023, arXiv 2210.02885; Li et al., "Tracing the
    Representation Geometry of Language Models from Pretraining to Post-training", NeurIPS 2025,
    arXiv 2509.23024.
    """
    check_choice(("covariance", "singular"), variant=variant)
    check_range(eps=eps, ge=0)
    covariance = variant == "covariance"
    p = normalized_spectrum(_rows(x), centered=covariance, squared=covariance)
    return jnp.exp(spectral_entropy(p + jnp.asarray(eps, p.dtype)))


def alpha_req(
    x_or_eigenvalues: Array, *, fit_range: tuple[int, int] = (10, 100)
) -> tuple[Array, Array]:
    r"""The exponent alpha of a spectrum that decays as :math:`\lambda_i \propto i^{-\alpha}`.

    The slope of log eigenvalue on log rank, fitted with weights 1 / rank.

    Args:
      x_or_eigenvalues: (n, ...) representations, or a descending spectrum (m,).
      fit_range: first index and the index after the last, from 0; 10 and 100 are the authors'.
        Cut to the eigenvalues there are.

    Returns:
      ``(alpha, r2)``. r2 is that of the logs, without weights, from the index after the first to
      500, or to ten before the end of a spectrum of less than 512; NaN where fewer than two are
      left. Alpha is NaN where fewer than three eigenvalues of the range are above 1e-12 of the
      largest.

    Raises:
      ValueError: if the range holds fewer than three eigenvalues.

    >>> alpha, r2 = alpha_req(jnp.arange(1.0, 65.0) ** -2, fit_range=(10, 50))
    >>> round(float(alpha), 3), round(float(r2), 3)
    (2.0, 1.0)

    Reference: Agrawal et al., "alpha-ReQ", NeurIPS 2022; Li et al., "Tracing the Representation
    Geometry of Language Models from Pretraining to Post-training", NeurIPS 2025, arXiv 2509.23024.
    """
    given = jnp.asarray(x_or_eigenvalues)
    values = given.astype(compute_dtype(given)) if given.ndim == 1 else eigenspectrum(given)
    return power_law_fit(values, fit_range)


def effective_rank(
    h: Array,
    *,
    centered: bool = True,
    eps: Any = 1e-8,
    log: bool = False,
    method: SpectrumMethod = "svd",
) -> Array:
    r"""The exponential of the entropy of singular values, over the tokens of one response.

    .. math:: \exp\Big(-\sum_i p_i \log(p_i + \epsilon)\Big), \qquad
        p_i = \frac{s_i}{\sum_j s_j + \epsilon}

    Args:
      h: (n, d): a state a token.
      centered: subtract the mean state first.
      eps: as above, >= 0.
      log: give the entropy itself.
      method: ``"svd"``, or ``"gram"``: faster, and in f32 too large by 0.04 to 0.08, as in the
        authors' fast path.

    Returns:
      A scalar; 1 for equal rows, and for one row where ``centered``.

    Raises:
      ValueError: if ``h`` holds no token or no feature, or an argument is out of range.

    >>> round(float(effective_rank(jnp.eye(3), centered=False)), 3)
    3.0

    Reference: Huang et al., "Beyond the Exploration-Exploitation Trade-off: A Hidden State Approach
    for LLM Reasoning in RLVR", 2025, arXiv 2509.23808.
    """
    check_choice(("svd", "gram"), method=method)
    check_range(eps=eps, ge=0)
    p = normalized_spectrum(_rows(h), centered=centered, eps=eps, method=method)
    entropy = spectral_entropy(p, eps=eps)
    return entropy if log else jnp.exp(entropy)


def running_mean_difference(series: Array) -> Array:
    """Each entry but the first, minus the mean of all before it.

    >>> running_mean_difference(jnp.array([1.0, 3.0, 5.0])).tolist()
    [2.0, 3.0]
    """
    series = jnp.asarray(series)
    counts = jnp.arange(1, series.shape[0], dtype=series.dtype)
    return series[1:] - jnp.cumsum(series)[:-1] / counts


def effective_rank_dynamics(
    h: Array, *, stride: int = 20, max_len: int = 512, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    r"""The effective rank of growing prefixes of one response, its velocity and acceleration.

    .. math:: r_j = \mathrm{rank}(h_{0 \dots jS}), \qquad
        v_j = r_j - \operatorname{mean}(r_1 \dots r_{j-1}), \qquad a_j = v_j - v_{j-1}

    Args:
      h: (T, d): a state a token.
      stride: S, >= 1; prefixes are of S + 1, 2S + 1, ... tokens.
      max_len: of longer responses, the last ``max_len`` tokens count; >= 1.
      mask: (T,), which tokens belong to the response; default all. Shapes stay fixed under ``jit``.

    Returns:
      ``(ranks, velocity, acceleration)`` of lengths J, J - 1 and J - 2 (0 at least), with
      J = (min(T, max_len) - 1) // S. NaN for prefixes longer than the response; VERL reports the
      means of the others, 0 if there is none.

    Raises:
      ValueError: if ``h`` holds no token or no feature, or an argument is out of range.

    >>> ranks, velocity, acceleration = effective_rank_dynamics(jnp.eye(6), stride=1)
    >>> ranks.round(2).tolist()
    [1.0, 2.0, 3.0, 4.0, 5.0]
    >>> velocity.round(2).tolist(), acceleration.round(2).tolist()
    ([1.0, 1.5, 2.0, 2.5], [0.5, 0.5, 0.5])

    Reference: Huang et al., "Beyond the Exploration-Exploitation Trade-off: A Hidden State Approach
    for LLM Reasoning in RLVR", 2025, arXiv 2509.23808. Agrees with the authors' code in f32.
    """
    check_count(stride=stride, max_len=max_len, least=1)
    h = jnp.asarray(h)
    if h.ndim != 2:
        raise ValueError(f"h must be (tokens, features), got shape {h.shape}")
    h = _rows(h)
    size = min(h.shape[0], max_len)
    if mask is None:
        rows, length = h[h.shape[0] - size :], jnp.asarray(size)
    else:
        belongs = jnp.asarray(mask, bool)
        if belongs.shape != h.shape[:1]:
            raise ValueError(f"mask must have shape {h.shape[:1]}, got {belongs.shape}")
        order = jnp.argsort(~belongs, stable=True)  # the response's tokens first
        whole = jnp.sum(belongs)
        start = jnp.maximum(whole - size, 0)
        rows, length = h[order[start + jnp.arange(size)]], whole - start
    ends = jnp.arange(stride, size, stride)

    def rank(end: Array) -> Array:
        inside = (jnp.arange(size) <= end)[:, None]
        kept = jnp.where(inside, rows, 0)
        centred = jnp.where(inside, kept - jnp.sum(kept, axis=0, keepdims=True) / (end + 1), 0)
        value = effective_rank(centred, centered=False)
        return jnp.where(end < length, value, jnp.nan)

    ranks = jax.lax.map(rank, ends) if ends.size else jnp.zeros((0,), rows.dtype)
    velocity = running_mean_difference(ranks)
    return ranks, velocity, jnp.diff(velocity)


def _rows(x: Array) -> Array:
    x = jnp.asarray(x)
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"representations must be (samples, features), got shape {x.shape}")
    return x.astype(compute_dtype(x)).reshape(x.shape[0], -1)
