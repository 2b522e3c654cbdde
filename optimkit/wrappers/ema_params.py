"""An exponential average of the parameters; also the teacher of a student."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import zero_count
from optimkit.numerics import (
    as_float,
    check_choice,
    check_count,
    check_range,
    hyperparameter_dtype,
    next_count,
    safe_div,
)
from optimkit.protocols import Array, PyTree
from optimkit.wrappers.averagers import Averager, first_average, is_averaged, next_average


class EmaParamsState(NamedTuple):
    """``count``: int32 scalar. ``average``: as accumulated. ``weight_sum``: its total weight.

    The weight is less than one only with ``debias``.
    """

    count: Array
    average: PyTree
    weight_sum: Array

    @property
    def value(self) -> PyTree:
        """The average over its total weight; zero while that is zero."""
        return jax.tree.map(
            lambda x: (
                jnp.asarray(safe_div(x, self.weight_sum.astype(x.dtype)), x.dtype)
                if is_averaged(x)
                else x
            ),
            self.average,
        )


def ema_params(
    momentum: Any,
    *,
    every: int = 1,
    start_step: int = 0,
    update_before_step: bool = False,
    init: Literal["params", "zeros"] = "params",
    debias: bool = False,
    accumulator_dtype: Any = None,
) -> Averager:
    r"""An exponential moving average of the parameters; also the teacher of a student.

    With the 0-based count k and the start s:

    .. math:: a \leftarrow w \;(k = s), \qquad
        a \leftarrow m\,a + (1-m)\,w \;(k > s,\; k \bmod E = 0)

    Args:
      momentum: m, in [0, 1], or a schedule, read at the count before it is raised. Published
        values: 0.995 (ALBEF), 0.999 (CoCoSoDa, MoCo), 0.95 every 10 steps (Hagele et al.). 1
        freezes the average, 0 copies. A teacher's cosine from m0 to 1 in T steps is
        ``lambda k: 1 - optax.cosine_decay_schedule(1 - m0, T)(k)``.
      every: E, >= 1; the grid is k mod E, not counted from the start.
      start_step: s, >= 0; before it the average stays as it began.
      update_before_step: feed ``with_averaged_params`` the parameters that the gradient was taken
        at, not those after the step: the teacher of ALBEF and CoCoSoDa, which is renewed inside the
        forward pass. The loss of a step with such a teacher needs it before the optimizer runs:
        call ``update`` and read ``value`` there, outside the optimizer.
      init: ``"params"`` begins as a copy, and copies again at the start; ``"zeros"`` begins at zero
        and averages at the start, too.
      debias: divide by the total weight, :math:`1-\prod m`; needs ``init="zeros"``.
      accumulator_dtype: dtype of the average, at least that of the parameters and f32.

    Returns:
      An ``Averager``; 4 bytes a f32 parameter.

    Raises:
      ValueError: if an argument is out of range.

    Integer and bool leaves are copied from the newest parameters.

    >>> averager = ema_params(0.75)
    >>> state = averager.init(jnp.zeros(1))
    >>> for w in (2.0, 6.0):
    ...     state = averager.update(jnp.array([w]), state)
    >>> state.value.tolist()
    [3.0]

    Reference: Li et al., "Align before Fuse", NeurIPS 2021, arXiv 2107.07651 (ALBEF); Hagele et
    al., 2024, arXiv 2405.18392. Agrees with the code of both.
    """
    check_range(momentum=momentum, ge=0, le=1)
    check_count(least=1, every=every)
    check_count(start_step=start_step)
    check_choice(("params", "zeros"), init=init)
    if debias and init != "zeros":
        raise ValueError("debias needs init='zeros': a copy of the parameters has no bias")
    from_params = init == "params"

    def init_state(params: PyTree) -> EmaParamsState:
        average = first_average(params, accumulator_dtype)
        if not from_params:
            average = jax.tree.map(lambda a: jnp.zeros_like(a) if is_averaged(a) else a, average)
        weight_sum = jnp.asarray(0.0 if debias else 1.0, hyperparameter_dtype())
        return EmaParamsState(zero_count(), average, weight_sum)

    def update(params: PyTree, state: EmaParamsState) -> EmaParamsState:
        k = state.count
        keep = as_float(momentum(k) if callable(momentum) else momentum)
        if from_params:
            keep = jnp.where(k == start_step, 0, keep)
        active = (k == start_step) | ((k > start_step) & (k % every == 0))

        def mean(p: Array, a: Array) -> Array:
            m = keep.astype(jnp.finfo(a.dtype).dtype)
            return jnp.where(active, m * a + (1 - m) * p, a)

        weight_sum = state.weight_sum
        if debias:
            weight_sum = jnp.where(active, keep * weight_sum + (1 - keep), weight_sum)
        return EmaParamsState(
            next_count(k),
            next_average(mean, params, state.average),
            jnp.asarray(weight_sum, keep.dtype),
        )

    return Averager(init_state, update, before_step=update_before_step)
