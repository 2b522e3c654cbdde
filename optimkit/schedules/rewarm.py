"""Re-warming and re-decaying: a warm-up and a cosine for every data set of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_choice, check_range
from optimkit.protocols import Array, Method
from optimkit.schedules.phases import after_warmup, consecutive, each, join, per_phase
from optimkit.schedules.shapes import transition

STARTS = ("zero", "end_value")


def rewarm_schedule(
    peak_values: Sequence[Any] | Any,
    *,
    end_value: Any,
    task_steps: Sequence[Any] | Any,
    warmup_steps: Sequence[Any] | Any,
    init_value: Any = 0.0,
    rewarm_from: Literal["zero", "end_value"] = "zero",
    neox_warmup: bool = False,
) -> optax.Schedule:
    r"""Raises the rate again for every new data set, and lets it fall along a cosine again.

    A model that ended at a tiny rate adapts too little. With t the count within the task, P, L, W
    its peak, length and warm-up, m the end value and s the start of its ramp,

    .. math:: \eta = s + (P-s)\, t/W \;\; (t < W), \qquad
        \eta = m + (P-m)\,\frac{1+\cos(\pi (t-W)/(L-W))}{2}

    Args:
      peak_values: P, one for each task.
      end_value: m, >= 0; a tenth of the peak is usual. Held after the last task.
      task_steps: L, one for each task, >= 0. A task without steps is left out.
      warmup_steps: W, one for each task, >= 0; 1 % of the task's steps is usual. 0 starts at P; a
        ramp longer than the task is cut off.
      init_value: s of the first task.
      rewarm_from: s of the later ones: ``zero``, as GPT-NeoX does, or ``end_value``, which is
        continuous.
      neox_warmup: GPT-NeoX's ramp, P max(t, 1)/W for every task: count 0 has P/W already, and
        neither ``init_value`` nor ``rewarm_from`` has a say.

    A single number in place of a sequence holds for all tasks.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if sequences differ in length, a value is out of range, or a word is unknown.

    Re-warming first raises the loss on the old data and on the new. Whether Adam's moments are kept
    is up to the loop; the authors keep them. Where the lengths of the tasks are not known, use
    ``infinite_cosine_schedule``.

    >>> rate = rewarm_schedule([4.0, 2.0], end_value=1.0, task_steps=4, warmup_steps=2)
    >>> [float(rate(count)) for count in range(10)]
    [0.0, 2.0, 4.0, 2.5, 0.0, 1.0, 2.0, 1.5, 1.0, 1.0]

    Reference: Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large
    Language Models", 2024, arXiv 2403.08763. Agrees with GPT-NeoX's ``AnnealingLR``, one for each
    data set, to rounding (golden ``rewarm__neox_three_tasks``).
    """
    check_choice(STARTS, rewarm_from=rewarm_from)
    check_range(end_value=end_value, init_value=init_value, ge=0)
    tasks = per_phase(peak_values=peak_values, task_steps=task_steps, warmup_steps=warmup_steps)
    for name, values in tasks.items():
        check_range(**each(name, values), ge=0)

    later = end_value if rewarm_from == "end_value" else 0.0

    def floored(decays: optax.Schedule, warmup: Any) -> optax.Schedule:
        def schedule(t: Any) -> Array:  # the floor holds after count W, not at it
            rate = decays(t)
            after = (t > 0) | (as_float(warmup) <= 0)
            return jnp.where(after, jnp.maximum(rate, as_float(end_value)), rate)

        return schedule

    def task(index: int, peak: Any, length: Any, warmup: Any) -> optax.Schedule:
        decays = transition(peak, end_value, length - warmup, "cosine")
        if neox_warmup:
            ramp = transition(0.0, peak, warmup)
            return join((0, lambda t: ramp(jnp.maximum(t, 1.0))), (warmup, floored(decays, warmup)))
        return after_warmup(
            decays,
            warmup_steps=warmup,
            start_value=later if index else init_value,
            peak_value=peak,
        )

    rows = enumerate(zip(*tasks.values(), strict=True))
    pieces: list[Any] = [task(index, *row) for index, row in rows]
    return consecutive(tasks["task_steps"], pieces, end_value=end_value)


RECORD = Method(
    factory=rewarm_schedule,
    kind="schedule",
    summary="a warm-up and a cosine for every data set of a stream",
    example={
        "peak_values": (1e-3, 5e-4),
        "end_value": 1e-4,
        "task_steps": (50, 40),
        "warmup_steps": 5,
    },
    traced=("peak_values", "end_value", "task_steps", "warmup_steps", "init_value"),
    static=("rewarm_from", "neox_warmup"),
    paper='Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language '
    'Models", 2024, arXiv 2403.08763',
    reference="EleutherAI/gpt-neox@ea7aefd8f8e183256992d9fede4d7c71a46d67a5:"
    "megatron/learning_rates.py:AnnealingLR",
    licence="Apache-2.0",
)
