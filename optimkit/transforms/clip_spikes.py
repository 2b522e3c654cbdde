"""SPAM's spike clipping: no entry may exceed a multiple of its own running root mean square."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import map_leaves, zero_count, zeros_like
from optimkit.numerics import LARGE, check_count, check_range, due, next_count, safe_div
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class ClipSpikesState(NamedTuple):
    """``count``: int32 scalar. ``nu``: second moment of the clipped gradient."""

    count: Array
    nu: PyTree


def clipping_is_on(step: Array, start: int, interval: int | None) -> Array:
    """Whether a 1-based step clips: from ``start`` on, counted anew after every restart."""
    on = step >= start
    return on & (step % interval >= start) if interval else on


def second_moment_and_limit(
    g: Array, v: Array, threshold: Any, b2: Any, on: Array
) -> tuple[Array, Array]:
    r"""The second moment of the clipped gradient, and the limit on ``|g|`` written through it.

    Clipping compares :math:`g^2` with :math:`\theta v`, where v is the moment *before* this step.
    With :math:`v' = b_2 v + (1-b_2)\min(g^2, \theta v)` and
    :math:`c = \theta / (b_2 + (1-b_2)\theta)`,

    .. math:: g^2 > \theta v \iff g^2 > c\,v', \qquad \text{and then } c\,v' = \theta v,

    so ``clip(g, -limit, limit)`` with :math:`limit = \sqrt{c v'}` is the clipped gradient, and
    nothing needs the old array once the new one exists: that would cost a copy of it.

    Args:
      g: gradient; entries above 1e15 (f32) count as 1e15 in the moment.
      v: second moment before this step, same shape.
      threshold: theta, > 0 where ``on``.
      b2: decay of the second moment.
      on: whether to clip; a scalar or one flag an entry.
    """
    largest_square = LARGE[jnp.finfo(v.dtype).dtype.itemsize] ** 2
    cap = jnp.minimum(jnp.where(on, threshold * v, jnp.inf), largest_square)
    v = b2 * v + (1 - b2) * jnp.minimum(jnp.square(g), cap)
    ratio = safe_div(threshold, jnp.asarray(b2 + (1 - b2) * threshold, v.dtype))
    return v, jnp.where(on, jnp.sqrt(ratio * v), jnp.inf)


def clip_spikes(
    threshold: Any = 5000.0, b2: Any = 0.999, *, start: int = 20, interval: int | None = None
) -> GradientTransformation:
    r"""Shrinks every entry whose square exceeds ``threshold`` times its own second moment.

    .. math::

        g_i \leftarrow \operatorname{sign}(g_i)\sqrt{\theta v_i}
            \;\text{ where } g_i^2 > \theta v_i, \qquad
        v \leftarrow b_2 v + (1-b_2)\, g^2 \;\text{ with the clipped } g

    v is not corrected for its start, so k steps after it the limit is about
    :math:`\sqrt{\theta(1-b_2^k)}` root mean squares of the entry: 10 at k = 20, 70 in the limit.

    Args:
      threshold: theta, >= 0; 5000 is the authors' value. 0 switches clipping off.
      b2: decay of the second moment, in [0, 1).
      start: steps before clipping begins, after the start and after every restart. 20 is in the
        authors' code only. With ``start >= interval`` nothing is ever clipped.
      interval: zero the second moment at every interval-th step (from 1), as SPAM does at its
        momentum resets. Default: never.

    Returns:
      A transformation for the front of a chain; 4 bytes of state a f32 parameter. ``scale_by_spam``
      clips with Adam's own second moment instead, at no further state.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    An entry that was zero since the last restart has v = 0 and is clipped to zero until the next
    one, as in the authors' code: an embedding row of a token not seen in the first ``start - 1``
    steps. Without an ``interval`` there is no next restart, so there such an entry passes.
    An infinite entry is clipped like any other; NaN passes and poisons its own entry of v.

    >>> import jax.numpy as jnp
    >>> tx = clip_spikes(4.0, 0.5, start=2)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 1.0], [1.0, 1.0], [1.0, -100.0]):
    ...     clipped, state = tx.update(jnp.array(g), state)
    >>> [round(float(x), 3) for x in clipped]  # the limit is sqrt(4 * 0.75)
    [1.0, -1.732]

    Reference: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
    ICLR 2025, arXiv 2501.06842.
    """
    check_range(threshold=threshold, ge=0)
    check_range(b2=b2, ge=0, lt=1)
    check_count(start=start, interval=interval or 0)

    def init(params: PyTree) -> ClipSpikesState:
        return ClipSpikesState(zero_count(), zeros_like(params))

    def update(
        updates: PyTree, state: ClipSpikesState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ClipSpikesState]:
        del params, extra
        count = next_count(state.count)
        clipping = clipping_is_on(count, start, interval) & (threshold > 0)

        def step(g: Array, v: Array) -> tuple[Array, Array]:
            if interval:
                v = jnp.where(due(count, interval), 0, v)
            on = clipping if interval else clipping & (v > 0)
            v, limit = second_moment_and_limit(g, v, threshold, b2, on)
            return jnp.clip(g, -limit, limit), v

        updates, nu = map_leaves(step, updates, state.nu)
        return updates, ClipSpikesState(count, nu)

    return transformation(init, update)


RECORD = Method(
    factory=clip_spikes,
    kind="piece",
    summary="clip each entry to a multiple of its own root mean square",
    example={"start": 2, "interval": 4},
    traced=("threshold", "b2"),
    static=("start", "interval"),
    position="first",
    communication="none",
    response="proportional",
    state_bytes=4,
    moved_bytes=20,
    paper='Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", '
    "ICLR 2025, arXiv 2501.06842",
    reference="TianjinYellow/SPAM-Optimizer@e8185fbe695fdc449953b4a1f96121df5bf0d268:"
    "galore_torch/SPAM.py:AdamW",
    licence="",
)
