"""A larger batch: scale the rate, stretch the schedule, and keep the number of updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from optimkit.numerics import as_float, check_choice, check_count, check_range
from optimkit.protocols import Array, Method, ScalarOrSchedule
from optimkit.schedules.linear import scale_schedule
from optimkit.schedules.phases import check_budgets, constant, each, join

RULES = ("sqrt", "linear", "none")


def _factor(batch_size: Any, base_batch_size: Any, rule: str) -> Array:
    ratio = as_float(batch_size) / as_float(base_batch_size)
    return {"sqrt": jnp.sqrt, "linear": jnp.asarray, "none": jnp.ones_like}[rule](ratio)


def scale_lr_for_batch(
    lr_or_schedule: ScalarOrSchedule,
    batch_size: Any,
    *,
    base_batch_size: Any = 256,
    rule: Literal["sqrt", "linear", "none"] = "sqrt",
) -> Any:
    r"""Scales a rate, or a schedule, from the batch size that it was tuned with to another.

    .. math:: \eta \leftarrow \eta \sqrt{B/B_0} \quad\text{or}\quad \eta \leftarrow \eta\, B/B_0

    The covariance of an SGD update goes as :math:`\eta^2/B`: the square root keeps it.

    Args:
      lr_or_schedule: a rate >= 0, or a schedule over the 0-based count.
      batch_size: B, > 0.
      base_batch_size: :math:`B_0`, > 0. 256 is the authors' code's; its help text says 128.
      rule: ``sqrt``, the paper's; ``linear``; or ``none``.

    Returns:
      A schedule if given one; a number if given a number.

    Raises:
      ValueError: if an argument is out of range, or the rule is unknown.

    Weight decay is not scaled. The authors clip the gradient's norm at 5 in all runs.

    >>> float(scale_lr_for_batch(1.0, 1024)), float(scale_lr_for_batch(1.0, 1024, rule="linear"))
    (2.0, 4.0)

    Reference: Hoffer et al., "Train longer, generalize better: closing the generalization gap in
    large batch training of neural networks", NeurIPS 2017, arXiv 1705.08741. Agrees with the
    authors' code to rounding, through ``adapt_regime`` (golden ``large_batch_regime__sqrt_lr``).
    """
    check_choice(RULES, rule=rule)
    check_range(batch_size=batch_size, base_batch_size=base_batch_size, gt=0)
    check_range(lr_or_schedule=lr_or_schedule, ge=0)
    if not callable(lr_or_schedule):
        return as_float(lr_or_schedule) * _factor(batch_size, base_batch_size, rule)

    def scaled(count: Any) -> Array:
        factor = _factor(batch_size, base_batch_size, rule)
        return scale_schedule(lr_or_schedule, factor)(count)

    return scaled


def stretch_schedule(schedule: optax.Schedule, factor: Any) -> optax.Schedule:
    r"""The same curve over ``factor`` times as many steps.

    .. math:: \eta(c) = s(c / f)

    Args:
      schedule: any function of the 0-based count. It is given floats.
      factor: f, > 0. Below 1 the curve is shortened.

    Returns:
      A schedule over the 0-based count. No state.

    Raises:
      ValueError: if ``schedule`` is no function, or the factor is not above 0.

    A batch r times as large makes 1/r as many updates an epoch: over r times as many epochs the
    number of updates, and the schedule over them, stay as they were; over the same epochs it is
    ``stretch_schedule(schedule, 1 / r)``.

    >>> import optax
    >>> rate = stretch_schedule(optax.linear_schedule(1.0, 0.0, 2), 2)
    >>> [float(rate(count)) for count in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]

    Reference: Hoffer et al., NeurIPS 2017, arXiv 1705.08741; the general form is ours.
    """
    if not callable(schedule):
        raise ValueError(f"schedule must be a function of the count, got {schedule!r}")
    check_range(factor=factor, gt=0)

    def stretched(count: Any) -> Array:
        return as_float(schedule(as_float(count) / as_float(factor)))

    return stretched


class Regime(NamedTuple):
    """A step schedule in epochs; called with an epoch it gives its rate.

    Attributes:
      boundaries: epochs at whose start the rate changes, increasing.
      values: rates, one more than boundaries.
      num_epochs: length of the training.
    """

    boundaries: tuple[int, ...]
    values: tuple[Any, ...]
    num_epochs: int

    def __call__(self, epoch: Any) -> Array:
        """The rate of an epoch, counted from 0."""
        return self.schedule(1)(epoch)

    def schedule(self, steps_per_epoch: Any) -> optax.Schedule:
        """The rate over the 0-based count of updates.

        Args:
          steps_per_epoch: updates in an epoch, > 0: ``ceil(examples / batch_size)``.

        Returns:
          A schedule over the 0-based count. No state.

        Raises:
          ValueError: if ``steps_per_epoch`` is not above 0.
        """
        check_range(steps_per_epoch=steps_per_epoch, gt=0)
        starts = (0, *(epoch * steps_per_epoch for epoch in self.boundaries))
        return join(*zip(starts, map(constant, self.values), strict=True))


def adapt_regime(
    boundaries: Sequence[int],
    values: Sequence[Any],
    num_epochs: int,
    *,
    batch_size: int,
    base_batch_size: int = 256,
    lr_rule: Literal["sqrt", "linear", "none"] = "sqrt",
    adapt_epochs: bool = True,
) -> Regime:
    r"""A step schedule in epochs, adapted to a larger batch: as many updates, larger rates.

    The gap that large batches leave comes from too few updates. With :math:`r = B/B_0`, the rates
    are scaled as ``scale_lr_for_batch`` does, and boundaries and epochs are multiplied by
    :math:`\lceil r \rceil`.

    Args:
      boundaries: epochs at whose start the rate changes, increasing, > 0; may be empty.
      values: rates, one more than boundaries, >= 0.
      num_epochs: length of the training, >= 0.
      batch_size: B, an integer >= 1.
      base_batch_size: :math:`B_0`, an integer >= 1.
      lr_rule: ``sqrt``, the paper's; ``linear``; or ``none``.
      adapt_epochs: whether to multiply the epochs; False leaves all in their places, and makes
        1/r as many updates.

    Returns:
      ``(boundaries, values, num_epochs)``; its ``schedule(steps_per_epoch)`` counts updates.

    Raises:
      ValueError: if boundaries do not increase, the number of values is wrong, or a value is out of
        range.

    A batch below :math:`B_0` keeps its epochs and scales its rates down. For r that is no integer
    there are up to :math:`\lceil r \rceil / r` times as many updates, as in the authors' code.

    >>> regime = adapt_regime([81, 122], [0.1, 0.01, 0.001], 164, batch_size=1024)
    >>> regime.boundaries, [round(float(v), 4) for v in regime.values], regime.num_epochs
    ((324, 488), [0.2, 0.02, 0.002], 656)
    >>> rate = regime.schedule(steps_per_epoch=49)
    >>> [round(float(rate(count)), 4) for count in (324 * 49 - 1, 324 * 49)]
    [0.2, 0.02]

    Reference: Hoffer et al., NeurIPS 2017, arXiv 1705.08741. Agrees with the authors' code to
    rounding (goldens ``large_batch_regime__{sqrt_lr,regime_adaptation}``).
    """
    check_choice(RULES, lr_rule=lr_rule)
    check_count(batch_size=batch_size, base_batch_size=base_batch_size, least=1)
    check_count(num_epochs=num_epochs)
    epochs = check_budgets(boundaries, name="boundaries") if len(boundaries) else ()
    if len(values) != len(epochs) + 1:
        raise ValueError(
            f"values must be one more than boundaries, {len(epochs) + 1}, got {len(values)}"
        )
    check_range(**each("values", values), ge=0)
    multiplier = -(-batch_size // base_batch_size) if adapt_epochs else 1
    scaled = tuple(
        scale_lr_for_batch(value, batch_size, base_batch_size=base_batch_size, rule=lr_rule)
        for value in values
    )
    return Regime(tuple(multiplier * b for b in epochs), scaled, multiplier * num_epochs)


_PAPER = (
    'Hoffer et al., "Train longer, generalize better: closing the generalization gap in large '
    'batch training of neural networks", NeurIPS 2017, arXiv 1705.08741'
)
_REFERENCE = "eladhoffer/bigBatch@0c69f288a6172a292aad2719e985a4eb80b8e33a:main_normal.py"

RECORDS = (
    Method(
        factory=scale_lr_for_batch,
        kind="schedule",
        summary="a rate or schedule, scaled to another batch size",
        example={"batch_size": 1024},
        example_made={"lr_or_schedule": lambda: optax.cosine_decay_schedule(1e-3, 90)},
        traced=("lr_or_schedule", "batch_size", "base_batch_size"),
        static=("rule",),
        paper=_PAPER,
        reference=_REFERENCE,
        licence="MIT",
    ),
    Method(
        factory=stretch_schedule,
        kind="schedule",
        summary="the same curve over more or fewer steps",
        example={"factor": 3.0},
        example_made={"schedule": lambda: optax.cosine_decay_schedule(1e-3, 30)},
        traced=("factor",),
        static=("schedule",),
        paper=_PAPER,
    ),
)
