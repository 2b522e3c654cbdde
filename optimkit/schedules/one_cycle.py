"""The one-cycle policy: up to a large peak, then down far below the start."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_choice, check_range
from optimkit.protocols import Array, Method
from optimkit.schedules.phases import check_steps
from optimkit.schedules.shapes import PROFILES, between, progress

ANNEALS = ("cosine", "linear")


def one_cycle_schedule(
    peak_value: Any,
    transition_steps: Any,
    *,
    pct_start: Any = 0.3,
    div_factor: Any = 25.0,
    final_div_factor: Any = 1e4,
    anneal: Literal["cosine", "linear"] = "cosine",
    three_phase: bool = False,
) -> optax.Schedule:
    r"""Rises from a fraction of the peak to the peak, then falls to almost nothing.

    With P the peak, :math:`i = P/` ``div_factor``, :math:`e = i/` ``final_div_factor`` and T the
    length, the rate goes from i at count 0 to P at count :math:`u = f T - 1` and to e at count
    T - 1, then holds e. With three phases it first goes back to i, as fast as it rose, until count
    :math:`2u`, and from there to e.

    Args:
      peak_value: P.
      transition_steps: T, >= 0.
      pct_start: f, share of the run that rises, in [0, 1]; up to 0.5 with three phases.
      div_factor: peak over initial rate, > 0. 25 is torch's default.
      final_div_factor: initial over final rate, > 0. 1e4 is torch's default.
      anneal: ``cosine`` or ``linear`` interpolation.
      three_phase: the shape of the original paper; torch's default is two phases.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range.

    The counts are torch's ``OneCycleLR``: ``optax.cosine_onecycle_schedule`` has the peak at
    int(f T) and the end at T, one count later. torch does not cycle momentum here, and neither do
    we; it refuses counts from T on.

    >>> rate = one_cycle_schedule(1.0, 10, anneal="linear")
    >>> [round(float(rate(count)), 3) for count in (0, 1, 2, 9, 50)]
    [0.04, 0.52, 1.0, 0.0, 0.0]

    Reference: Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using
    Large Learning Rates", 2017, arXiv 1708.07120. Agrees with torch to rounding (goldens
    ``linear_decay__torch_onecycle_*``).
    """
    check_choice(ANNEALS, anneal=anneal)
    check_steps(transition_steps=transition_steps)
    check_range(peak_value=peak_value, ge=0)
    check_range(pct_start=pct_start, ge=0, le=0.5 if three_phase else 1)
    check_range(div_factor=div_factor, final_div_factor=final_div_factor, gt=0)
    curve = between(PROFILES[anneal])

    def schedule(count: Any) -> Array:
        count, peak, last = as_float(count), as_float(peak_value), as_float(transition_steps) - 1
        initial = peak / as_float(div_factor)
        final = initial / as_float(final_div_factor)
        up = as_float(pct_start) * (last + 1) - 1

        points = [(jnp.zeros_like(up), initial), (up, peak), (last, final)]
        if three_phase:
            points.insert(2, (2 * up, initial))
        value = final
        for (begin, from_value), (end, to_value) in reversed(list(itertools.pairwise(points))):
            piece = curve(progress(count - begin, end - begin), from_value, to_value)
            value = jnp.where(count <= end, piece, value)
        return value

    return schedule


RECORD = Method(
    factory=one_cycle_schedule,
    kind="schedule",
    summary="one rise to the peak and one long fall, at torch's counts",
    example={"peak_value": 1e-2, "transition_steps": 90},
    traced=("peak_value", "transition_steps", "pct_start", "div_factor", "final_div_factor"),
    static=("anneal", "three_phase"),
    paper='Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large '
    'Learning Rates", 2017, arXiv 1708.07120',
    reference="torch 2.13:torch/optim/lr_scheduler.py:OneCycleLR",
    licence="BSD-3-Clause",
)
