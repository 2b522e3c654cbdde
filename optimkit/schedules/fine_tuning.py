"""Two uses of the warmup-stable-decay curve that papers gave a name of their own."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.numerics import check_choice, check_range
from optimkit.protocols import Method
from optimkit.schedules.phases import check_steps
from optimkit.schedules.shapes import DECAYS, check_ends
from optimkit.schedules.wsd import wsd_schedule


def slow_start_fast_decay_schedule(
    start_value: Any,
    peak_value: Any,
    *,
    ramp_steps: Any,
    decay_steps: Any,
    end_value: Any,
    decay: str = "exponential",
) -> optax.Schedule:
    """Starts far below the peak, rises, and falls fast: for adversarial fine-tuning.

    The first adversarial gradients would destroy what the network has learnt; a long end would
    overfit to the attack. It is ``wsd_schedule`` without a stable phase.

    Args:
      start_value: rate at count 0, >= 0.
      peak_value: rate at count ``ramp_steps``.
      ramp_steps: length of the straight rise, >= 0. If the run is not longer, the decay never
        starts.
      decay_steps: length of the decay, >= 0.
      end_value: reached at count ``ramp_steps + decay_steps`` and held; > 0 for ``exponential`` and
        ``inverse``.
      decay: any shape of ``wsd_schedule`` except ``half_life``.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if an argument is out of range, or the word is unknown.

    Provisional: no code was published; the shape is inferred from the abstract, and no constant of
    the paper could be established.

    >>> rate = slow_start_fast_decay_schedule(1.0, 4.0, ramp_steps=2, decay_steps=2, end_value=0.25)
    >>> [round(float(rate(count)), 3) for count in range(6)]
    [1.0, 2.5, 4.0, 1.0, 0.25, 0.25]

    Reference: Jeddi et al., "A Simple Fine-tuning Is All You Need: Towards Robust Deep Learning Via
    Adversarial Fine-tuning", 2020, arXiv 2012.13628. The golden
    ``slow_start_fast_decay__inferred`` tests the formula above.
    """
    check_choice(tuple(DECAYS), decay=decay)
    check_range(start_value=start_value, ge=0)
    check_steps(ramp_steps=ramp_steps, decay_steps=decay_steps)
    return wsd_schedule(
        peak_value,
        warmup_steps=ramp_steps,
        stable_steps=0,
        decay_steps=decay_steps,
        init_value=start_value,
        end_value=end_value,
        decay=decay,
    )


def moderate_decay_schedule(
    peak_value: Any,
    transition_steps: Any,
    *,
    final_ratio: Any,
    warmup_steps: Any = 0,
    decay_steps: Any,
    decay: str = "1-sqrt",
) -> optax.Schedule:
    """Warmup-stable-decay that ends at a sizeable part of the peak, for data of rising quality.

    With a curriculum the best data comes last and would meet the smallest rate.

    Args:
      peak_value: rate of the stable phase.
      transition_steps: the whole run, *with* warm-up and decay.
      final_ratio: end value over peak, >= 0. No default: the paper says moderately smaller than 1.
        > 0 for ``exponential`` and ``inverse``.
      warmup_steps: length of the ramp from 0, >= 0.
      decay_steps: length of the decay at the end of the run, >= 0.
      decay: any shape of ``wsd_schedule`` except ``half_life``.

    Returns:
      A schedule over the 0-based count; it holds the end value. No state.

    Raises:
      ValueError: if an argument is out of range, the run is shorter than its warm-up and decay, or
        the word is unknown.

    Provisional: no code was published, and the paper's ratios could not be established.

    >>> rate = moderate_decay_schedule(1.0, 6, final_ratio=0.5, decay_steps=4)
    >>> [round(float(rate(count)), 3) for count in range(8)]
    [1.0, 1.0, 1.0, 0.75, 0.646, 0.567, 0.5, 0.5]

    Reference: Luo et al., "How Learning Rate Decay Wastes Your Best Data in Curriculum-Based LLM
    Pretraining", ICLR 2026, arXiv 2511.18903.
    """
    check_choice(tuple(DECAYS), decay=decay)
    check_steps(warmup_steps=warmup_steps, decay_steps=decay_steps)
    check_ends(decay, peak_value=peak_value, final_ratio=final_ratio)
    least = warmup_steps + decay_steps
    check_range(
        transition_steps=transition_steps, ge=least if isinstance(least, (int, float)) else 0
    )
    return wsd_schedule(
        peak_value,
        warmup_steps=warmup_steps,
        stable_steps=transition_steps - least,
        decay_steps=decay_steps,
        end_value=final_ratio * peak_value,
        decay=decay,
    )


RECORDS = (
    Method(
        factory=slow_start_fast_decay_schedule,
        kind="schedule",
        summary="slow rise from a small rate, then a fast decay",
        example={
            "start_value": 1e-4,
            "peak_value": 1e-2,
            "ramp_steps": 20,
            "decay_steps": 30,
            "end_value": 1e-6,
        },
        traced=("start_value", "peak_value", "ramp_steps", "decay_steps", "end_value"),
        static=("decay",),
        status="provisional",
        paper='Jeddi et al., "A Simple Fine-tuning Is All You Need: Towards Robust Deep Learning '
        'Via Adversarial Fine-tuning", 2020, arXiv 2012.13628',
    ),
    Method(
        factory=moderate_decay_schedule,
        kind="schedule",
        summary="warmup-stable-decay that ends at a sizeable part of the peak",
        example={
            "peak_value": 1e-3,
            "transition_steps": 90,
            "final_ratio": 0.3,
            "warmup_steps": 10,
            "decay_steps": 30,
        },
        traced=("peak_value", "transition_steps", "final_ratio", "warmup_steps", "decay_steps"),
        static=("decay",),
        status="provisional",
        paper='Luo et al., "How Learning Rate Decay Wastes Your Best Data in Curriculum-Based LLM '
        'Pretraining", ICLR 2026, arXiv 2511.18903',
    ),
)
