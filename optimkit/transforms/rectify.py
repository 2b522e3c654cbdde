"""RAdam's rectification: how far a young second moment can be trusted."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from optimkit.numerics import as_float
from optimkit.protocols import Array


def average_length(b2: Any, count: Array) -> Array:
    r"""The length of the plain average that resembles an exponential one after ``count`` steps.

    .. math::

        \rho_t = \rho_\infty - \frac{2 t\, b_2^t}{1 - b_2^t}, \qquad
        \rho_\infty = \frac{2}{1-b_2} - 1

    Two large numbers cancel here: in f32 with b2 = 0.9999, rho_4 = 4 would be off by 4e-3. With
    :math:`L = -\ln b_2` and :math:`\ell(a) = \coth a - 1/a` the same number is
    :math:`t + \ell(L/2) - t\,\ell(tL/2)`, which is computed here.

    Args:
      b2: decay of the second moment, in (0, 1).
      count: t, from 1.
    """
    count = as_float(count)
    log_decay = -jnp.log(jnp.asarray(b2, count.dtype))
    return count + _langevin(log_decay / 2) - count * _langevin(count * log_decay / 2)


def rectification(b2: Any, count: Array) -> tuple[Array, Array]:
    r"""RAdam's factor on the step, and ``rho_t``; the factor means something where rho_t > 4.

    .. math::

        \sqrt{\frac{(\rho_t-4)(\rho_t-2)\,\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\,\rho_t}}

    >>> factor, rho = rectification(0.999, 10)
    >>> round(float(factor), 4), round(float(rho), 2)
    (0.049, 9.98)

    Reference: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020,
    arXiv 1908.03265.
    """
    rho = average_length(b2, count)
    limit = 2 / (1 - jnp.asarray(b2, rho.dtype)) - 1
    trusted = jnp.maximum(rho, 4)
    square = (trusted - 4) * (trusted - 2) * limit / ((limit - 4) * (limit - 2) * trusted)
    return jnp.where(rho > 4, jnp.sqrt(square), 0), rho


def _langevin(a: Array) -> Array:
    """``coth a - 1/a`` for a >= 0, by its series where the two terms cancel."""
    small = a < 0.1
    square = jnp.square(jnp.where(small, a, 0))
    series = a / 3 * (1 - square / 15 * (1 - square * 2 / 21 * (1 - square / 10)))
    safe = jnp.where(small, 1, a)
    return jnp.where(small, series, 1 / jnp.tanh(safe) - 1 / safe)
