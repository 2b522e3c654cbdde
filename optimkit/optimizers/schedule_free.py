"""Schedule-free SGD, AdamW and RAdam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from optimkit.numerics import check_choice, check_range, next_count, one_minus_power
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Mask,
    Method,
    ScalarOrSchedule,
)
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.rectify import rectification
from optimkit.transforms.rms_direction import rms_direction
from optimkit.wrappers.schedule_free import schedule_free, schedule_free_recomputed

BIAS_CORRECTIONS = ("second_moment", "learning_rate")


def _times(learning_rate: ScalarOrSchedule, factor: Callable[[Array], Array]) -> ScalarOrSchedule:
    """A rate times a factor of the 1-based count, as a schedule: it weighs in the average too."""

    def schedule(count: Array) -> Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return rate * factor(next_count(count))

    return schedule


def schedule_free_sgd(
    learning_rate: ScalarOrSchedule = 1.0,
    b1: Any = 0.9,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    warmup_steps: int = 0,
    r: Any = 0.0,
    weight_lr_power: Any = 2.0,
    z_dtype: Any = None,
    keep_average: bool = False,
) -> GradientTransformation:
    r"""SGD whose path is averaged online, in place of momentum and of a decaying rate.

    .. math::

        u_k &= g(y_k) + \lambda y_k, \qquad z_{k+1} = z_k - \eta_k u_k \\
        x_{k+1} &= (1-c_k)\, x_k + c_k z_{k+1}, \qquad
            y_{k+1} = b_1 x_{k+1} + (1-b_1)\, z_{k+1}

    The loop holds y; evaluate and ship x = ``schedule_free_eval_params(opt_state, params)``. The
    weights c and the arguments not listed here are those of ``schedule_free``.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. The default 1.0 is the
        authors'; they advise 10 to 50 times the rate of a scheduled SGD.
      b1: weight of x in y, in (0, 1); their argument ``momentum``.
      weight_decay: decay at y, added to the gradient, so the rate multiplies it.
      mask: which leaves are decayed (True = decayed); default all.
      warmup_steps: steps of linear warm-up; advised.
      r: power of the step in the averaging weight.
      weight_lr_power: power of the largest rate so far in the averaging weight.
      z_dtype: dtype of z, at least f32.
      keep_average: keep x too, for parameters in bfloat16 or float16.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter. The update is
      proportional to the gradient: float16 parameters overflow where rate times gradient does.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The README's formula has c = 1/(k+1); with warm-up or a schedule the code, and this, weigh by
    the squared largest rate.

    >>> import jax.numpy as jnp, optax
    >>> tx = schedule_free_sgd(0.1)
    >>> params = jnp.array([1.0])
    >>> updates, state = tx.update(jnp.array([2.0]), tx.init(params), params)
    >>> [round(float(p), 3) for p in optax.apply_updates(params, updates)]
    [0.8]

    Reference: Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682. Agrees
    with the authors' ``SGDScheduleFree``.
    """
    check_range(weight_decay=weight_decay, ge=0)
    return schedule_free(
        decayed_weights(weight_decay, mask),
        learning_rate,
        b1,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        z_dtype=z_dtype,
        keep_average=keep_average,
    )


def schedule_free_adamw(
    learning_rate: ScalarOrSchedule = 0.0025,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    warmup_steps: int = 0,
    r: Any = 0.0,
    weight_lr_power: Any = 2.0,
    bias_correction: Literal["second_moment", "learning_rate"] = "second_moment",
    z_dtype: Any = None,
    keep_average: bool = False,
) -> GradientTransformation:
    r"""AdamW whose path is averaged online, in place of a first moment and of a decaying rate.

    .. math::

        v_k &= b_2 v_{k-1} + (1-b_2)\, g(y_k)^2, \qquad
            u_k = \frac{g(y_k)}{\sqrt{v_k/(1-b_2^{k+1})} + \epsilon} + \lambda y_k \\
        z_{k+1} &= z_k - \eta_k u_k, \qquad x_{k+1} = (1-c_k)\, x_k + c_k z_{k+1}, \qquad
            y_{k+1} = b_1 x_{k+1} + (1-b_1)\, z_{k+1}

    The loop holds y; evaluate and ship x = ``schedule_free_eval_params(opt_state, params)``. The
    weights c and the arguments not listed here are those of ``schedule_free``.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. The default is the authors';
        they advise 1 to 10 times the rate of a scheduled AdamW.
      b1: weight of x in y, in (0, 1); 0.95 to 0.98 for long runs.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      weight_decay: decay at y, times the rate. Decay at z, which only the authors' reference class
        has, is left out: there is neither a formula nor a recording of it.
      mask: which leaves are decayed (True = decayed); default all.
      warmup_steps: steps of linear warm-up; advised.
      r: power of the step in the averaging weight; their AlgoPerf submission had 0.5, the default
        is 0, and by their word it makes little difference.
      weight_lr_power: power of the largest rate so far in the averaging weight.
      bias_correction: ``"second_moment"`` as above; ``"learning_rate"`` leaves v as it is and
        multiplies the rate by ``sqrt(1 - b2^(k+1))``, hence decay and averaging weights too. That
        is the paper's form, their class ``AdamWScheduleFreePaper``.
      z_dtype: dtype of z, at least f32.
      keep_average: keep x too, for parameters in bfloat16 or float16.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, as AdamW.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    >>> import jax.numpy as jnp, optax
    >>> tx = schedule_free_adamw(0.1)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([5.0, -0.1]), tx.init(params), params)
    >>> [round(float(p), 3) for p in optax.apply_updates(params, updates)]
    [0.9, 1.1]

    Reference: Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682. Agrees
    with the authors' ``AdamWScheduleFree`` and ``AdamWScheduleFreePaper``.
    """
    check_range(learning_rate=learning_rate, eps=eps, weight_decay=weight_decay, ge=0)
    check_range(b2=b2, ge=0, lt=1)
    check_choice(BIAS_CORRECTIONS, bias_correction=bias_correction)
    corrected = bias_correction == "second_moment"
    if not corrected:
        learning_rate = _times(learning_rate, lambda count: jnp.sqrt(one_minus_power(b2, count)))
    return schedule_free_recomputed(
        *rms_direction(b2, eps, weight_decay, mask, corrected=corrected),
        learning_rate,
        b1,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        z_dtype=z_dtype,
        keep_average=keep_average,
    )


def schedule_free_radam(
    learning_rate: ScalarOrSchedule = 0.0025,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    r: Any = 0.0,
    weight_lr_power: Any = 2.0,
    silent_sgd_phase: bool = True,
    z_dtype: Any = None,
    keep_average: bool = False,
) -> GradientTransformation:
    r"""Schedule-free AdamW with RAdam's rectification in place of a warm-up.

    As ``schedule_free_adamw``, with the rate :math:`\eta(k)\, q_k` where q is RAdam's factor (see
    ``optimkit.transforms.rectify``) once rho > 4. Before that, for the first four steps at
    b2 = 0.999, the direction is the plain gradient, and the rate is zero (silent) or full.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. The default is the authors'.
      b1: weight of x in y, in (0, 1).
      b2: decay of the second moment, in (0.6, 1): below, rho never passes 4 and no step is taken.
      eps: added to the root, >= 0.
      weight_decay: decay at y, times the rate.
      mask: which leaves are decayed (True = decayed); default all.
      r: power of the step in the averaging weight.
      weight_lr_power: power of the largest rate so far in the averaging weight. With 0 the silent
        steps, in which nothing moves, weigh like the others.
      silent_sgd_phase: take no steps while rho <= 4; False takes SGD steps at the full rate.
      z_dtype: dtype of z, at least f32.
      keep_average: keep x too, for parameters in bfloat16 or float16.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, as AdamW. Its update is
      bounded, except for the first steps when they are not silent.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    >>> import jax.numpy as jnp
    >>> tx = schedule_free_radam(0.1)
    >>> params = jnp.array([1.0]); state = tx.init(params)
    >>> moved = []
    >>> for _ in range(5):
    ...     updates, state = tx.update(jnp.array([1.0]), state, params)
    ...     moved.append(bool(updates[0] != 0))
    >>> moved
    [False, False, False, False, True]

    Reference: Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682. Agrees
    with the authors' ``RAdamScheduleFree``.
    """
    check_range(learning_rate=learning_rate, eps=eps, weight_decay=weight_decay, ge=0)
    check_range(b2=b2, gt=0.6, lt=1)

    def factor(count: Array) -> Array:
        trust, rho = rectification(b2, count)
        return trust if silent_sgd_phase else jnp.where(rho > 4, trust, 1)

    return schedule_free_recomputed(
        *rms_direction(b2, eps, weight_decay, mask, rectified=True),
        _times(learning_rate, factor),
        b1,
        r=r,
        weight_lr_power=weight_lr_power,
        z_dtype=z_dtype,
        keep_average=keep_average,
    )


_REPOSITORY = "facebookresearch/schedule_free@70785b53e778d0e872c0bbb75ff4ee54ee10c291"
_PAPER = 'Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682'
_AVERAGING = ("r", "weight_lr_power")
_STATIC = ("mask", "z_dtype", "keep_average")

RECORDS = (
    Method(
        factory=schedule_free_sgd,
        kind="recipe",
        summary="SGD averaged online in place of momentum and schedule",
        example={"learning_rate": 0.1, "weight_decay": 0.1, "warmup_steps": 2},
        traced=("learning_rate", "b1", "weight_decay", *_AVERAGING),
        static=(*_STATIC, "warmup_steps"),
        needs=("params",),
        position="alone",
        communication="none",
        response="proportional",
        state_bytes=4,
        moved_bytes=20,
        paper=_PAPER,
        reference=f"{_REPOSITORY}:schedulefree/sgd_schedulefree.py:SGDScheduleFree",
        licence="Apache-2.0",
    ),
    Method(
        factory=schedule_free_adamw,
        kind="recipe",
        summary="AdamW averaged online in place of first moment and schedule",
        example={"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 2},
        traced=("learning_rate", "b1", "b2", "eps", "weight_decay", *_AVERAGING),
        static=(*_STATIC, "warmup_steps", "bias_correction"),
        needs=("params",),
        position="alone",
        communication="none",
        response="bounded",
        state_bytes=8,
        moved_bytes=28,
        paper=_PAPER,
        reference=f"{_REPOSITORY}:schedulefree/adamw_schedulefree.py:AdamWScheduleFree",
        licence="Apache-2.0",
    ),
    Method(
        factory=schedule_free_radam,
        kind="recipe",
        summary="schedule-free AdamW with RAdam's rectification in place of warm-up",
        # Not silent, so that the first steps, which the suite looks at, move something.
        example={"learning_rate": 1e-2, "weight_decay": 0.1, "silent_sgd_phase": False},
        traced=("learning_rate", "b1", "b2", "eps", "weight_decay", *_AVERAGING),
        static=(*_STATIC, "silent_sgd_phase"),
        needs=("params",),
        position="alone",
        communication="none",
        response="proportional",
        state_bytes=8,
        moved_bytes=28,
        paper=_PAPER,
        reference=f"{_REPOSITORY}:schedulefree/radam_schedulefree.py:RAdamScheduleFree",
        licence="Apache-2.0",
    ),
)
