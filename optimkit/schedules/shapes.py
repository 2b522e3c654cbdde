"""The curves: what a rate does between the start and the end of one phase.

A *profile* maps progress x in [0, 1] to a factor that falls from 1 to 0. A *decay* maps progress, a
start value and an end value to a rate; every profile gives one, and two more work on ratios. A ramp
upwards is the same curve with a start below the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_range, safe_div
from optimkit.protocols import Array

Profile: TypeAlias = Callable[[Array], Array]
"""Progress in [0, 1] -> factor, 1 at x = 0."""

Decay: TypeAlias = Callable[[Array, Array, Array], Array]
"""``(progress, start, end) -> rate``: start at x = 0, end at x = 1."""


def progress(count: Any, length: Any, *, if_empty: Any = 1.0) -> Array:
    """How much of a phase of ``length`` counts is over: ``count / length``, within [0, 1].

    A phase without length (<= 0) is over at once: it gives 0 before count 0 and ``if_empty`` from
    there on. Counts are floats here, so in f32 a count above 2**24 is rounded to 1 part in 1.7e7.

    >>> [float(progress(count, 4)) for count in (-1, 1, 4, 9)], float(progress(0, 0))
    ([0.0, 0.25, 1.0, 1.0], 1.0)
    """
    count, length = as_float(count), as_float(length)
    empty = length <= 0
    inside = jnp.clip(count / jnp.where(empty, 1, length), 0, 1)
    return jnp.where(empty, jnp.where(count >= 0, if_empty, 0.0), inside)


# ---------------------------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------------------------


def half_cosine(x: Array) -> Array:
    """``(1 + cos(pi x)) / 2``."""
    return (1 + jnp.cos(jnp.pi * x)) / 2


def rational_map(z: Array, shape: Any) -> Array:
    """``z / ((1 - shape) + shape z)``: fixes 0 and 1, and lifts what lies between for shape > 0.

    REX is this map of the linear profile with shape 1/2. Shape 0 changes nothing, a negative shape
    lowers, and shape -> 1 tends to a constant 1 with a cliff at z = 0. The denominator is written
    as ``z + (1-z)(1-shape)``, which does not cancel.

    >>> [round(float(rational_map(z, 0.5)), 4) for z in (0.0, 0.5, 1.0)]
    [0.0, 0.6667, 1.0]
    """
    return safe_div(z, z + (1 - z) * (1 - shape))


def inverse_sqrt(x: Array, alpha: Any) -> Array:
    """``1 - h(x) / h(1)`` with ``h(x) = 1 / sqrt(1 + alpha x) - 1``: fast first, then slow.

    Written without the differences of h, so that alpha = 0 gives its limit, the straight line.

    >>> [round(float(inverse_sqrt(x, 8.0)), 4) for x in (0.0, 0.375, 1.0)]
    [1.0, 0.25, 0.0]
    """
    here, last = jnp.sqrt(1 + alpha * x), jnp.sqrt(1 + alpha * jnp.ones_like(x))
    return 1 - x * (last * (1 + last)) / (here * (1 + here))


def shifted_exponential(x: Array) -> Array:
    """``(exp(1-x) - 1) / (e - 1)``: an exponential that reaches 0 at x = 1."""
    return jnp.expm1(1 - x) / jnp.expm1(jnp.ones_like(x))


PROFILES: Mapping[str, Profile] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - jnp.sqrt(x),
    "cosine": half_cosine,
    "square": lambda x: 1 - jnp.square(x),
    "mirror_cosine": lambda x: 2 * (1 - x) - half_cosine(x),
    "rex": lambda x: rational_map(1 - x, 0.5),
    "rsqrt": lambda x: inverse_sqrt(x, 10.0),
    "shifted_exponential": shifted_exponential,
}
"""Curves from 1 to 0 by name."""


# ---------------------------------------------------------------------------------------------
# Decays
# ---------------------------------------------------------------------------------------------


def between(profile: Profile) -> Decay:
    """The decay that follows a profile; exactly start and end at the two ends."""

    def decay(x: Array, start: Array, end: Array) -> Array:
        factor = profile(x)
        return factor * start + (1 - factor) * end

    return decay


def exponential(x: Array, start: Array, end: Array) -> Array:
    """``start (end / start)**x``: linear in the logarithm. Both ends must be > 0."""
    return start * jnp.power(safe_div(end, start), x)


def inverse(x: Array, start: Array, end: Array) -> Array:
    """``1 / (x / end + (1-x) / start)``: linear in the reciprocal. Both ends must be > 0."""
    return safe_div(start * end, x * start + (1 - x) * end, otherwise=start)


RATIO_DECAYS: Mapping[str, Decay] = {"exponential": exponential, "inverse": inverse}
"""Decays that are no profile: they depend on the ratio of start and end."""

DECAYS: Mapping[str, Decay] = {
    **{name: between(profile) for name, profile in PROFILES.items()},
    **RATIO_DECAYS,
}
"""Every decay by name."""


def check_ends(decay: str, **ends: Any) -> None:
    """Raises unless the named end points suit a decay: >= 0, and > 0 where it takes their ratio.

    >>> check_ends("inverse", end_value=0.0)
    Traceback (most recent call last):
    ...
    ValueError: end_value (with decay='inverse') must be > 0, got 0
    """
    check_range(**ends, ge=0)
    if decay in RATIO_DECAYS:
        check_range(**{f"{name} (with {decay=})": value for name, value in ends.items()}, gt=0)


def transition(
    start_value: Any,
    end_value: Any,
    steps: Any,
    decay: str | Decay = "linear",
    *,
    if_empty: Any = 1.0,
) -> optax.Schedule:
    """One phase: from ``start_value`` at count 0 to ``end_value`` at count ``steps``, then hold.

    Args:
      start_value: value at count 0 and before.
      end_value: value at count ``steps`` and beyond.
      steps: length of the phase; <= 0 gives ``end_value`` from count 0 on.
      decay: a name of ``DECAYS``, or a function like theirs.
      if_empty: progress of a phase without length; 0 gives ``start_value`` for good.
    """
    curve = DECAYS[decay] if isinstance(decay, str) else decay

    def schedule(count: Any) -> Array:
        x = progress(count, steps, if_empty=if_empty)
        return curve(x, as_float(start_value), as_float(end_value))

    return schedule
