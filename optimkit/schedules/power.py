"""The power scheduler: the rate follows a power of the tokens seen, whatever the budget."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_range
from optimkit.protocols import Array, Method
from optimkit.schedules.phases import after_warmup, check_steps, constant, join
from optimkit.schedules.shapes import transition


def power_schedule(
    peak_value: Any,
    *,
    batch_size: Any,
    tokens_per_step: Any,
    a: Any = 4.6,
    b: Any = -0.51,
    warmup_steps: Any = 0,
    total_steps: Any = None,
    cooldown_steps: Any = 0,
    end_value: Any = 0.0,
) -> optax.Schedule:
    r"""Falls as a power of the tokens seen: no new tuning for another budget or batch size.

    With c the count, W the warm-up, N the whole run, D its cool-down and n = ``tokens_per_step`` c,

    .. math:: s(c) = \min(P,\; \beta a\, n^{b}), \qquad
        \eta = s(W)\, c/W \;\; (c < W), \quad \eta = s(c) \;\; (W \le c < N-D)

    and from count N - D on ``exponential_cooldown`` from the rate reached there.

    Args:
      peak_value: P, upper bound of the rate. The paper uses 0.02, with muP.
      batch_size: beta, in sequences, > 0.
      tokens_per_step: tokens in one update, batch size times sequence length, > 0.
      a: > 0; 4.6 is the paper's.
      b: < 0; -0.51 is the paper's.
      warmup_steps: W, >= 0. The ramp aims at the power law's rate at W, not at P.
      total_steps: N, the run with its cool-down. None: there is no end.
      cooldown_steps: D, up to N; 10 % of the run is usual. 0 jumps to the end value at count N.
      end_value: rate at count N, and after it.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range, or a cool-down has no ``total_steps`` or is longer
        than it.

    The plateau at P lasts :math:`(P/(\beta a))^{1/b}` tokens. IBM's ``a`` has the batch size
    multiplied in. Its scheduler has no cool-down of its own: that is a second run. Count 0 without
    warm-up, where the power law is infinite, has rate P.

    >>> rate = power_schedule(1.0, batch_size=4, tokens_per_step=1, a=0.5, b=-0.5, warmup_steps=2)
    >>> [round(float(rate(count)), 3) for count in (0, 1, 2, 4, 9, 16)]
    [0.0, 0.5, 1.0, 1.0, 0.667, 0.5]

    Reference: Shen et al., "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate
    Scheduler", 2024, arXiv 2408.13359. Agrees with IBM's dolomite-engine and levanter to rounding
    (goldens ``power__*``).
    """
    check_range(peak_value=peak_value, end_value=end_value, ge=0)
    check_range(batch_size=batch_size, tokens_per_step=tokens_per_step, a=a, gt=0)
    check_range(b=b, lt=0)
    check_steps(warmup_steps=warmup_steps, total_steps=total_steps, cooldown_steps=cooldown_steps)
    _check_cooldown(total_steps, cooldown_steps)

    def power(count: Any) -> Array:
        count = as_float(count)
        # A float product: counts times tokens leave int32 after 2**31 tokens.
        tokens = jnp.where(count > 0, count * as_float(tokens_per_step), 1)
        law = as_float(batch_size) * as_float(a) * jnp.power(tokens, as_float(b))
        peak = as_float(peak_value)
        return jnp.where(count > 0, jnp.minimum(peak, law), peak)

    def running(count: Any) -> Array:
        return after_warmup(
            lambda local: power(local + as_float(warmup_steps)),
            warmup_steps=warmup_steps,
            start_value=0.0,
            peak_value=power(warmup_steps),
        )(count)

    if total_steps is None:
        return running
    start = total_steps - cooldown_steps

    def cooling(count: Any) -> Array:
        return _cooldown(running(start), end_value, cooldown_steps)(count)

    return join((0, running), (start, cooling))


def _check_cooldown(total_steps: Any, cooldown_steps: Any) -> None:
    if total_steps is None:
        if not (isinstance(cooldown_steps, (int, float)) and cooldown_steps == 0):
            raise ValueError(
                f"total_steps must be given with cooldown_steps={cooldown_steps}, got None"
            )
    elif isinstance(total_steps, (int, float)):
        check_range(cooldown_steps=cooldown_steps, ge=0, le=total_steps)


def _cooldown(init_value: Any, end_value: Any, transition_steps: Any) -> optax.Schedule:
    return transition(init_value, end_value, transition_steps, "shifted_exponential")


def exponential_cooldown(
    init_value: Any, *, hold_steps: Any, transition_steps: Any, end_value: Any
) -> optax.Schedule:
    r"""Holds a rate, then lets it fall exponentially, shifted so that it ends at the end value.

    With H the steps held, T the length of the fall and
    :math:`x = \operatorname{clip}((c-H)/T, 0, 1)`,

    .. math:: \eta = m + (\eta_0 - m)\,\frac{e^{1-x} - 1}{e - 1}

    Args:
      init_value: rate until count H.
      hold_steps: H, >= 0.
      transition_steps: T, >= 0. 0 jumps.
      end_value: m, reached at count H + T and held; it may be 0.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if a value or length is negative.

    IBM's class does not stop at H + T: it goes on falling, below 0 for m < P/e. We hold m. The same
    curve is ``wsd_schedule(decay="shifted_exponential")``.

    >>> rate = exponential_cooldown(1.0, hold_steps=1, transition_steps=2, end_value=0.0)
    >>> [round(float(rate(count)), 3) for count in range(5)]
    [1.0, 1.0, 0.378, 0.0, 0.0]

    Reference: Shen et al., 2024, arXiv 2408.13359. Agrees with IBM's ``ExponentialScheduler`` to
    rounding (golden ``power__ibm_exponential_cooldown``).
    """
    check_range(init_value=init_value, end_value=end_value, ge=0)
    check_steps(hold_steps=hold_steps, transition_steps=transition_steps)
    fall = _cooldown(init_value, end_value, transition_steps)
    return join((0, constant(init_value)), (hold_steps, fall))


_PAPER = (
    'Shen et al., "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate '
    'Scheduler", 2024, arXiv 2408.13359'
)
_REFERENCE = (
    "IBM/dolomite-engine@d0ee186128e8b8dfff7c1f90390398fdabc75be7:"
    "lm_engine/optimization/scheduler.py:"
)

RECORDS = (
    Method(
        factory=power_schedule,
        kind="schedule",
        summary="a power of the tokens seen, whatever the budget and batch size",
        example={
            "peak_value": 1e-2,
            "batch_size": 1,
            "tokens_per_step": 4096,
            "warmup_steps": 5,
            "total_steps": 90,
            "cooldown_steps": 20,
        },
        traced=(
            "peak_value",
            "batch_size",
            "tokens_per_step",
            "a",
            "b",
            "warmup_steps",
            "total_steps",
            "cooldown_steps",
            "end_value",
        ),
        paper=_PAPER,
        reference=_REFERENCE + "PowerScheduler",
        licence="Apache-2.0",
    ),
    Method(
        factory=exponential_cooldown,
        kind="schedule",
        summary="hold, then a shifted exponential that ends at the end value",
        example={
            "init_value": 1e-3,
            "hold_steps": 60,
            "transition_steps": 30,
            "end_value": 1e-4,
        },
        traced=("init_value", "hold_steps", "transition_steps", "end_value"),
        paper=_PAPER,
        reference=_REFERENCE + "ExponentialScheduler",
        licence="Apache-2.0",
    ),
)
