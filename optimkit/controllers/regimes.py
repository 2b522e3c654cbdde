"""How calm training is: from the change of a network's activations on a few fixed inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from optimkit.numerics import check_choice, check_count, check_range, compute_dtype, safe_norm
from optimkit.protocols import Array

CHAOTIC, TRANSITION, STABLE, UNKNOWN = 0, 1, 2, -1
REGIMES: dict[int, str] = {
    CHAOTIC: "chaotic",
    TRANSITION: "transition",
    STABLE: "stable",
    UNKNOWN: "unknown",
}
"""Names of the codes of ``regime_from_similarity``."""


def activation_similarity(
    a: Array,
    b: Array,
    *,
    eps: Any = 1e-8,
    reduce: Literal["mean_of_rows", "rows", "concatenated"] = "mean_of_rows",
) -> Array:
    """The cosine between the activations of two checkpoints on the same inputs.

    Args:
      a: activations, (inputs, features).
      b: those of another checkpoint.
      eps: added to each norm, so that zero activations give 0.
      reduce: ``"mean_of_rows"``: the mean of the cosines of the inputs, as in the author's code;
        ``"rows"``: these cosines; ``"concatenated"``: one cosine of all activations, as in the
        paper.

    Returns:
      A scalar, or one number an input.

    Raises:
      ValueError: if the two are no matrices of one shape.

    >>> a, b = jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> float(activation_similarity(a, b))
    0.5
    """
    check_choice(("mean_of_rows", "rows", "concatenated"), reduce=reduce)
    if np.ndim(a) != 2 or np.shape(a) != np.shape(b):
        raise ValueError(
            "activations must be two arrays of one shape (inputs, features), got "
            f"{np.shape(a)} and {np.shape(b)}"
        )
    wide = compute_dtype(a, b)
    a, b = jnp.asarray(a, wide), jnp.asarray(b, wide)
    if reduce == "concatenated":
        a, b = a.reshape(1, -1), b.reshape(1, -1)
    a, b = (x / (safe_norm(x, axis=1, keepdims=True) + jnp.asarray(eps, wide)) for x in (a, b))
    cosines = jnp.sum(a * b, axis=1)
    return cosines if reduce == "rows" else jnp.mean(cosines)


def regime_from_similarity(s: Any, tau_low: Any = 0.9962696, tau_high: Any = 0.99948916) -> Array:
    """The regime that a similarity speaks of: 0 chaotic, 1 transition, 2 stable, -1 unknown.

    Args:
      s: similarity of two checkpoints; NaN, where there is only one, is unknown.
      tau_low: chaotic up to here. The defaults are the means over five runs of GPT-2, and hold for
        its 100 prompts and 50 steps: calibrate your own.
      tau_high: stable from here.

    Returns:
      int32, in the shape of ``s``.

    Raises:
      ValueError: if ``tau_low`` is above ``tau_high``.

    >>> regime_from_similarity(jnp.array([0.9, 0.998, 1.0, jnp.nan])).tolist()
    [0, 1, 2, -1]
    """
    check_range(**{"tau_high - tau_low": tau_high - tau_low}, ge=0)
    s = jnp.asarray(s, float)
    code = jnp.where(s >= tau_high, STABLE, jnp.where(s <= tau_low, CHAOTIC, TRANSITION))
    return jnp.where(jnp.isnan(s), UNKNOWN, code).astype(jnp.int32)


def calibrate_thresholds(
    similarities: Sequence[float] | Array, percentile_low: Any = 30, percentile_high: Any = 70
) -> tuple[float, float]:
    """``(tau_low, tau_high)`` from the similarities of a finished run.

    Args:
      similarities: at least one; NaN is left out.
      percentile_low: this share, in percent, counts as chaotic.
      percentile_high: what lies above this one counts as stable.

    Returns:
      Two thresholds. Where they fall together they are moved apart by 0.002, as the author does.

    Raises:
      ValueError: without a similarity, or for percentiles out of [0, 100] or out of order.

    >>> calibrate_thresholds([0.0, 1.0, 2.0, 3.0, 4.0], 25, 75)
    (1.0, 3.0)
    """
    check_range(percentile_low=percentile_low, percentile_high=percentile_high, ge=0, le=100)
    check_range(**{"percentile_high - percentile_low": percentile_high - percentile_low}, ge=0)
    known = np.asarray(similarities, np.float64)
    known = known[~np.isnan(known)]
    if known.size == 0:
        raise ValueError("similarities is empty: thresholds need at least one")
    low, high = np.percentile(known, [percentile_low, percentile_high])
    if high <= low:
        low, high = (low + high) / 2 - 0.001, (low + high) / 2 + 0.001
    return float(low), float(high)


def activation_variance(activations: Array, window: int = 5) -> Array:
    """How much activations vary over the last checkpoints: for a log; it decides nothing.

    Args:
      activations: (checkpoints, inputs, features), two checkpoints at least.
      window: how many checkpoints, each one included, >= 2.

    Returns:
      One number for every checkpoint but the first: the variance over the window, averaged over
      inputs and features.

    Raises:
      ValueError: if the array has another rank, or the window is too short.

    >>> activation_variance(jnp.array([[[0.0]], [[2.0]], [[2.0]]]), window=2).tolist()
    [1.0, 0.0]
    """
    check_count(least=2, window=window)
    if np.ndim(activations) != 3 or len(activations) < 2:
        raise ValueError(
            "activations must be (checkpoints, inputs, features) with two checkpoints or more, "
            f"got shape {np.shape(activations)}"
        )
    windows = [activations[max(0, i + 1 - window) : i + 1] for i in range(1, len(activations))]
    return jnp.stack([jnp.mean(jnp.var(jnp.asarray(w), axis=0)) for w in windows])


def loss_curvature(losses: Sequence[float] | Array) -> Array:
    """The second difference of the losses at successive checkpoints: for a log, too.

    Args:
      losses: one a checkpoint.

    Returns:
      One number for every checkpoint but the first; 0 for the second, which has too few before.

    Raises:
      ValueError: unless the losses are a vector.

    >>> loss_curvature([4.0, 2.0, 1.0]).tolist()
    [0.0, 1.0]
    """
    losses = jnp.asarray(losses, float)
    if losses.ndim != 1:
        raise ValueError(f"losses must be a vector, got shape {losses.shape}")
    bent = jnp.diff(losses, n=2)
    return jnp.concatenate([jnp.full(min(1, max(losses.size - 1, 0)), 0.0), bent])
