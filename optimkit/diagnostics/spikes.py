"""The gradient spike score of a recorded history."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optimkit.leaves import check_real
from optimkit.numerics import compute_dtype, safe_div, saturate
from optimkit.protocols import Array, PyTree


def gradient_spike_score(grads: PyTree, axis: int = 0) -> PyTree:
    r"""How far each gradient entry stands above its own mean magnitude over the whole history.

    .. math:: \mathrm{GSS}_{t,i} = \frac{|g_{t,i}|}{\frac1T \sum_{j} |g_{j,i}|}

    The paper calls an entry a spike where the score exceeds 50.

    Args:
      grads: recorded gradients, an array or a tree of arrays with a time axis of length T.
      axis: the time axis.

    Returns:
      A tree like ``grads`` of scores, f32 at least; 0 for an entry that was always zero.

    Raises:
      TypeError: for a complex or integer leaf.

    The score never exceeds T, so a history of 50 steps or fewer has no spike. Entries above 1e15
    (f32) count as 1e15. ``optimkit.track_spike_score`` counts spikes while training runs.

    >>> history = jnp.array([[1.0, 0.0], [1.0, 0.0], [-4.0, 0.0]])
    >>> gradient_spike_score(history).tolist()
    [[0.5, 0.0], [0.5, 0.0], [2.0, 0.0]]

    Reference: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
    ICLR 2025, arXiv 2501.06842.
    """
    check_real(grads, "gradient")

    def score(g: Array) -> Array:
        size = jnp.abs(saturate(jnp.asarray(g, compute_dtype(g))))
        return safe_div(size, jnp.mean(size, axis=axis, keepdims=True))

    return jax.tree.map(score, grads)
