"""AdaClip of Stable-SPAM: clip to a running mean of the leaf's own largest entry."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import map_leaves, scalars_like, zero_count
from optimkit.numerics import (
    check_count,
    check_range,
    max_abs,
    next_count,
    one_minus_power,
    safe_div,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class ClipByTrackedMaxState(NamedTuple):
    """``count``: int32 scalar. ``tracked_max``: one f32 scalar a leaf."""

    count: Array
    tracked_max: PyTree


def restarted_count(count: Array, interval: int | None) -> Array:
    """Stable-SPAM's tracker count at step ``count`` (1-based): restarts at 2 after every interval.

    The published class shares one counter between its trackers and the restarted Adam, so that the
    bias correction of trackers that were not restarted begins anew. None or 0: no restart.
    """
    if not interval:
        return count
    return jnp.where(count <= interval, count, (count - 1) % interval + 2)


def clip_by_tracked_max(
    decay: Any = 0.999, *, count_restart: int | None = None
) -> GradientTransformation:
    r"""Scales down every entry above a running mean of the leaf's largest |entry|.

    .. math::

        M = \max|g|, \quad T_t = \gamma T_{t-1} + (1-\gamma) M, \quad
        \hat T = \frac{T_t}{1-\gamma^t}, \qquad
        g_i \leftarrow \frac{g_i}{M} \hat T \;\text{ where } |g_i| > \hat T

    The mean takes the unclipped maximum. The rule is not monotone: in a spike an entry just above
    the limit ends near zero, below entries that were not clipped; that is the authors' rule. A
    spike of 1000 times the usual doubles the limit at 0.999, so the clip then rests for long.

    Args:
      decay: gamma, in [0, 1). 0.999 is the authors' value.
      count_restart: restart the count of the bias correction after so many steps, as the published
        class does at its momentum resets: right after a restart the limit is 1/(1 - decay^2) times
        the mean, 500 times for 0.999. Default: no restart.

    Returns:
      A transformation that works on whole leaves, in any position before the moments. It keeps one
      f32 scalar a leaf. Inside ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    A zero gradient passes and only moves the mean. A non-finite gradient poisons the mean for good:
    put a guard in front.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_tracked_max(0.5)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 0.5], [8.0, 0.5]):  # the second gradient has a spike
    ...     clipped, state = tx.update(jnp.array(g), state)
    >>> [round(float(x), 3) for x in clipped]
    [5.667, 0.5]

    Reference: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    2025, arXiv 2502.17055. Agrees with the authors' class (``clipped/`` of ``stable_spam__*``).
    """
    check_range(decay=decay, ge=0, lt=1)
    check_count(count_restart=count_restart or 0)

    def init(params: PyTree) -> ClipByTrackedMaxState:
        return ClipByTrackedMaxState(zero_count(), scalars_like(params))

    def update(
        updates: PyTree,
        state: ClipByTrackedMaxState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ClipByTrackedMaxState]:
        del params, extra
        count = next_count(state.count)
        correction = one_minus_power(decay, restarted_count(count, count_restart))

        def step(g: Array, tracked: Array) -> tuple[Array, Array]:
            largest = max_abs(g)
            tracked = decay * tracked + (1 - decay) * largest
            limit = tracked / correction
            # Scalars first: one product an entry, cheap enough to be fused into every reader.
            ratio = jnp.minimum(safe_div(limit, largest), 1)
            # Not |g| > limit: XLA on CPUs would store |g|, to share it with the maximum above.
            return jnp.where((g > limit) | (g < -limit), g * ratio, g), tracked

        updates, tracked_max = map_leaves(step, updates, state.tracked_max)
        return updates, ClipByTrackedMaxState(count, tracked_max)

    return transformation(init, update)


RECORD = Method(
    factory=clip_by_tracked_max,
    kind="piece",
    summary="clip to a running mean of the leaf's largest entry (AdaClip)",
    traced=("decay",),
    static=("count_restart",),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025, '
    "arXiv 2502.17055",
    reference="TianjinYellow/StableSPAM@6a66da1ea7005f7fe7bc570b7968144b42163bed:"
    "galore_torch/stablespam.py:StableSPAM",
    licence="",
)
