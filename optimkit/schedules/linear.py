"""Linear decay to a budget, and a factor on any schedule."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.numerics import as_float, check_range
from optimkit.protocols import Array, Method, ScalarOrSchedule
from optimkit.schedules.phases import after_warmup, check_steps, constant
from optimkit.schedules.shapes import transition


def linear_decay_schedule(
    init_value: Any, transition_steps: Any, *, warmup_steps: Any = 0, end_value: Any = 0.0
) -> optax.Schedule:
    r"""Falls in a straight line to the end value, over whatever budget there is.

    With c the count, W the warm-up and T the budget,

    .. math:: \eta = \eta_0\, c / W \;\; (c < W), \qquad
        \eta = m + (\eta_0 - m)\left(1 - \operatorname{clip}\frac{c-W}{T-W}\right)

    Args:
      init_value: rate at the end of the warm-up.
      transition_steps: T, the whole budget, *with* the warm-up. 0 gives the end value at once;
        ``optax.linear_schedule`` would stay at the initial value.
      warmup_steps: W, ramp from 0. When it is longer than the budget, only the ramp is seen.
      end_value: m, held from count T on.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if a value or length is negative.

    The last of T updates has the rate :math:`\eta_0/(T-W)`, not 0 (for m = 0).

    >>> rate = linear_decay_schedule(1.0, 6, warmup_steps=2)
    >>> [float(rate(count)) for count in range(8)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Reference: Li et al., "Budgeted Training: Rethinking Deep Neural Network Training Under Resource
    Constraints", ICLR 2020, arXiv 1905.04753. Agrees with transformers'
    ``get_linear_schedule_with_warmup`` to rounding (golden
    ``linear_decay__transformers_linear_warmup``).
    """
    check_steps(transition_steps=transition_steps, warmup_steps=warmup_steps)
    check_range(init_value=init_value, end_value=end_value, ge=0)
    return after_warmup(
        transition(init_value, end_value, transition_steps - warmup_steps),
        warmup_steps=warmup_steps,
        start_value=0.0,
        peak_value=init_value,
    )


def scale_schedule(schedule_or_value: ScalarOrSchedule, factor: Any) -> optax.Schedule:
    """Multiplies a schedule, or a constant rate, by a factor.

    The paper's use: in supervised fine-tuning, a rate below the one that gives the best loss keeps
    the model closer to where it started, and a later preference optimisation ends higher. Its
    reduced rates could not be established, so the factor has no default.

    Args:
      schedule_or_value: a schedule over the 0-based count, or a number.
      factor: >= 0; below 1 for the reduction in question. 0 freezes.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if the factor, or a rate given as a number, is negative.

    >>> rate = scale_schedule(linear_decay_schedule(1.0, 4), 0.5)
    >>> [float(rate(count)) for count in range(5)]
    [0.5, 0.375, 0.25, 0.125, 0.0]

    Reference: Wang et al., "Implicit Reward as the Bridge: A Unified View of SFT and DPO
    Connections", 2025, arXiv 2507.00018. No code was published.
    """
    check_range(schedule_or_value=schedule_or_value, factor=factor, ge=0)
    schedule = schedule_or_value if callable(schedule_or_value) else constant(schedule_or_value)

    def scaled(count: Any) -> Array:
        return as_float(factor) * as_float(schedule(count))

    return scaled


RECORDS = (
    Method(
        factory=linear_decay_schedule,
        kind="schedule",
        summary="linear decay over the whole budget, after a linear warm-up",
        example={"init_value": 1e-3, "transition_steps": 90, "warmup_steps": 10},
        traced=("init_value", "transition_steps", "warmup_steps", "end_value"),
        paper='Li et al., "Budgeted Training: Rethinking Deep Neural Network Training Under '
        'Resource Constraints", ICLR 2020, arXiv 1905.04753',
        reference="transformers:optimization.py:get_linear_schedule_with_warmup",
        licence="Apache-2.0",
    ),
    Method(
        factory=scale_schedule,
        kind="schedule",
        summary="a factor on any schedule or rate",
        example={"schedule_or_value": 1e-3, "factor": 0.1},
        traced=("schedule_or_value", "factor"),
        paper='Wang et al., "Implicit Reward as the Bridge: A Unified View of SFT and DPO '
        'Connections", 2025, arXiv 2507.00018',
    ),
)
