"""Signal and noise of a gradient made of several, and the baseline that lowers the noise."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.leaves import check_real, widen
from optimkit.numerics import compute_dtype, safe_div
from optimkit.protocols import Array, PyTree


class GradientSNR(NamedTuple):
    """``signal``: squared norm of the true gradient, as estimated. ``noise``: variance of the mean.

    ``snr`` is signal over noise, ``scale`` is signal / (signal + noise). Four scalars.
    """

    signal: Array
    noise: Array
    snr: Array
    scale: Array


def optimal_baseline(
    rewards: Array, score_sq_norms: Array, *, axis: int = -1, leave_one_out: bool = True
) -> Array:
    r"""The reward that a policy gradient should be measured against: least variance.

    With :math:`w_i` the squared norm of :math:`\nabla\log\pi(o_i)`:

    .. math:: b^* = \frac{\sum_i w_i r_i}{\sum_i w_i}, \qquad
        b_i = \frac{\sum_{j \ne i} w_j r_j}{\sum_{j \ne i} w_j} \text{ without the own sample}

    Args:
      rewards: one a sample.
      score_sq_norms: w, >= 0, of the same shape. Exact ones cost a gradient a sample; where that
        is too dear, the caller chooses the stand-in.
      axis: the axis of the samples of one group.
      leave_one_out: give each sample the baseline of the others, which keeps the gradient unbiased.

    Returns:
      An array of the rewards' shape, or without ``axis`` if not ``leave_one_out``. Zero where no
      weight is left, as in a group of one. Equal weights give the mean of the rewards.

    Raises:
      ValueError: if the shapes differ.

    Provisional: the classical minimiser, which the paper's abstract describes; its own formula
    could not be read.

    >>> import jax.numpy as jnp
    >>> optimal_baseline(jnp.array([1.0, 0.0, 4.0]), jnp.array([1.0, 2.0, 1.0])).tolist()
    [1.3333333730697632, 2.5, 0.3333333432674408]

    Reference: Huang et al., "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning",
    2025, arXiv 2511.23310.
    """
    if np.shape(rewards) != np.shape(score_sq_norms):
        raise ValueError(
            f"rewards have shape {np.shape(rewards)}, score_sq_norms {np.shape(score_sq_norms)}"
        )
    dtype = compute_dtype(rewards, score_sq_norms)
    r, w = jnp.asarray(rewards, dtype), jnp.asarray(score_sq_norms, dtype)
    if not leave_one_out:
        return safe_div(jnp.sum(w * r, axis=axis), jnp.sum(w, axis=axis))

    def others(x: Array) -> Array:
        """Sums without the own sample, by sums from both ends: a difference would lose digits."""
        x = jnp.moveaxis(x, axis, 0)
        none = jnp.zeros_like(x[:1])
        before = jnp.concatenate([none, jnp.cumsum(x, axis=0)[:-1]])
        after = jnp.concatenate([jnp.cumsum(x[::-1], axis=0)[:-1][::-1], none])
        return jnp.moveaxis(before + after, 0, axis)

    return safe_div(others(w * r), others(w))


def gradient_snr(grads: PyTree, *, debias: bool = True) -> GradientSNR:
    r"""How much of a mean gradient is signal, from the n gradients that it is the mean of.

    .. math::

        \bar g = \tfrac1n \textstyle\sum_i g_i, \quad
        V = \frac{\sum_i \|g_i - \bar g\|^2}{(n-1)\,n}, \quad
        S = \max(\|\bar g\|^2 - V, 0), \quad s = \frac{S}{S + V}

    s is the factor on the rate that promises most progress, where the rate is right without noise.

    Args:
      grads: a tree of gradients of samples or micro-batches, with a leading axis of n >= 2.
      debias: subtract V from the squared norm, which is too large by V on average.

    Returns:
      ``GradientSNR``. Without any noise ``snr`` is infinite and ``scale`` is 1.

    Raises:
      ValueError: if the leaves do not share a leading axis of two or more.

    Hand ``scale`` to ``scale_by_snr`` or ``snr_learning_rate`` as ``snr_scale``.

    >>> import jax.numpy as jnp
    >>> found = gradient_snr(jnp.array([[3.0, 0.0], [1.0, 0.0]]))
    >>> [float(x) for x in found]  # mean 2, variance of the mean 1
    [3.0, 1.0, 3.0, 0.75]

    Reference: Huang et al., "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning",
    2025, arXiv 2511.23310, in spirit: its formula could not be read.
    """
    check_real(grads, "gradient")
    leaves = jax.tree.leaves(widen(grads))
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes & {(), (0,), (1,)}:
        raise ValueError(
            "every leaf of grads needs the same leading axis of at least two gradients, got shapes "
            f"{sorted({leaf.shape for leaf in leaves})}"
        )
    ((n,),) = sizes
    dtype = compute_dtype(*leaves)
    means = [jnp.mean(leaf, axis=0, keepdims=True) for leaf in leaves]

    def squares(arrays: list[Array]) -> Array:
        return sum(
            (jnp.sum(jnp.square(x)).astype(dtype) for x in arrays), start=jnp.zeros((), dtype)
        )

    noise = squares([g - m for g, m in zip(leaves, means, strict=True)]) / ((n - 1) * n)
    length = squares(means)
    signal = jnp.maximum(length - noise, 0) if debias else length
    return GradientSNR(
        signal,
        noise,
        safe_div(signal, noise, otherwise=jnp.inf),
        safe_div(signal, signal + noise, otherwise=1.0),
    )
