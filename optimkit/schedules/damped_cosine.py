"""A cosine that swings several times between two envelopes that meet at the end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_count, check_range
from optimkit.protocols import Array, Method
from optimkit.schedules.phases import after_warmup, check_steps
from optimkit.schedules.shapes import half_cosine, transition

FEW_COUNTS = 4
"""Counts in a half cycle below which the curve is not what it looks like on paper."""


def damped_cosine_schedule(
    peak_value: Any,
    end_value: Any,
    transition_steps: Any,
    *,
    num_cycles: Any,
    damping: Any,
    warmup_steps: Any = 0,
    warmup_init_value: Any = 0.0,
    peak_fn: Callable[[Any], Any] | None = None,
    valley_fn: Callable[[Any], Any] | None = None,
) -> optax.Schedule:
    r"""Several mild re-warmings in one run, each smaller than the one before.

    With c the count, W the warm-up, T the length after it,
    :math:`p = \operatorname{clip}((c-W)/T, 0, 1)` and N cycles,

    .. math:: \eta = \frac{S(p)+V(p)}{2} + \frac{S(p)-V(p)}{2} \cos(\pi (2N-1) p), \qquad
        S(p) = m + (P-m)(1-p)^{\gamma}, \quad V(p) = m

    Args:
      peak_value: P.
      end_value: m.
      transition_steps: T, counted after the warm-up. <= 0 keeps the peak for good.
      num_cycles: N, an integer >= 1: the curve has N peaks and N valleys and ends in a valley. 1 is
        a half cosine under a falling envelope.
      damping: gamma, >= 0; 0 is undamped.
      warmup_steps: W, >= 0.
      warmup_init_value: rate at count 0 of the warm-up.
      peak_fn: S as a function of p; ``peak_value`` and ``damping`` play no part then.
      valley_fn: V as a function of p; it replaces m in V alone.

    Returns:
      A schedule over the 0-based count, which holds V(1) after the end. No state.

    Raises:
      ValueError: if an argument is out of range, or an envelope is no function.

    Warns (``UserWarning``) where more than one cycle leaves fewer than 4 counts to a half cycle.

    Provisional: the outer formula is the paper's, as a review reports it. Its envelopes could not
    be read, nor its N and gamma; those above are a guess, and ``peak_fn`` and ``valley_fn`` let the
    right ones be dropped in. The paper shows no ablation.

    >>> rate = damped_cosine_schedule(5.0, 1.0, 12, num_cycles=2, damping=1.0)
    >>> [round(float(rate(count)), 3) for count in range(0, 16, 2)]
    [5.0, 2.667, 1.0, 2.0, 2.333, 1.333, 1.0, 1.0]

    Reference: Zhao et al., "Chinese ModernBERT with Whole-Word Masking", 2025, arXiv 2510.12285. No
    training code was published; the golden ``damped_cosine__inferred_envelope`` tests the formula
    above.
    """
    check_range(num_cycles=num_cycles, ge=1)
    if not isinstance(num_cycles, jax.Array):
        check_count(num_cycles=num_cycles, least=1)
        _warn_of_few_counts(transition_steps, num_cycles)
    check_range(peak_value=peak_value, end_value=end_value, damping=damping, ge=0)
    check_range(warmup_init_value=warmup_init_value, ge=0)
    check_steps(warmup_steps=warmup_steps)
    check_range(transition_steps=transition_steps, gt=-math.inf)
    for name, envelope in (("peak_fn", peak_fn), ("valley_fn", valley_fn)):
        if not (envelope is None or callable(envelope)):
            raise ValueError(f"{name} must be a function of the progress, got {envelope!r}")

    def envelopes(x: Array, peak: Array, end: Array) -> tuple[Array, Array]:
        falling = end + (peak - end) * jnp.power(1 - x, as_float(damping))
        return (
            falling if peak_fn is None else as_float(peak_fn(x)),
            end if valley_fn is None else as_float(valley_fn(x)),
        )

    def swing(x: Array, peak: Array, end: Array) -> Array:
        upper, lower = envelopes(x, peak, end)
        return lower + (upper - lower) * half_cosine((2 * as_float(num_cycles) - 1) * x)

    swings = transition(peak_value, end_value, transition_steps, swing, if_empty=0.0)

    def schedule(count: Any) -> Array:
        return after_warmup(
            swings,
            warmup_steps=warmup_steps,
            start_value=warmup_init_value,
            peak_value=swings(0),
        )(count)

    return schedule


def _warn_of_few_counts(transition_steps: Any, num_cycles: int) -> None:
    if not isinstance(transition_steps, (int, float)) or num_cycles == 1:
        return
    if 0 < transition_steps < FEW_COUNTS * (2 * num_cycles - 1):
        warnings.warn(
            f"transition_steps={transition_steps} leaves fewer than {FEW_COUNTS} counts to each of "
            f"the {2 * num_cycles - 1} half cycles of num_cycles={num_cycles}",
            stacklevel=3,
        )


RECORD = Method(
    factory=damped_cosine_schedule,
    kind="schedule",
    summary="a cosine that swings between two envelopes",
    example={
        "peak_value": 1e-3,
        "end_value": 1e-5,
        "transition_steps": 80,
        "num_cycles": 3,
        "damping": 1.5,
        "warmup_steps": 10,
    },
    traced=(
        "peak_value",
        "end_value",
        "transition_steps",
        "num_cycles",
        "damping",
        "warmup_steps",
        "warmup_init_value",
    ),
    static=("peak_fn", "valley_fn"),
    status="provisional",
    paper='Zhao et al., "Chinese ModernBERT with Whole-Word Masking", 2025, arXiv 2510.12285',
)
