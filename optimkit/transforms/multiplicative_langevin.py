"""Dale-Langevin sampling steps: noise and drift multiply each coordinate, whose sign they keep.

Pure functions of arrays. ``optimkit.dale_langevin`` makes a gradient transformation of the first.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from optimkit.numerics import check_choice, check_range, compute_dtype
from optimkit.protocols import Array

DRIFTS = {"reverse": 1.0, "langevin": 0.5}
"""Factor on the deterministic part of the exponent."""


def langevin_exponent(
    x_score: Array,
    noise: Array,
    *,
    delta: Any,
    sigma: Any,
    mu: Any = None,
    anneal: Any = 1.0,
    drift: Literal["reverse", "langevin"] = "reverse",
) -> Array:
    """What a Dale-Langevin step adds to log|x|, from the product of x and its score."""
    check_choice(tuple(DRIFTS), drift=drift)
    check_range(delta=delta, sigma=sigma, anneal=anneal, ge=0)
    square = jnp.square(sigma)
    mu = square / 2 if mu is None else mu
    pull = delta * square * x_score - delta * (mu - 1.5 * square)
    return DRIFTS[drift] * pull + anneal * jnp.sqrt(delta) * sigma * noise


def dale_langevin_step(
    x: Array,
    score: Array,
    noise: Array,
    *,
    delta: Any,
    sigma: Any,
    mu: Any = None,
    anneal: Any = 1.0,
    drift: Literal["reverse", "langevin"] = "reverse",
) -> Array:
    r"""One step of geometric Brownian motion run backwards: x is multiplied and keeps its sign.

    .. math::

        x \leftarrow x \exp\!\big(\delta\sigma^2\, x s - \delta(\mu - \tfrac32 \sigma^2)
            + a\sqrt\delta\,\sigma z\big)

    Args:
      x: the sample, of either sign.
      score: s, the gradient of log p at x.
      noise: z, standard normal; zeros give the authors' noise-free step.
      delta: step size, >= 0.
      sigma: volatility, >= 0; the authors have 0.8.
      mu: drift of the forward motion. Default sigma^2 / 2, the authors' value, at which log|x| has
        no drift forwards.
      anneal: a, factor on the noise, >= 0; the authors multiply it by 0.9995 in every outer step.
      drift: ``"reverse"`` as above, for denoising with scores that change with time;
        ``"langevin"`` halves the part without noise, and then the steps sample from a p that stays,
        if mu is left alone.

    Returns:
      The next sample, in the dtype of ``x``, finite for finite input; computed in f32 at least.

    Raises:
      ValueError: if an argument is out of range.

    With the default mu the drift is :math:`\sigma^2` times the score of log|x|.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, -1.0])
    >>> y = dale_langevin_step(x, -1 / x, jnp.log(jnp.array([2.0, 2.0])), delta=1.0, sigma=1.0)
    >>> [round(float(v), 3) for v in y]
    [2.0, -2.0]

    Reference: Shetty et al., "Dale meets Langevin: A Multiplicative Denoising Diffusion Model",
    2025, arXiv 2510.02730. Agrees with the authors' sampler.
    """
    x, dtype = _wide(x)
    exponent = langevin_exponent(
        x * score, noise, delta=delta, sigma=sigma, mu=mu, anneal=anneal, drift=drift
    )
    largest = float(jnp.finfo(x.dtype).max) / 2
    grown = x * jnp.exp(jnp.minimum(exponent, jnp.log(largest)))
    limit = min(largest, float(jnp.finfo(dtype).max))
    return jnp.clip(grown, -limit, limit).astype(dtype)


def unconstrained_multiplicative_step(
    x: Array,
    score: Array,
    noise: Array,
    *,
    delta: Any,
    sigma: Any,
    mu: Any = None,
    anneal: Any = 1.0,
) -> Array:
    r"""The first-order counterpart of ``dale_langevin_step``: multiplies, but may change signs.

    .. math::

        x \leftarrow x \big(1 + 2\delta\sigma^2 - \delta\mu + \delta\sigma^2\, x s
            + a\sqrt\delta\,\sigma z\big)

    Args:
      x: the sample, of either sign.
      score: s, the gradient of log p at x.
      noise: z, standard normal.
      delta: step size, >= 0.
      sigma: volatility, >= 0.
      mu: drift of the forward motion; default sigma^2 / 2.
      anneal: a, factor on the noise, >= 0.

    Returns:
      The next sample, in the dtype of ``x``; computed in f32 at least.

    Raises:
      ValueError: if an argument is out of range.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([2.0])
    >>> y = unconstrained_multiplicative_step(x, 0 * x, 0 * x, delta=0.1, sigma=1.0)
    >>> round(float(y[0]), 3)  # 2 * (1 + 0.2 - 0.05)
    2.3

    Reference: Shetty et al., "Dale meets Langevin: A Multiplicative Denoising Diffusion Model",
    2025, arXiv 2510.02730. Agrees with the authors' sampler.
    """
    check_range(delta=delta, sigma=sigma, anneal=anneal, ge=0)
    x, dtype = _wide(x)
    square = jnp.square(sigma)
    mu = square / 2 if mu is None else mu
    drift = 2 * delta * square - delta * mu + delta * square * (x * score)
    return (x * (1 + drift + anneal * jnp.sqrt(delta) * sigma * noise)).astype(dtype)


def _wide(x: Array) -> tuple[Array, Any]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a real floating-point array, got dtype {x.dtype}")
    return x.astype(compute_dtype(x)), x.dtype
