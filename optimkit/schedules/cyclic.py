"""One run, several finished models: WSD-S and the cyclic cosine, one cycle per budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_choice, check_count, check_range
from optimkit.protocols import Array, Method
from optimkit.schedules.phases import after_warmup, constant, cycles, join
from optimkit.schedules.shapes import DECAYS, check_ends, transition


def _check_fits(index: int, length: int, warmup: int, decay: int) -> None:
    if warmup + decay > length:
        raise ValueError(
            f"budgets[{index}] must leave room for {warmup} steps of warm-up and {decay} of decay, "
            f"got a cycle of {length} steps"
        )


def wsd_s_schedule(
    peak_value: Any,
    budgets: Sequence[int],
    *,
    decay_fraction: float = 0.1,
    warmup_steps: int = 0,
    rewarmup_fraction: float = 0.0,
    end_value: Any,
    decay: str = "inverse",
) -> optax.Schedule:
    r"""WSD-S: decay at every budget, then go on from the decayed weights at the peak rate.

    No checkpoint is restored: the run passes through a finished model at each budget, and the steps
    of the decays are not thrown away. Cycle k covers the counts from :math:`b_{k-1}` up to
    :math:`b_k`, L of them: a warm-up, the peak P, and a decay to m over the last
    :math:`D_k = \lfloor f L \rfloor` counts. At count :math:`b_k` the rate jumps back to P, or
    ramps up from m in :math:`\lfloor f_w L \rfloor` counts. After the last budget it holds m.

    Args:
      peak_value: P.
      budgets: increasing counts at which a finished model is wanted.
      decay_fraction: f, share of each cycle spent on its decay, in [0, 1]. 0.1 is usual.
      warmup_steps: length of the first ramp, from 0.
      rewarmup_fraction: f_w, share of each later cycle spent on a new ramp; 0, the default, jumps.
      end_value: m, reached by every decay; 0.1 P is usual. Above 0 for ``inverse`` and
        ``exponential``.
      decay: ``inverse`` (the paper's) or any other word of ``wsd_schedule`` except ``half_life``.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if the budgets do not increase, one is too short for its warm-up and decay, a
        value is out of range, or a word is unknown.

    With ``inverse`` the progress is max(count in the decay, 1) / D, so that the first two counts of
    a decay have the same rate: the authors' trainer does so, and so do we. Lengths are truncated as
    Python's ``int(fraction * length)``. A cycle too short for one step of decay does not decay.

    >>> rate = wsd_s_schedule(1.0, [4, 8], decay_fraction=0.5, end_value=0.2, decay="linear")
    >>> [round(float(rate(count)), 2) for count in range(9)]
    [1.0, 1.0, 1.0, 0.6, 1.0, 1.0, 1.0, 0.6, 0.2]

    Reference: Wen et al., "Understanding Warmup-Stable-Decay Learning Rates: A River Valley Loss
    Landscape Perspective", 2024, arXiv 2410.05192. Agrees with levanter, the trainer of the paper,
    to rounding (goldens ``wsd__wsds_levanter_*``).
    """
    check_choice(tuple(DECAYS), decay=decay)
    check_ends(decay, peak_value=peak_value, end_value=end_value)
    check_range(decay_fraction=decay_fraction, rewarmup_fraction=rewarmup_fraction, ge=0, le=1)
    check_count(warmup_steps=warmup_steps)

    def cycle(index: int, length: int) -> optax.Schedule:
        ramp = int(rewarmup_fraction * length) if index else int(warmup_steps)
        fall = int(decay_fraction * length)
        _check_fits(index, length, ramp, fall)
        decays = transition(peak_value, end_value, fall, decay)

        def falling(count: Any) -> Array:
            return decays(jnp.maximum(as_float(count), 1) if decay == "inverse" else count)

        return after_warmup(
            join((0, constant(peak_value)), (length - ramp - fall, falling)),
            warmup_steps=ramp,
            start_value=end_value if index else 0.0,
            peak_value=peak_value,
        )

    return cycles(cycle, budgets, end_value=end_value)


def cyclic_cosine_schedule(
    peak_value: Any, budgets: Sequence[int], *, warmup_steps: int = 0, end_value: Any = 0.0
) -> optax.Schedule:
    r"""A cosine from the peak to the end value in every cycle: the baseline of WSD-S.

    .. math:: \eta = m + (P-m)\,\frac{1+\cos(\pi (c-b_{k-1})/(b_k-b_{k-1}))}{2}

    Args:
      peak_value: P, taken again at once at the start of each cycle.
      budgets: increasing counts at which the cycles end.
      warmup_steps: ramp from 0 in the first cycle, whose cosine it shortens.
      end_value: m, reached at each budget and held after the last.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if the budgets do not increase, the first is shorter than the warm-up, or a value
        is out of range.

    >>> rate = cyclic_cosine_schedule(1.0, [2, 6])
    >>> [round(float(rate(count)), 3) for count in range(7)]
    [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]

    Reference: the baseline of Wen et al., 2024, arXiv 2410.05192. Agrees with levanter to rounding
    (golden ``wsd__cyclic_cosine``).
    """
    check_range(peak_value=peak_value, end_value=end_value, ge=0)
    check_count(warmup_steps=warmup_steps)

    def cycle(index: int, length: int) -> optax.Schedule:
        ramp = 0 if index else int(warmup_steps)
        _check_fits(index, length, ramp, 0)
        cosine = transition(peak_value, end_value, length - ramp, "cosine")
        return after_warmup(cosine, warmup_steps=ramp, start_value=0.0, peak_value=peak_value)

    return cycles(cycle, budgets, end_value=end_value)


_PAPER = (
    'Wen et al., "Understanding Warmup-Stable-Decay Learning Rates: A River Valley Loss Landscape '
    'Perspective", 2024, arXiv 2410.05192'
)
_REFERENCE = (
    "stanford-crfm/levanter@9263f81e8b453241332c2c0b2d2001bfb2d2241c:"
    "src/levanter/optim/config.py:lr_scheduler"
)

RECORDS = (
    Method(
        factory=wsd_s_schedule,
        kind="schedule",
        summary="decay at every budget and go on at the peak from the decayed weights",
        example={
            "peak_value": 1e-3,
            "budgets": (30, 60, 100),
            "warmup_steps": 5,
            "end_value": 1e-4,
        },
        traced=("peak_value", "end_value"),
        static=("budgets", "decay_fraction", "warmup_steps", "rewarmup_fraction", "decay"),
        paper=_PAPER,
        reference=_REFERENCE,
        licence="Apache-2.0",
    ),
    Method(
        factory=cyclic_cosine_schedule,
        kind="schedule",
        summary="one cosine per budget, restarting at the peak",
        example={"peak_value": 1e-3, "budgets": (30, 60, 100), "warmup_steps": 5},
        traced=("peak_value", "end_value"),
        static=("budgets", "warmup_steps"),
        paper=_PAPER,
        reference=_REFERENCE,
        licence="Apache-2.0",
    ),
)
