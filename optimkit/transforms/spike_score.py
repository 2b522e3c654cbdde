"""Counts gradient spikes while training runs: each entry against its own running mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import map_leaves, zero_count, zeros_like
from optimkit.numerics import as_float, check_range, next_count, safe_div, saturate
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class TrackSpikeScoreState(NamedTuple):
    """``count``: int32. ``magnitude_sum``: running sum of |g|. ``metrics``: ``spike_count``."""

    count: Array
    magnitude_sum: PyTree
    metrics: dict[str, Array]


def online_spike_score(g: Array, magnitude_sum: Array, count: Array) -> Array:
    """``|g|`` over its mean over steps 1 to ``count``, this one included; 0 for a zero history.

    >>> import jax.numpy as jnp
    >>> float(online_spike_score(jnp.array(-9.0), jnp.array(12.0), jnp.array(4)))
    3.0
    """
    return safe_div(jnp.abs(saturate(g)) * as_float(count).astype(g.dtype), magnitude_sum)


def track_spike_score(threshold: Any = 50.0) -> GradientTransformation:
    r"""Counts the entries that exceed ``threshold`` times their running mean; changes no update.

    .. math:: s_{t,i} = \frac{|g_{t,i}|}{\frac1t \sum_{j=1}^{t} |g_{j,i}|}, \qquad
        \text{a spike if } s_{t,i} > \text{threshold}

    The mean includes the current step, so the score cannot exceed t: with the default, no spike is
    counted in the first 50 steps. ``optimkit.diagnostics.gradient_spike_score`` is the paper's own
    score, which needs the whole history.

    Args:
      threshold: scores above it are spikes, >= 0; 50 is the paper's.

    Returns:
      A transformation for the front of a chain that passes updates on as they are. It keeps 4
      bytes a f32 parameter; ``state.metrics["spike_count"]`` is the number of spikes so far.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Entries above 1e15 (f32) count as 1e15; a non-finite entry poisons its own sum.

    >>> import jax.numpy as jnp
    >>> tx = track_spike_score(threshold=2.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 1.0], [1.0, -1.0], [1.0, 10.0]):
    ...     _, state = tx.update(jnp.array(g), state)
    >>> float(state.metrics["spike_count"])  # the last step, second entry: 10 / 4
    1.0

    Reference: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
    ICLR 2025, arXiv 2501.06842; the running form is ours.
    """
    check_range(threshold=threshold, ge=0)

    def init(params: PyTree) -> TrackSpikeScoreState:
        metrics = {"spike_count": jnp.zeros((), jnp.float32)}
        return TrackSpikeScoreState(zero_count(), zeros_like(params), metrics)

    def update(
        updates: PyTree, state: TrackSpikeScoreState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, TrackSpikeScoreState]:
        del params, extra
        count = next_count(state.count)

        def step(g: Array, total: Array) -> tuple[Array, Array]:
            return g, total + jnp.abs(saturate(g))

        _, magnitude_sum = map_leaves(step, updates, state.magnitude_sum)

        def spikes(g: Array, total: Array) -> Array:
            score = online_spike_score(g.astype(total.dtype), total, count)
            return jnp.sum(score > threshold, dtype=jnp.float32)

        found = jax.tree.leaves(jax.tree.map(spikes, updates, magnitude_sum))
        metrics = {"spike_count": sum(found, start=state.metrics["spike_count"])}
        return updates, TrackSpikeScoreState(count, magnitude_sum, metrics)

    return transformation(init, update)


RECORD = Method(
    factory=track_spike_score,
    kind="piece",
    summary="count gradient entries far above their running mean; changes no update",
    example={"threshold": 2.0},
    traced=("threshold",),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=12,
    paper='Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", '
    "ICLR 2025, arXiv 2501.06842",
    reference="the paper's formula, in its causal form",
    licence="",
)
