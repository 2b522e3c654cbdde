"""REX, the reflected exponential, and the framework around it: a profile and a sampling rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_choice, check_range
from optimkit.protocols import Array, Method
from optimkit.schedules.phases import after_warmup, check_steps
from optimkit.schedules.sampling import check_sampling, sample_schedule
from optimkit.schedules.shapes import PROFILES, Profile, between, rational_map, transition


def rex_schedule(
    init_value: Any,
    transition_steps: Any,
    *,
    shape: Any = 0.5,
    end_value: Any = 0.0,
    warmup_steps: Any = 0,
    warmup_init_value: Any = 0.0,
) -> optax.Schedule:
    r"""Stays above the straight line for most of the run and drops late.

    With c the count, W the warm-up, T the length after it, and
    :math:`p = \operatorname{clip}((c-W)/T, 0, 1)`,

    .. math:: \eta = m + (\eta_0 - m)\,\frac{1-p}{(1-s) + s(1-p)}

    Args:
      init_value: rate at the end of the warm-up.
      transition_steps: T, counted after the warm-up. <= 0 keeps the initial value for good, as
        optax's schedules do.
      shape: s, in [0, 1). 0.5 is the paper's; 0 is linear decay; near 1 the rate is constant with a
        cliff at the end.
      end_value: m, held from count W + T on. It may lie above the initial value.
      warmup_steps: W, >= 0.
      warmup_init_value: rate at count 0 of the warm-up.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range.

    The implementation that is cited most, REX_LR, has s = 0.9 and starts again at the peak after
    the end: ``shape=0.9`` gives its curve, and we hold the end value. In init2winit ``beta`` is
    1 - s.

    >>> rate = rex_schedule(1.0, 4)
    >>> [round(float(rate(count)), 3) for count in range(6)]
    [1.0, 0.857, 0.667, 0.4, 0.0, 0.0]

    Reference: Chen et al., "REX: Revisiting Budgeted Training with an Improved Schedule", MLSys
    2022, arXiv 2107.04197. Agrees with REX_LR, pytorch_optimizer and init2winit to rounding
    (goldens ``rex__*``).
    """
    check_range(shape=shape, ge=0, lt=1)
    check_range(
        init_value=init_value, end_value=end_value, warmup_init_value=warmup_init_value, ge=0
    )
    check_steps(warmup_steps=warmup_steps)
    check_range(transition_steps=transition_steps, gt=-math.inf)

    def profile(x: Array) -> Array:
        return rational_map(1 - x, as_float(shape))

    return after_warmup(
        transition(init_value, end_value, transition_steps, between(profile), if_empty=0.0),
        warmup_steps=warmup_steps,
        start_value=warmup_init_value,
        peak_value=init_value,
    )


def profile_schedule(
    profile: str | Callable[[Any], Any],
    init_value: Any,
    transition_steps: Any,
    *,
    end_value: Any = 0.0,
    sampling: Any = "every",
    warmup_steps: Any = 0,
    gamma: Any = None,
) -> optax.Schedule:
    r"""Any schedule as REX's paper sees it: a curve over progress, and how often it is read.

    .. math:: \eta = m + (\eta_0 - m)\, f(p), \qquad p = \operatorname{clip}((c-W)/T, 0, 1)

    Args:
      profile: f, by name (``linear``, ``cosine``, ``rex``, ``exponential``, or another profile of
        ``wsd_schedule``) or as a function of p with f(0) = 1.
      init_value: rate at the end of the warm-up.
      transition_steps: T, counted after the warm-up; <= 0 keeps the initial value.
      end_value: m, reached where f(1) = 0.
      sampling: ``"every"`` count, every k-th (an integer), or at fractions of T, as
        ``sample_schedule`` has it. The paper finds reading at every count best.
      warmup_steps: W, >= 0: a linear ramp from 0, read at every count.
      gamma: rate of ``exponential``, :math:`f = e^{-\gamma p}`, >= 0; required by it, since the
        paper's constant could not be established. It ends at :math:`e^{-\gamma}`, not at 0.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range, a word is unknown, or gamma is missing.

    Provisional: no code of the paper was found; names and rules follow its abstract. For the
    classic step decay use ``optax.piecewise_constant_schedule``.

    >>> rate = profile_schedule("linear", 1.0, 8, sampling=3)
    >>> [float(rate(count)) for count in (0, 2, 3, 6, 8, 9)]
    [1.0, 1.0, 0.625, 0.25, 0.25, 0.0]

    Reference: Chen et al., "REX: Revisiting Budgeted Training with an Improved Schedule", MLSys
    2022, arXiv 2107.04197.
    """
    check_range(init_value=init_value, end_value=end_value, gamma=gamma, ge=0)
    check_steps(warmup_steps=warmup_steps)
    check_range(transition_steps=transition_steps, gt=-math.inf)
    check_sampling(sampling)
    if callable(profile):
        curve = profile
    else:
        check_choice((*PROFILES, "exponential"), profile=profile)
        curve = _exponential(gamma) if profile == "exponential" else PROFILES[profile]
    decays = transition(init_value, end_value, transition_steps, between(curve), if_empty=0.0)
    return after_warmup(
        sample_schedule(decays, transition_steps, sampling),
        warmup_steps=warmup_steps,
        start_value=0.0,
        peak_value=init_value,
    )


def _exponential(gamma: Any) -> Profile:
    if gamma is None:
        raise ValueError("gamma must be >= 0 with profile='exponential', got None")
    return lambda x: jnp.exp(-as_float(gamma) * x)


_PAPER = (
    'Chen et al., "REX: Revisiting Budgeted Training with an Improved Schedule", MLSys 2022, '
    "arXiv 2107.04197"
)

RECORDS = (
    Method(
        factory=rex_schedule,
        kind="schedule",
        summary="reflected exponential: above linear, with a late drop",
        example={"init_value": 1e-3, "transition_steps": 80, "warmup_steps": 10},
        traced=(
            "init_value",
            "transition_steps",
            "shape",
            "end_value",
            "warmup_steps",
            "warmup_init_value",
        ),
        paper=_PAPER,
        reference="kozistr/pytorch_optimizer 4.1.0:lr_scheduler/rex.py:REXScheduler",
        licence="Apache-2.0",
    ),
    Method(
        factory=profile_schedule,
        kind="schedule",
        summary="any profile over progress, read at any sampling rate",
        example={
            "profile": "exponential",
            "init_value": 1e-3,
            "transition_steps": 80,
            "sampling": 8,
            "warmup_steps": 10,
            "gamma": 3.0,
        },
        traced=("init_value", "transition_steps", "end_value", "warmup_steps", "gamma"),
        static=("profile", "sampling"),
        status="provisional",
        paper=_PAPER,
    ),
)
