"""UBA: one curve with one shape parameter, from budgeted-iteration theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optax

from optimkit.numerics import as_float, check_range
from optimkit.protocols import Method
from optimkit.schedules.phases import after_warmup, check_steps, consecutive, each, per_phase
from optimkit.schedules.shapes import Profile, between, half_cosine, rational_map, transition


def _uba_profile(phi: Any) -> Profile:
    return lambda x: rational_map(half_cosine(x), 1 - as_float(phi) / 2)


def uba_schedule(
    init_value: Any,
    transition_steps: Any,
    *,
    phi: Any,
    end_value: Any = 0.0,
    warmup_steps: Any = 0,
    warmup_init_value: Any = 0.0,
) -> optax.Schedule:
    r"""A cosine bent by one number, which stands for the condition number of the problem.

    With c the count, W the warm-up, T the length after it,
    :math:`p = \operatorname{clip}((c-W)/T, 0, 1)` and :math:`C = 1 + \cos \pi p`,

    .. math:: \eta = m + (\eta_0 - m)\,\frac{2 C}{2\phi + (2-\phi)\, C}

    Args:
      init_value: rate at the end of the warm-up.
      transition_steps: T, counted after the warm-up. <= 0 keeps the initial value for good.
      phi: > 0. 2 is the cosine; below 2 the rate stays high and drops late, above 2 it falls early.
        No default: the paper's recommendations could not be established.
      end_value: m, held from count W + T on.
      warmup_steps: W, >= 0.
      warmup_init_value: rate at count 0 of the warm-up.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range.

    Provisional: no code was published and the text of the paper's equations could not be read; the
    form is supported by its limits alone. It is REX's rational map, with shape 1 - phi/2, of the
    cosine.

    >>> rate = uba_schedule(1.0, 4, phi=1.0)
    >>> [round(float(rate(count)), 3) for count in range(6)]
    [1.0, 0.921, 0.667, 0.255, 0.0, 0.0]

    Reference: Tang et al., "Stepsize anything: A unified learning rate schedule for
    budgeted-iteration training", NeurIPS 2025, arXiv 2505.24452. The goldens ``uba__*`` test the
    formula above, not the paper.
    """
    check_range(phi=phi, gt=0)
    check_range(
        init_value=init_value, end_value=end_value, warmup_init_value=warmup_init_value, ge=0
    )
    check_steps(warmup_steps=warmup_steps)
    check_range(transition_steps=transition_steps, gt=-math.inf)
    return after_warmup(
        transition(
            init_value, end_value, transition_steps, between(_uba_profile(phi)), if_empty=0.0
        ),
        warmup_steps=warmup_steps,
        start_value=warmup_init_value,
        peak_value=init_value,
    )


def uba_cycles(
    init_values: Sequence[Any] | Any,
    transition_steps_per_phase: Sequence[Any] | Any,
    *,
    phi: Any,
    end_values: Sequence[Any] | Any,
) -> optax.Schedule:
    """UBA over several phases, each with its own length, start and end.

    Args:
      init_values: rate at the start of each phase.
      transition_steps_per_phase: lengths of the phases, >= 0. A phase without length is left out.
      phi: shape of every phase, > 0, as in ``uba_schedule``.
      end_values: rate that each phase tends to; the last is held after the end.

    A single number in place of a sequence holds for all phases.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if sequences differ in length, or a value is out of range.

    Provisional, as ``uba_schedule`` is.

    >>> rate = uba_cycles([1.0, 0.5], 2, phi=2.0, end_values=0.1)
    >>> [round(float(rate(count)), 3) for count in range(6)]
    [1.0, 0.55, 0.5, 0.3, 0.1, 0.1]

    Reference: Tang et al., NeurIPS 2025, arXiv 2505.24452.
    """
    check_range(phi=phi, gt=0)
    phases = per_phase(
        init_values=init_values,
        transition_steps_per_phase=transition_steps_per_phase,
        end_values=end_values,
    )
    for name, values in phases.items():
        check_range(**each(name, values), ge=0)

    def phase(start: Any, length: Any, end: Any) -> optax.Schedule:
        return transition(start, end, length, between(_uba_profile(phi)))

    pieces: list[Any] = [phase(*values) for values in zip(*phases.values(), strict=True)]
    return consecutive(
        phases["transition_steps_per_phase"], pieces, end_value=phases["end_values"][-1]
    )


_PAPER = (
    'Tang et al., "Stepsize anything: A unified learning rate schedule for budgeted-iteration '
    'training", NeurIPS 2025, arXiv 2505.24452'
)

RECORDS = (
    Method(
        factory=uba_schedule,
        kind="schedule",
        summary="a cosine bent by one shape parameter",
        example={"init_value": 1e-3, "transition_steps": 80, "phi": 1.0, "warmup_steps": 10},
        traced=(
            "init_value",
            "transition_steps",
            "phi",
            "end_value",
            "warmup_steps",
            "warmup_init_value",
        ),
        status="provisional",
        paper=_PAPER,
    ),
    Method(
        factory=uba_cycles,
        kind="schedule",
        summary="UBA over several phases",
        example={
            "init_values": (1e-3, 5e-4),
            "transition_steps_per_phase": (60, 30),
            "phi": 5.0,
            "end_values": 1e-4,
        },
        traced=("init_values", "transition_steps_per_phase", "phi", "end_values"),
        status="provisional",
        paper=_PAPER,
    ),
)
