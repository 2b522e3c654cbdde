"""Raises the advantages of responses whose hidden states explore, or settle, more than usual."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.numerics import check_range, compute_dtype
from optimkit.protocols import Array


class RankMeasures(NamedTuple):
    """Effective rank of responses, its velocity and acceleration: (n,) each, or means of them."""

    rank: Array
    velocity: Array
    acceleration: Array


def update_rank_means(
    means: RankMeasures | None, measures: RankMeasures, *, weight: Any = 0.7
) -> RankMeasures:
    r"""Running means over the steps of the measures' batch means: the only state of the shaping.

    .. math:: m \leftarrow (1 - \gamma)\, m + \gamma\, \operatorname{mean}(x)

    Args:
      means: m, three scalars; None for zeros, the start.
      measures: x of one batch, (n,) each.
      weight: gamma, of the new value, in [0, 1]; 0.7 is the authors' value.

    Returns:
      The new means, three scalars in f32 at least.

    Raises:
      ValueError: if ``weight`` is out of range.

    >>> batch = RankMeasures(*(jnp.array([x, x + 2.0]) for x in (9.0, 1.0, -1.0)))
    >>> means = update_rank_means(None, batch)
    >>> [round(float(m), 3) for m in means]  # 0.7 of 10, 2 and 0
    [7.0, 1.4, 0.0]
    """
    check_range(weight=weight, ge=0, le=1)

    def one(m: Array, x: Array) -> Array:
        x = jnp.asarray(x, compute_dtype(x))
        return (1 - weight) * m + weight * jnp.mean(x)

    return RankMeasures(*map(one, means or (0.0, 0.0, 0.0), measures))


def rank_advantage_shaping(
    advantages: Array,
    measures: RankMeasures,
    means: RankMeasures,
    *,
    performance: Any = 1.0,
    gain: Any = 1.5,
    limit: Any = 5.0,
    eps: Any = 1e-8,
) -> Array:
    r"""Adds to each response's advantage what its effective rank says about exploration.

    .. math::

        z_x &= \operatorname{clip}\Big(\frac{x - m_x}{|m_x| + \epsilon}, -c, c\Big)
            \text{ for rank } r, \text{ velocity } v, \text{ acceleration } a \\
        w &= \operatorname{sigmoid}(g z_a), \qquad
            u = f\, (w \tanh z_r + (1 - w) \tanh z_v) \\
        A &\leftarrow A + \min(\max(u, 0), |A| / 2)

    Args:
      advantages: A, (n, ...): one or several a response.
      measures: of the same responses, (n,) each, for example from
        ``optimkit.diagnostics.effective_rank`` and the means over a response of what
        ``effective_rank_dynamics`` gives, 0 where a response is too short for one.
      means: m, from ``update_rank_means``.
      performance: f, a number or one a response, >= 0: how much the responses still have to gain.
        How it follows from the scores is left to the caller.
      gain: g, >= 0; 1.5 is the authors' value.
      limit: c, > 0; the authors' value.
      eps: guards the quotient, > 0; the authors' value.

    Returns:
      New advantages, in the shape and dtype of ``advantages``; none falls, and none grows by more
      than half its size.

    Raises:
      ValueError: if an argument is out of range, or the shapes do not go together.

    Before the first means there is nothing to compare with: leave the advantages of the first step
    as they are. While a mean is zero, every deviation from it counts as the limit. No recorded run
    of the authors' code is at hand.

    >>> means = RankMeasures(10.0, 2.0, 0.5)
    >>> measures = RankMeasures(jnp.array([15.0]), jnp.array([1.0]), jnp.array([0.5]))
    >>> shaped = rank_advantage_shaping(jnp.array([[1.0, -1.0]]), measures, means)
    >>> shaped.tolist()  # w is 1/2, and tanh(0.5) and tanh(-0.5) cancel
    [[1.0, -1.0]]

    Reference: Huang et al., "Beyond the Exploration-Exploitation Trade-off: A Hidden State Approach
    for LLM Reasoning in RLVR", 2025, arXiv 2509.23808.
    """
    check_range(performance=performance, gain=gain, ge=0)
    check_range(limit=limit, eps=eps, gt=0)
    given = jnp.asarray(advantages)
    a = given.astype(compute_dtype(given))
    for name, x in zip(RankMeasures._fields, measures, strict=True):
        if jnp.ndim(a) == 0 or jnp.shape(x) != a.shape[:1]:
            raise ValueError(
                f"measures.{name} has shape {jnp.shape(x)}, but advantages of shape {a.shape} "
                f"need {a.shape[:1]}"
            )

    def deviation(x: Array, m: Array) -> Array:
        m = jnp.asarray(m, a.dtype)
        return jnp.clip((jnp.asarray(x, a.dtype) - m) / (jnp.abs(m) + eps), -limit, limit)

    rank, velocity, acceleration = map(deviation, measures, means)
    w = jax.nn.sigmoid(gain * acceleration)
    u = performance * (w * jnp.tanh(rank) + (1 - w) * jnp.tanh(velocity))
    u = jnp.reshape(jnp.maximum(u, 0), (-1, *(1 for _ in a.shape[1:])))
    return (a + jnp.minimum(u, jnp.abs(a) / 2)).astype(given.dtype)
