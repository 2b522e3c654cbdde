"""The z-loss: keeps the logits of a softmax from drifting away together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optimkit.numerics import check_range, compute_dtype, safe_div, saturate
from optimkit.protocols import Array


def z_loss(logits: Array, coefficient: Any = 1e-4, *, where: Array | None = None) -> jax.Array:
    r"""A penalty on the normalizer of a softmax, to be added to the cross-entropy.

    .. math:: c \cdot \operatorname{mean} \log^2 Z, \qquad Z = \sum_k e^{z_k}

    The cross-entropy does not change when all logits move together; left to itself, log Z drifts
    until training diverges at high learning rates.

    Args:
      logits: ``(..., classes)``.
      coefficient: c, >= 0; 1e-4 in the paper.
      where: which tokens count, ``(...)`` of bools; default all.

    Returns:
      A scalar in f32 or better; 0 if no token counts.

    Raises:
      ValueError: if the coefficient is negative, or ``where`` has another shape.

    >>> round(float(z_loss(jnp.zeros((3, 8)), 1.0)), 4)  # log(8)^2
    4.3241

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", ICLR 2024, arXiv 2309.14322.
    """
    check_range(coefficient=coefficient, ge=0)
    logits = jnp.asarray(logits)
    if where is not None and jnp.shape(where) != logits.shape[:-1]:
        raise ValueError(f"where has shape {jnp.shape(where)}, but logits {logits.shape}")
    log_z = jax.nn.logsumexp(logits.astype(compute_dtype(logits)), axis=-1)
    counted = jnp.ones_like(log_z) if where is None else jnp.asarray(where, log_z.dtype)
    squares = jnp.where(counted > 0, jnp.square(saturate(log_z)), 0)
    return coefficient * safe_div(jnp.sum(squares), jnp.sum(counted))
