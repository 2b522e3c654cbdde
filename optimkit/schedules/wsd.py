"""Warmup-stable-decay: hold the peak for as long as you like, then decay fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_choice, check_count, check_range
from optimkit.protocols import Array, Method
from optimkit.schedules.phases import after_warmup, check_steps, constant, join
from optimkit.schedules.shapes import DECAYS, PROFILES, check_ends, transition


def half_life_decay(start_value: Any, end_value: Any, half_life: Any, rate: Any) -> optax.Schedule:
    """``max(start rate**(count / half_life), end)``: it has no length of its own."""

    def schedule(count: Any) -> Array:
        lives = jnp.maximum(as_float(count), 0) / as_float(half_life)
        return jnp.maximum(
            as_float(start_value) * jnp.power(as_float(rate), lives), as_float(end_value)
        )

    return schedule


def wsd_schedule(
    peak_value: Any,
    *,
    warmup_steps: Any,
    stable_steps: Any,
    decay_steps: Any,
    init_value: Any = 0.0,
    end_value: Any = 0.0,
    decay: str = "1-sqrt",
    half_life: Any = None,
    decay_rate: Any = 0.5,
    inclusive_end: bool = False,
    warmup: str = "linear",
) -> optax.Schedule:
    r"""Ramps up, holds the peak, and decays in the last part of the run.

    The peak carries the weights along the valley floor while they bounce between its walls, so the
    loss looks high; the decay takes the bounce away. With W, S, D the three lengths, c the count
    and :math:`x = \operatorname{clip}((c-W-S)/D, 0, 1)`, the rate rises from the initial value to P
    until W, stays there until W + S, and then is, with m the end value,

    ================= ============================================================
    ``linear``        :math:`m + (P-m)(1-x)`
    ``1-sqrt``        :math:`m + (P-m)(1-\sqrt x)`
    ``cosine``        :math:`m + (P-m)(1+\cos \pi x)/2`
    ``square``        :math:`m + (P-m)(1-x^2)`
    ``mirror_cosine`` :math:`m + (P-m)(2(1-x) - (1+\cos \pi x)/2)`
    ``rex``           :math:`m + (P-m)(1-x)/(1-x/2)`, as in ``rex_schedule``
    ``rsqrt``         :math:`m + (P-m)(1-h(x)/h(1))`, h = :math:`1/\sqrt{1+10x}-1`
    ``shifted_...``   ``shifted_exponential``, as in ``exponential_cooldown``
    ``exponential``   :math:`P (m/P)^x`, m > 0
    ``inverse``       :math:`1/(x/m + (1-x)/P)`, m > 0: linear in the reciprocal
    ``half_life``     :math:`\max(P r^{(c-W-S)/h}, m)`: D plays no part
    ================= ============================================================

    Args:
      peak_value: P, the rate of the stable phase.
      warmup_steps: W, >= 0.
      stable_steps: S, >= 0; ``math.inf`` holds the peak for good.
      decay_steps: D, >= 0. Usual are 10 to 20 % of the run (Hagele et al.). 0 jumps to the end.
      init_value: rate at count 0. 0 by default; epfml's code starts at P/100, transformers' at the
        end value.
      end_value: m. 0 by default, and required above 0 by ``exponential`` and ``inverse``.
      decay: the shape. ``1-sqrt`` is what Hagele et al. recommend; the default of their code is
        ``linear``, of transformers ``cosine``.
      half_life: h, in counts, > 0: required by ``half_life`` and used by nothing else.
      decay_rate: r, factor per half life, in (0, 1].
      inclusive_end: take (c-W-S+1)/D for x, so that the last update of the run already has m, as
        in fabian-sp/lr-scheduling. ``half_life`` knows no end.
        By default the last update has x = (D-1)/D, and m comes at count W+S+D.
      warmup: shape of the ramp: a profile (``linear``, ``cosine``, ``square`` ...).

    Returns:
      A schedule over the 0-based count; it holds m beyond the end. No state.

    Raises:
      ValueError: if an argument is out of range, a word is unknown, or a shape lacks its argument.

    A run shorter than W sees only the ramp. The ``half_life`` rule is MiniCPM's; it has no floor
    while m is 0. With S = 0 and ``linear`` this is the linear decay of budgeted training.

    >>> rate = wsd_schedule(1.0, warmup_steps=2, stable_steps=3, decay_steps=4)
    >>> [round(float(rate(count)), 3) for count in range(10)]
    [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.293, 0.134, 0.0]

    Reference: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable
    Training Strategies", 2024, arXiv 2404.06395; Hagele et al., "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations", 2024, arXiv 2405.18392 (the shapes). Agrees with
    Hagele's code, transformers, and a port of MiniCPM's class to rounding (goldens ``wsd__*``).
    """
    check_choice((*DECAYS, "half_life"), decay=decay)
    check_choice(tuple(PROFILES), warmup=warmup)
    check_steps(warmup_steps=warmup_steps, stable_steps=stable_steps, decay_steps=decay_steps)
    check_ends(decay, peak_value=peak_value, end_value=end_value)
    check_range(init_value=init_value, ge=0)
    check_range(half_life=half_life, gt=0)
    check_range(decay_rate=decay_rate, gt=0, le=1)
    if decay == "half_life":
        if half_life is None:
            raise ValueError("half_life must be > 0 with decay='half_life', got None")
        fall = half_life_decay(peak_value, end_value, half_life, decay_rate)
    else:
        whole = transition(peak_value, end_value, decay_steps, decay)
        fall = (lambda count: whole(count + 1)) if inclusive_end else whole

    return after_warmup(
        join((0, constant(peak_value)), (stable_steps, fall)),
        warmup_steps=warmup_steps,
        start_value=init_value,
        peak_value=peak_value,
        shape=warmup,
    )


def wsdc_schedule(
    peak_value: Any,
    *,
    warmup_steps: Any,
    stable_steps: Any,
    decay_steps: Any,
    end_value: Any,
    init_value: Any = 0.0,
    decay: str = "linear",
    half_life: Any = None,
    decay_rate: Any = 0.5,
    inclusive_end: bool = False,
    warmup: str = "linear",
) -> optax.Schedule:
    """Warmup-stable-decay-constant: ``wsd_schedule`` that goes on at a small constant rate.

    Provisional: the report names the schedule; its decay shape, its final rate and the lengths of
    its phases could not be established, and ``linear`` is our choice.

    Args:
      peak_value: rate of the stable phase.
      warmup_steps: length of the ramp, >= 0.
      stable_steps: length of the stable phase, >= 0.
      decay_steps: length of the decay, >= 0.
      end_value: the constant after the decay, > 0.
      init_value: rate at count 0.
      decay: shape of the decay, as in ``wsd_schedule``.
      half_life: as in ``wsd_schedule``.
      decay_rate: as in ``wsd_schedule``.
      inclusive_end: as in ``wsd_schedule``.
      warmup: shape of the ramp, as in ``wsd_schedule``.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: as ``wsd_schedule`` does, and for an end value of 0.

    >>> rate = wsdc_schedule(1.0, warmup_steps=0, stable_steps=1, decay_steps=2, end_value=0.1)
    >>> [round(float(rate(count)), 3) for count in (0, 1, 2, 3, 100)]
    [1.0, 1.0, 0.55, 0.1, 0.1]

    Reference: Deng et al., "PLM: Efficient Peripheral Language Models Hardware-Co-Designed for
    Ubiquitous Computing", 2025, arXiv 2503.12167. No training code was published.
    """
    check_range(end_value=end_value, gt=0)
    return wsd_schedule(
        peak_value,
        warmup_steps=warmup_steps,
        stable_steps=stable_steps,
        decay_steps=decay_steps,
        init_value=init_value,
        end_value=end_value,
        decay=decay,
        half_life=half_life,
        decay_rate=decay_rate,
        inclusive_end=inclusive_end,
        warmup=warmup,
    )


def wsd_branch(
    schedule_args: Mapping[str, Any], *, trunk_step: int, decay_steps: int
) -> tuple[optax.Schedule, int]:
    """The schedule of a branch that decays from a checkpoint of a stable trunk.

    One trunk serves many budgets: for a budget of N steps restore the trunk's parameters, optimizer
    state and data position at step N - D, run D steps of decay, keep the result, and let the trunk
    go on from its own checkpoint.

    Args:
      schedule_args: the keywords of the trunk's ``wsd_schedule``, ``peak_value`` among them. Its
        decay length is replaced, and so is its stable length, which may be left out.
      trunk_step: how many updates the restored checkpoint had; not before the end of the warm-up,
        nor after the end of the trunk's stable phase.
      decay_steps: D of this branch, >= 0.

    Returns:
      The schedule over the trunk's own count, and the count of the branch's first update: the value
      that the restored optimizer state holds. The branch ends before count ``trunk_step + D``.

    Raises:
      ValueError: if the checkpoint does not lie in the trunk's stable phase.

    >>> trunk = {"peak_value": 1.0, "warmup_steps": 10, "decay": "linear"}
    >>> rate, first_count = wsd_branch(trunk, trunk_step=80, decay_steps=20)
    >>> first_count, float(rate(80)), float(rate(90)), float(rate(100))
    (80, 1.0, 0.5, 0.0)

    Reference: Hu et al., 2024, arXiv 2404.06395; Hagele et al., 2024, arXiv 2405.18392.
    """
    arguments = dict(schedule_args)
    warmup_steps: Any = arguments.get("warmup_steps")
    check_count(warmup_steps=warmup_steps)
    check_count(trunk_step=trunk_step, least=warmup_steps)
    check_count(decay_steps=decay_steps)
    if (stable_steps := arguments.get("stable_steps")) is not None:
        check_range(trunk_step=trunk_step, le=warmup_steps + stable_steps)
    arguments.update(stable_steps=trunk_step - warmup_steps, decay_steps=decay_steps)
    return wsd_schedule(**arguments), int(trunk_step)


_PAPER = (
    'Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training '
    'Strategies", 2024, arXiv 2404.06395; Hagele et al., "Scaling Laws and Compute-Optimal '
    'Training Beyond Fixed Training Durations", 2024, arXiv 2405.18392'
)
_VALUES = ("peak_value", "init_value", "end_value", "half_life", "decay_rate")
_STEPS = ("warmup_steps", "stable_steps", "decay_steps")

RECORDS = (
    Method(
        factory=wsd_schedule,
        kind="schedule",
        summary="warm-up, stable phase, fast decay in one of eleven shapes",
        example={"peak_value": 1e-3, "warmup_steps": 10, "stable_steps": 60, "decay_steps": 20},
        traced=_VALUES + _STEPS,
        static=("decay", "inclusive_end", "warmup"),
        paper=_PAPER,
        reference="epfml/schedules-and-scaling@17e78d600a7054bc6609a5ca6d050d141d4ad79e:"
        "src/optim/utils.py:wsd_schedule",
        licence="MIT",
    ),
    Method(
        factory=wsdc_schedule,
        kind="schedule",
        summary="warm-up, stable phase, decay, small constant",
        example={
            "peak_value": 1e-3,
            "warmup_steps": 10,
            "stable_steps": 50,
            "decay_steps": 20,
            "end_value": 1e-4,
            "decay": "exponential",
        },
        traced=_VALUES + _STEPS,
        static=("decay", "inclusive_end", "warmup"),
        status="provisional",
        paper='Deng et al., "PLM: Efficient Peripheral Language Models Hardware-Co-Designed for '
        'Ubiquitous Computing", 2025, arXiv 2503.12167',
    ),
)
