"""Infinite schedules: cool down to a constant that lasts, and anneal when a model is wanted."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.numerics import as_float, check_range
from optimkit.protocols import Method
from optimkit.schedules.phases import after_warmup, check_steps, join
from optimkit.schedules.shapes import (
    PROFILES,
    Profile,
    between,
    check_ends,
    inverse_sqrt,
    transition,
)


def _anneal(constant_value: Any, end_value: Any, anneal_steps: Any) -> optax.Schedule:
    check_ends("exponential", constant_value=constant_value, end_value=end_value)
    check_steps(anneal_steps=anneal_steps)
    return transition(constant_value, end_value, anneal_steps, "exponential")


def _infinite(profile: Profile, rates: tuple[Any, ...], lengths: tuple[Any, ...]) -> optax.Schedule:
    """Warm-up, cool-down along a profile, constant, and perhaps an exponential annealing."""
    init_value, peak_value, constant_value, end_value = rates
    warmup_steps, cooldown_steps, constant_steps, anneal_steps = lengths
    check_range(peak_value=peak_value, init_value=init_value, ge=0)
    check_steps(
        warmup_steps=warmup_steps, cooldown_steps=cooldown_steps, constant_steps=constant_steps
    )
    annealing = _anneal(constant_value, end_value, anneal_steps)
    phases = [(0, transition(peak_value, constant_value, cooldown_steps, between(profile)))]
    if constant_steps is not None:
        if anneal_steps is None:
            raise ValueError("anneal_steps must be >= 0 where constant_steps is given, got None")
        phases.append((cooldown_steps + constant_steps, annealing))
    return after_warmup(
        join(*phases), warmup_steps=warmup_steps, start_value=init_value, peak_value=peak_value
    )


def infinite_cosine_schedule(
    peak_value: Any,
    constant_value: Any,
    end_value: Any,
    *,
    warmup_steps: Any,
    cooldown_steps: Any,
    constant_steps: Any = None,
    anneal_steps: Any = None,
    init_value: Any = 0.0,
) -> optax.Schedule:
    r"""Warm-up, cosine down to a constant, and an exponential end when a model is wanted.

    A stream of data sets needs no re-warming, which makes a model forget: the constant lasts over
    all of them. With P, K, m the three rates and W, N, S, A the lengths in the order of the
    arguments, c the count,

    ============================== ===================================================
    :math:`c < W`                  the initial value to P, in a straight line
    :math:`x = (c-W)/N` in [0, 1]  :math:`K + (P-K)(1+\cos \pi x)/2`
    until W + N + S                K
    :math:`y = (c-W-N-S)/A`        :math:`K (m/K)^y`, then m
    ============================== ===================================================

    Args:
      peak_value: P.
      constant_value: K, > 0. The papers' lie between a quarter and a half of P (not re-read).
      end_value: m, > 0, reached by the annealing.
      warmup_steps: W, >= 0.
      cooldown_steps: N, >= 0. 0 jumps from P to K.
      constant_steps: S. None, the default, is a constant without end; ``anneal_from`` then makes
        the end from any checkpoint.
      anneal_steps: A, >= 0; needed where ``constant_steps`` is given. 0 jumps.
      init_value: rate at count 0.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range or missing.

    Provisional: the authors' patch to GPT-NeoX could not be read. This follows two public
    implementations, and reaches m exactly at the end of the annealing; one reading of the second
    paper has another exponent, which would not. Nothing happens at a task's boundary.

    >>> rate = infinite_cosine_schedule(8.0, 4.0, 1.0, warmup_steps=2, cooldown_steps=2,
    ...                                 constant_steps=2, anneal_steps=2)
    >>> [round(float(rate(count)), 3) for count in range(10)]
    [0.0, 4.0, 8.0, 6.0, 4.0, 4.0, 4.0, 2.0, 1.0, 1.0]

    Reference: Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large
    Language Models", 2024, arXiv 2403.08763; Singh et al., "Beyond Cosine Decay: On the
    effectiveness of Infinite Learning Rate Schedule for Continual Pre-training", 2025, arXiv
    2503.02844. Goldens ``infinite__cosine_*``, to rounding.
    """
    return _infinite(
        PROFILES["cosine"],
        (init_value, peak_value, constant_value, end_value),
        (warmup_steps, cooldown_steps, constant_steps, anneal_steps),
    )


def infinite_rsqrt_schedule(
    peak_value: Any,
    constant_value: Any,
    end_value: Any,
    *,
    warmup_steps: Any,
    cooldown_steps: Any,
    constant_steps: Any = None,
    anneal_steps: Any = None,
    init_value: Any = 0.0,
    alpha: Any = 10.0,
) -> optax.Schedule:
    r"""``infinite_cosine_schedule`` with a cool-down along an inverse square root.

    .. math:: \eta = P + (K-P)\,\frac{h(x)}{h(1)}, \qquad h(x) = \frac{1}{\sqrt{1+\alpha x}} - 1

    Args:
      peak_value: P.
      constant_value: K, > 0.
      end_value: m, > 0, reached by the annealing.
      warmup_steps: >= 0.
      cooldown_steps: >= 0.
      constant_steps: None, the default, is a constant without end.
      anneal_steps: >= 0; needed where ``constant_steps`` is given.
      init_value: rate at count 0.
      alpha: >= 0, how early the rate falls. 10 is the public code's; 0 is a straight line.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range or missing.

    Provisional, as ``infinite_cosine_schedule`` is.

    >>> rate = infinite_rsqrt_schedule(8.0, 4.0, 1.0, warmup_steps=0, cooldown_steps=8, alpha=8.0)
    >>> [round(float(rate(count)), 3) for count in (0, 3, 8, 100)]
    [8.0, 5.0, 4.0, 4.0]

    Reference: Ibrahim et al., 2024, arXiv 2403.08763. Golden ``infinite__rsqrt_4phase``, to
    rounding.
    """
    check_range(alpha=alpha, ge=0)
    return _infinite(
        lambda x: inverse_sqrt(x, as_float(alpha)),
        (init_value, peak_value, constant_value, end_value),
        (warmup_steps, cooldown_steps, constant_steps, anneal_steps),
    )


def infinite_linear_schedule(
    peak_value: Any,
    constant_value: Any,
    end_value: Any,
    *,
    warmup_steps: Any,
    cooldown_steps: Any,
    constant_steps: Any = None,
    anneal_steps: Any = None,
    init_value: Any = 0.0,
) -> optax.Schedule:
    r"""``infinite_cosine_schedule`` with a cool-down along a straight line.

    Args:
      peak_value: rate after the warm-up.
      constant_value: rate after the cool-down, > 0.
      end_value: > 0, reached by the annealing.
      warmup_steps: >= 0.
      cooldown_steps: >= 0.
      constant_steps: None, the default, is a constant without end.
      anneal_steps: >= 0; needed where ``constant_steps`` is given.
      init_value: rate at count 0.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range or missing.

    Provisional, as ``infinite_cosine_schedule`` is; the third style of one public implementation.

    >>> rate = infinite_linear_schedule(8.0, 4.0, 1.0, warmup_steps=0, cooldown_steps=4)
    >>> [round(float(rate(count)), 3) for count in range(6)]
    [8.0, 7.0, 6.0, 5.0, 4.0, 4.0]

    Reference: Ibrahim et al., 2024, arXiv 2403.08763. Golden ``infinite__linear_4phase``, to
    rounding.
    """
    return _infinite(
        PROFILES["linear"],
        (init_value, peak_value, constant_value, end_value),
        (warmup_steps, cooldown_steps, constant_steps, anneal_steps),
    )


def anneal_from(
    constant_value: Any, end_value: Any, anneal_steps: Any, *, start_step: Any
) -> optax.Schedule:
    r"""The annealing of an infinite schedule, taken from any checkpoint of its constant phase.

    .. math:: \eta = K (m/K)^y, \qquad y = \operatorname{clip}((c - c_0)/A, 0, 1)

    Args:
      constant_value: K, the rate that the checkpoint was trained with, > 0.
      end_value: m, > 0.
      anneal_steps: A, >= 0. 0 jumps.
      start_step: :math:`c_0`, how many updates the restored checkpoint had, >= 0.

    Returns:
      A schedule over the run's own count, the one that the restored optimizer state holds; not one
      that starts again at 0. No state.

    Raises:
      ValueError: if an argument is out of range.

    >>> rate = anneal_from(4.0, 1.0, 2, start_step=100)
    >>> [round(float(rate(count)), 3) for count in (0, 100, 101, 102, 500)]
    [4.0, 4.0, 2.0, 1.0, 1.0]

    Reference: Singh et al., 2025, arXiv 2503.02844.
    """
    check_steps(start_step=start_step)
    return join((start_step, _anneal(constant_value, end_value, anneal_steps)))


_FIRST = (
    'Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language '
    'Models", 2024, arXiv 2403.08763'
)
_SECOND = (
    'Singh et al., "Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule '
    'for Continual Pre-training", 2025, arXiv 2503.02844'
)
_EXAMPLE = {
    "peak_value": 1e-3,
    "constant_value": 2e-4,
    "end_value": 1e-5,
    "warmup_steps": 10,
    "cooldown_steps": 20,
    "constant_steps": 30,
    "anneal_steps": 29,
}
_TRACED = (*_EXAMPLE, "init_value")

RECORDS = (
    Method(
        factory=infinite_cosine_schedule,
        kind="schedule",
        summary="cosine down to a constant without end, exponential annealing on demand",
        example=_EXAMPLE,
        traced=_TRACED,
        status="provisional",
        paper=f"{_FIRST}; {_SECOND}",
        reference="jdinalt/forgather@f92f8b8b0940451edcd5642f516514e96aa2dd7e:"
        "src/forgather/ml/optim/infinite_lr_scheduler.py:InfiniteLRScheduler",
        licence="MIT",
    ),
    Method(
        factory=infinite_rsqrt_schedule,
        kind="schedule",
        summary="inverse square root down to a constant without end, annealing on demand",
        example=_EXAMPLE,
        traced=(*_TRACED, "alpha"),
        status="provisional",
        paper=_FIRST,
    ),
    Method(
        factory=infinite_linear_schedule,
        kind="schedule",
        summary="straight line down to a constant without end, annealing on demand",
        example=_EXAMPLE,
        traced=_TRACED,
        status="provisional",
        paper=_FIRST,
    ),
    Method(
        factory=anneal_from,
        kind="schedule",
        summary="exponential annealing from any checkpoint of a constant phase",
        example={
            "constant_value": 2e-4,
            "end_value": 1e-5,
            "anneal_steps": 30,
            "start_step": 60,
        },
        traced=("constant_value", "end_value", "anneal_steps", "start_step"),
        status="provisional",
        paper=_SECOND,
    ),
)
