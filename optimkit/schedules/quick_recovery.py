"""A cosine that starts from almost nothing after every restart, and is back within a few steps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_range, safe_div
from optimkit.protocols import Array, Method
from optimkit.schedules.phases import check_steps
from optimkit.schedules.shapes import half_cosine, progress


def cosine_quick_recovery_schedule(
    peak_value: Any,
    total_steps: Any,
    warmup_steps: Any,
    restart_interval: Any,
    *,
    recovery_steps: Any = 10,
    min_ratio: Any = 0.1,
) -> optax.Schedule:
    r"""A warm-up and a cosine, with a short ramp wherever the moments of the optimizer are new.

    Adam's first steps after a reset are long and in poor directions; a few at a low rate let its
    moments fill. With d the counts since the last multiple of D and R the length of a recovery,

    .. math::

        h(s) &= s/W \;\; (s < W), \qquad
        h(s) = \rho + (1-\rho)\,\frac{1+\cos(\pi (s-W)/(T-W))}{2} \\
        \eta(s) &= P\, h(s - d + R) \Big(0.001 + 0.999 \min\big(1, \tfrac{d}{R-1}\big)\Big)
        \;\; (d < R), \qquad \eta(s) = P\, h(s)

    Args:
      peak_value: P, >= 0.
      total_steps: T, count at which the cosine is at its lowest.
      warmup_steps: W, length of the first ramp, from 0.
      restart_interval: D, the counts between two resets; 0: none, and no recovery.
      recovery_steps: R, the authors' 10. 1 or 0: no ramp.
      min_ratio: rho, the lowest rate as a share of P, in [0, 1]; the authors' 0.1.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range.

    As in the authors' code, a recovery is also made at count 0, towards h(R), so that the warm-up
    begins there; and beyond T the cosine rises again. Their code replaces an interval that does not
    divide T by T; this one does not. Their loop asks a schedule made anew after update k for count
    k + 1, and goes on from there: ``lambda c: rate(jnp.where(c < D, c, c + 1))`` are its rates,
    without the lowest of each ramp.

    >>> rate = cosine_quick_recovery_schedule(1.0, 8, 0, 4, recovery_steps=2)
    >>> [round(float(rate(count)), 4) for count in range(8)]
    [0.0009, 0.8682, 0.8682, 0.7222, 0.0002, 0.2318, 0.2318, 0.1343]

    Reference: Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent
    Algorithmic Advances and Benchmarking", 2025, arXiv 2505.22922. Agrees with the authors' code to
    rounding (golden ``weight_refactorization__schedule``).
    """
    check_range(peak_value=peak_value, ge=0)
    check_range(min_ratio=min_ratio, ge=0, le=1)
    check_steps(
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        restart_interval=restart_interval,
        recovery_steps=recovery_steps,
    )

    def uninterrupted(s: Array) -> Array:
        warmup = as_float(warmup_steps)
        length = jnp.maximum(as_float(total_steps) - warmup, 1)
        # Whole turns are taken off: the cosine of a large number loses digits.
        turn = jnp.mod(jnp.maximum(s - warmup, 0), 2 * length) / length
        low = as_float(min_ratio)
        return jnp.where(s < warmup, progress(s, warmup), low + (1 - low) * half_cosine(turn))

    def schedule(count: Any) -> Array:
        s, recovery = jnp.maximum(as_float(count), 0), as_float(recovery_steps)
        every = as_float(restart_interval)
        since = jnp.mod(s, jnp.maximum(every, 1))
        risen = jnp.minimum(safe_div(since, recovery - 1, otherwise=1.0), 1)
        recovering = uninterrupted(s - since + recovery) * (0.001 + 0.999 * risen)
        within = (every > 0) & (since < recovery)
        return as_float(peak_value) * jnp.where(within, recovering, uninterrupted(s))

    return schedule


RECORD = Method(
    factory=cosine_quick_recovery_schedule,
    kind="schedule",
    summary="a cosine with a short ramp after every reset of the optimizer",
    example={
        "peak_value": 1e-3,
        "total_steps": 100,
        "warmup_steps": 5,
        "restart_interval": 40,
        "recovery_steps": 10,
    },
    traced=(
        "peak_value",
        "total_steps",
        "warmup_steps",
        "restart_interval",
        "recovery_steps",
        "min_ratio",
    ),
    paper='Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent '
    'Algorithmic Advances and Benchmarking", 2025, arXiv 2505.22922',
    reference="OptimAI-Lab/Memory_Efficient_Pretraining@9f803d4c6af7e5d312e97de46d7008ec55d990cb:"
    "para_eff_pt/peft_pretraining/training_utils.py:_get_cosine_schedule_with_quick_recovery_lambda",
    licence="",
)
