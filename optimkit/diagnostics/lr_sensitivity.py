"""How much a bad learning rate costs: one number for a sweep."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optimkit.numerics import compute_dtype
from optimkit.protocols import Array


def lr_sensitivity(losses: Array, loss_init: Any, learning_rates: Array | None = None) -> jax.Array:
    r"""The mean loss above the best one over a sweep of learning rates.

    .. math:: \frac1n \sum_\eta \big[\min(\ell(\eta), \ell_0) - \min_{\eta'} \ell(\eta')\big]

    A run that diverged counts as one that learnt nothing.

    Args:
      losses: final losses, one a learning rate, on the last axis.
      loss_init: the loss before training.
      learning_rates: the rates of the sweep. They are checked and weigh nothing: space them evenly
        on a log scale, as the authors' 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1.

    Returns:
      A scalar, or one a sweep: 0 if every rate does as well as the best, or none learns.

    Raises:
      ValueError: if there is no loss, or not one a learning rate.

    NaN counts as diverged. Numbers compare only over the same rates.

    >>> float(lr_sensitivity(jnp.array([3.0, 2.0, jnp.nan]), loss_init=7.0))  # (1 + 0 + 5) / 3
    2.0

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", ICLR 2024, arXiv 2309.14322.
    """
    losses = jnp.asarray(losses)
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses must have one entry a learning rate, got shape {losses.shape}")
    if learning_rates is not None and jnp.shape(learning_rates) != losses.shape[-1:]:
        raise ValueError(
            f"learning_rates has shape {jnp.shape(learning_rates)}, but losses {losses.shape}"
        )
    start = jnp.asarray(loss_init, compute_dtype(losses))
    start = jnp.broadcast_to(start, losses.shape[:-1])[..., None]
    known = jnp.where(jnp.isnan(losses), jnp.inf, losses.astype(start.dtype))
    reached = jnp.minimum(known, start)
    return jnp.mean(reached - jnp.min(reached, axis=-1, keepdims=True), axis=-1)
