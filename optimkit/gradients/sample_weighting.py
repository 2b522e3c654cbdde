"""Weights of samples in the loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.numerics import check_count, check_range, compute_dtype, safe_div
from optimkit.protocols import Array


def beta_kernel_weight(
    pass_rate: Array, *, a: Any = 1.0, b: Any = 1.0, normalize: bool = False
) -> Array:
    r"""Most weight for problems that a student solves now and then: :math:`p^a (1 - p)^b`.

    Args:
      pass_rate: p in [0, 1], the share of a problem's attempts that were right.
      a: exponent of p, >= 0.
      b: exponent of 1 - p, >= 0. Both 1 is the published form without hyperparameters.
      normalize: divide by the mean of the batch, so that the rate keeps its meaning; this
        library's.

    Returns:
      Weights in the shape of ``pass_rate``, f32 at least, through which no gradient flows. Exactly
      0 at p = 0 and 1 for positive exponents; 0^0 is 1. All zero stays zero.

    Raises:
      ValueError: if a rate lies outside [0, 1], or an exponent is negative.

    Of few attempts, p is coarse: (right + 1) / (attempts + 2) is smoother. Under Adam a common
    factor of all weights does nothing.

    >>> beta_kernel_weight(jnp.array([0.0, 0.25, 0.5, 1.0])).tolist()
    [0.0, 0.1875, 0.25, 0.0]

    Reference: Xu et al., "Paced: Distillation at the Frontier of Student Competence", 2026,
    arXiv 2603.11178.
    """
    check_range(pass_rate=pass_rate, ge=0, le=1)
    check_range(a=a, b=b, ge=0)
    dtype = compute_dtype(pass_rate, jnp.float32)
    p = jax.lax.stop_gradient(jnp.asarray(pass_rate, dtype))
    weight = _power(p, a) * _power(1 - p, b)
    return safe_div(weight, jnp.mean(weight)) if normalize else weight


def _power(x: Array, exponent: Any) -> Array:
    exponent = jnp.asarray(exponent, x.dtype)
    return jnp.where(exponent == 0, 1, x**exponent)


def weighted_mean(
    per_sample_loss: Array, weights: Array, *, normalize: bool = True, axis_name: Any = None
) -> Array:
    r"""The mean of losses under weights, through which no gradient flows.

    Args:
      per_sample_loss: one a sample.
      weights: of the same shape, >= 0.
      normalize: divide by the sum of the weights; False: by the number of samples.
      axis_name: of devices, over which both sums are taken.

    Returns:
      A scalar, f32 at least; 0 where all weights are.

    Raises:
      ValueError: if the shapes differ, or there is no sample.

    >>> float(weighted_mean(jnp.array([1.0, 5.0]), jnp.array([3.0, 1.0])))
    2.0
    """
    if jnp.shape(per_sample_loss) != jnp.shape(weights) or np.size(weights) == 0:
        raise ValueError(
            f"per_sample_loss and weights must be of one shape with a sample in it, got "
            f"{jnp.shape(per_sample_loss)} and {jnp.shape(weights)}"
        )
    dtype = compute_dtype(per_sample_loss, weights)
    w = jax.lax.stop_gradient(jnp.asarray(weights, dtype))
    # A weight of zero also silences a loss that is not finite.
    losses = jnp.where(w == 0, 0, jnp.asarray(per_sample_loss, dtype))
    total = jnp.sum(w * losses)
    size = jnp.sum(w) if normalize else jnp.asarray(float(w.size), dtype)
    if axis_name is not None:
        total, size = jax.lax.psum((total, size), axis_name)
    return safe_div(total, size)


class MomentumDifficulty:
    r"""A running mean of each sample's loss, and weights that grow with it.

    Provisional: the paper's abstract says that weights follow a difficulty smoothed by momentum;
    the formula is a reading of it, :math:`(d_i / \operatorname{mean} d)^{boost}`, scaled to mean 1
    over the samples asked for.

    Args:
      num_samples: how many samples there are, >= 1.
      decay: of the running means, in [0, 1). A sample's first loss is taken whole.
      boost: exponent, >= 0; 0 weighs all alike.

    Raises:
      ValueError: if an argument is out of range.

    >>> difficulty = MomentumDifficulty(3, decay=0.5, boost=1.0)
    >>> difficulty.update([0, 1], [1.0, 3.0]).tolist()
    [0.5, 1.5]
    >>> difficulty.weights([0, 2]).tolist()  # a sample not seen counts as one of mean difficulty
    [0.6666666666666666, 1.3333333333333333]

    Reference: Bhattacharyya et al., "Diffusion Deepfake", 2024, arXiv 2404.01579.
    """

    def __init__(self, num_samples: int, *, decay: float, boost: float) -> None:
        check_count(num_samples=num_samples, least=1)
        check_range(decay=decay, ge=0, lt=1)
        check_range(boost=boost, ge=0)
        self.decay, self.boost = decay, boost
        self.difficulty = np.full(num_samples, np.nan)

    def update(self, ids: Any, losses: Any) -> np.ndarray:
        """Takes in the losses of some samples; returns their weights.

        Raises:
          ValueError: if ids and losses differ in shape, or a loss is negative or not finite.
          IndexError: for a sample that there is not.
        """
        index, values = self._checked(ids), np.asarray(losses, np.float64)
        if values.shape != index.shape:
            raise ValueError(f"ids have shape {index.shape}, losses {values.shape}")
        if not np.all(np.isfinite(values) & (values >= 0)):
            raise ValueError("losses must be finite and >= 0")
        for i, loss in zip(index, values, strict=True):
            old = self.difficulty[i]
            new = loss if np.isnan(old) else self.decay * old + (1 - self.decay) * loss
            self.difficulty[i] = new
        return self.weights(index)

    def weights(self, ids: Any) -> np.ndarray:
        """Weights of some samples, of mean 1; 1 for all while nothing, or only zero, is known."""
        index = self._checked(ids)
        known = ~np.isnan(self.difficulty)
        mean = float(np.mean(self.difficulty[known])) if known.any() else 0.0
        if index.size == 0 or mean == 0:
            return np.ones(index.shape)
        weights = (np.where(known, self.difficulty, mean)[index] / mean) ** self.boost
        total = float(np.mean(weights))
        return weights / total if total > 0 else np.ones(index.shape)

    def _checked(self, ids: Any) -> np.ndarray:
        index = np.asarray(ids, np.int64)
        size = self.difficulty.size
        if index.ndim != 1:
            raise ValueError(f"ids must be a list of samples, got shape {index.shape}")
        if index.size and (index.min() < 0 or index.max() >= size):
            raise IndexError(f"ids must lie in 0 to {size - 1}")
        return index
