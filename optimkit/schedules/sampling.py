"""How often a rate is read again from its curve: every step, every k steps, or at milestones."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_count, check_range
from optimkit.protocols import Array, Method


def check_sampling(sampling: Any) -> None:
    """Raises unless ``sampling`` is "every", an integer >= 1, or increasing fractions in (0, 1)."""
    if isinstance(sampling, (tuple, list)):
        if sampling and all(a < b for a, b in zip((0, *sampling), (*sampling, 1), strict=True)):
            return
    elif sampling == "every":
        return
    elif not isinstance(sampling, (str, bool)):
        check_count(sampling=sampling, least=1)
        return
    raise ValueError(
        "sampling must be 'every', an integer >= 1 or a tuple of increasing fractions in (0, 1), "
        f"got {sampling!r}"
    )


def sample_count(count: Any, transition_steps: Any, sampling: Any) -> Array:
    """The count at which the curve was last read: ``count`` itself, or an earlier one.

    >>> [float(sample_count(count, 8, 3)) for count in (2, 3, 7)]
    [0.0, 3.0, 6.0]
    >>> [float(sample_count(count, 8, (0.5, 0.75))) for count in (3, 4, 7)]
    [0.0, 4.0, 6.0]
    """
    count = as_float(count)
    if sampling == "every":
        return count
    if not isinstance(sampling, (tuple, list)):
        return count - jnp.mod(count, sampling)  # exact, where k * floor(count / k) is not
    steps = as_float(transition_steps)
    # A milestone such as 0.3 * 10 is a little off in floating point; an integer count is not.
    slack = 1 - 4 * jnp.finfo(count.dtype).eps
    fraction = jnp.zeros_like(count)
    for milestone in sampling:
        fraction = jnp.where(count >= milestone * steps * slack, milestone, fraction)
    return fraction * steps


def sample_schedule(
    schedule: optax.Schedule, transition_steps: Any, sampling: Any
) -> optax.Schedule:
    r"""Reads any schedule only now and then, and holds the value in between.

    A schedule is a profile and a sampling rate: the classic step decay is an exponential profile
    that is read two or three times in a run. With c the count and T the length,

    .. math:: \eta(c) = s(k \lfloor c/k \rfloor) \quad\text{or}\quad
        \eta(c) = s(f_i T),\; f_i = \max\{f : f \le c/T\} \cup \{0\}

    Args:
      schedule: any function of the 0-based count. It is given floats.
      transition_steps: T, the length to which fractions refer.
      sampling: ``"every"``, an integer k >= 1, or increasing fractions in (0, 1): ``(0.5, 0.75)``
        is the paper's 50-75, ``(0.3, 0.6, 0.9)`` its 30-60-90.

    Returns:
      A schedule over the 0-based count. With fractions it holds ``s(f_m T)`` to the end and beyond,
      so the final value of ``schedule`` is never reached. No state.

    Raises:
      ValueError: if ``schedule`` is no function, or for any other ``sampling``.

    Provisional: no code of the paper was found; the rule follows its abstract.

    >>> import optax
    >>> rate = sample_schedule(optax.linear_schedule(1.0, 0.0, 8), 8, (0.5, 0.75))
    >>> [float(rate(count)) for count in (0, 3, 4, 5, 6, 8, 20)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]

    Reference: Chen et al., "REX: Revisiting Budgeted Training with an Improved Schedule", MLSys
    2022, arXiv 2107.04197.
    """
    if not callable(schedule):
        raise ValueError(f"schedule must be a function of the count, got {schedule!r}")
    check_range(transition_steps=transition_steps, gt=-math.inf)
    check_sampling(sampling)

    def sampled(count: Any) -> Array:
        return as_float(schedule(sample_count(count, transition_steps, sampling)))

    return sampled


RECORD = Method(
    factory=sample_schedule,
    kind="schedule",
    summary="reads any schedule every k steps or at milestones",
    example={"transition_steps": 90, "sampling": (0.3, 0.6, 0.9)},
    example_made={"schedule": lambda: optax.cosine_decay_schedule(1e-3, 90)},
    traced=("transition_steps",),
    static=("schedule", "sampling"),
    status="provisional",
    paper='Chen et al., "REX: Revisiting Budgeted Training with an Improved Schedule", MLSys 2022, '
    "arXiv 2107.04197",
)
