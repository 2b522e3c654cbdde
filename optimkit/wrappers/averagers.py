"""Running averages of parameters: over windows, exponential, and weighted by the step.

An averager works outside any optimizer, on whatever parameters it is fed; ``with_averaged_params``
keeps one inside the optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, zero_count
from optimkit.numerics import (
    as_float,
    check_count,
    check_range,
    compute_dtype,
    hyperparameter_dtype,
    next_count,
    safe_div,
)
from optimkit.protocols import Array, PyTree


class Averager(NamedTuple):
    """``init(params) -> state``; ``update(params, state) -> state``, once a step.

    ``state.value`` is the average, in the averager's own dtype. ``before_step`` tells
    ``with_averaged_params`` which parameters to feed: those before its step, or those after it.
    """

    init: Callable[[PyTree], Any]
    update: Callable[[PyTree, Any], Any]
    before_step: bool = False


class UniformWindowState(NamedTuple):
    """``count``: int32 scalar. ``average``: running mean of the window that is being filled.

    ``latest``: mean of the last full window; before there is one, the running mean.
    """

    count: Array
    average: PyTree
    latest: PyTree

    @property
    def value(self) -> PyTree:
        """The mean of the last full window."""
        return self.latest


class RunningAverageState(NamedTuple):
    """``count``: int32 scalar. ``average``: weighted mean. ``weight_sum``: one f32 scalar."""

    count: Array
    average: PyTree
    weight_sum: Array

    @property
    def value(self) -> PyTree:
        """The weighted mean; the first parameters while the sum of weights is zero."""
        return self.average


def is_averaged(leaf: Any) -> bool:
    """Whether a leaf is a number that can be averaged; others are copied."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def first_average(params: PyTree, dtype: Any = None) -> PyTree:
    """Copies, f32 at least; integer and bool leaves as they are."""

    def one(p: Any) -> Array:
        wide = jnp.promote_types(compute_dtype(p), dtype or jnp.float32)
        # A copy also under jit, so that parameters and state can be donated together.
        return jnp.array(p, wide if is_averaged(p) else jnp.result_type(p), copy=True)

    return jax.tree.map(one, params)


def next_average(rule: Callable[[Array, Array], Array], params: PyTree, average: PyTree) -> PyTree:
    """The rule ``(parameter, average) -> average`` on every leaf; integers: the newest."""
    check_match(params, average, what="parameter", like="the average")

    def one(p: Any, a: Array) -> Array:
        p = jnp.asarray(p, a.dtype)
        return jnp.asarray(rule(p, a), a.dtype) if is_averaged(a) else p

    return jax.tree.map(one, params, average)


def uniform_window_average(*, horizon: int, interval: int = 1) -> Averager:
    r"""The plain mean of the parameters over windows of ``horizon`` steps, each started afresh.

    With the 0-based count k, where k is a multiple of ``interval``:

    .. math:: a \leftarrow (1-c)\,a + c\,w, \qquad
        c = \big(\lfloor (k \bmod H)/I \rfloor + 1\big)^{-1}

    Args:
      horizon: H, steps a window, >= 1.
      interval: I, take every I-th step's parameters; must divide ``horizon``.

    Returns:
      An ``Averager``; 8 bytes a f32 parameter: the window that is being filled, and the last full
      one, which is ``state.value``. Before the first is full, ``value`` is the running mean.

    Raises:
      ValueError: if an argument is out of range.

    On a constant rate the mean of the last window stands in for a decay (Hagele et al.).

    >>> averager = uniform_window_average(horizon=2)
    >>> state = averager.init(jnp.zeros(1))
    >>> for w in (1.0, 3.0, 8.0):
    ...     state = averager.update(jnp.array([w]), state)
    >>> state.value.tolist(), state.average.tolist()
    ([2.0], [8.0])

    Reference: Hagele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations", 2024, arXiv 2405.18392. Agrees with the authors' code.
    """
    check_count(least=1, horizon=horizon, interval=interval)
    if horizon % interval:
        raise ValueError(f"interval must divide horizon, got {interval} and {horizon}")

    def init(params: PyTree) -> UniformWindowState:
        return UniformWindowState(zero_count(), first_average(params), first_average(params))

    def update(params: PyTree, state: UniformWindowState) -> UniformWindowState:
        taken = state.count % interval == 0
        weight = jnp.where(taken, 1 / (as_float(state.count % horizon // interval) + 1), 0)
        count = next_count(state.count)
        full = (count % horizon == 0) | (count < horizon)

        def mean(p: Array, a: Array) -> Array:
            c = weight.astype(jnp.finfo(a.dtype).dtype)
            return jnp.where(taken, (1 - c) * a + c * p, a)

        average = next_average(mean, params, state.average)
        latest = jax.tree.map(lambda a, old: jnp.where(full, a, old), average, state.latest)
        return UniformWindowState(count, average, latest)

    return Averager(init, update)


def weighted_running_average(weight_schedule: Callable[[Any], Any]) -> Averager:
    r"""The mean of all parameters so far, weighted by the step: :math:`\sum w_t\theta_t/\sum w_t`.

    Args:
      weight_schedule: 0-based count -> weight, >= 0. Constant weights give the plain mean.

    Returns:
      An ``Averager``; 4 bytes a f32 parameter.

    Raises:
      TypeError: if ``weight_schedule`` cannot be called.

    >>> averager = weighted_running_average(lambda count: count + 1.0)
    >>> state = averager.init(jnp.zeros(1))
    >>> for w in (2.0, 8.0):  # weights 1 and 2
    ...     state = averager.update(jnp.array([w]), state)
    >>> round(float(state.value[0]), 4)
    6.0
    """
    if not callable(weight_schedule):
        raise TypeError(f"weight_schedule must be a function of the count, got {weight_schedule!r}")

    def init(params: PyTree) -> RunningAverageState:
        weight_sum = jnp.zeros((), hyperparameter_dtype())
        return RunningAverageState(zero_count(), first_average(params), weight_sum)

    def update(params: PyTree, state: RunningAverageState) -> RunningAverageState:
        weight = as_float(weight_schedule(state.count))
        weight_sum = jnp.asarray(state.weight_sum + weight, state.weight_sum.dtype)
        share = safe_div(weight, weight_sum)

        def mean(p: Array, a: Array) -> Array:
            c = share.astype(jnp.finfo(a.dtype).dtype)
            return (1 - c) * a + c * p

        return RunningAverageState(
            next_count(state.count), next_average(mean, params, state.average), weight_sum
        )

    return Averager(init, update)


def sqrt_decay_weights(beta: Any, *, switch_step: Any, decay_steps: Any) -> Callable[[Any], Array]:
    r"""Weights that are constant, then fall as :math:`1-\sqrt x` while the rate decays.

    Args:
      beta: the constant is ``1 - beta``, beta in [0, 1).
      switch_step: first step of the fall.
      decay_steps: its length, > 0; the weight is 0 from there on.

    Returns:
      A function of the 0-based count, for ``weighted_running_average``.

    Raises:
      ValueError: if an argument is out of range.

    Constant weights make a plain mean, not an exponential one, whatever beta is.

    >>> weight = sqrt_decay_weights(0.5, switch_step=2, decay_steps=4)
    >>> [round(float(weight(count)), 4) for count in (0, 1, 2, 3, 6)]
    [0.5, 0.5, 1.0, 0.5, 0.0]
    """
    check_range(beta=beta, ge=0, lt=1)
    check_range(switch_step=switch_step, ge=0)
    check_range(decay_steps=decay_steps, gt=0)

    def weight(count: Any) -> Array:
        since = as_float(count) - as_float(switch_step)
        falling = 1 - jnp.sqrt(jnp.clip(since / as_float(decay_steps), 0, 1))
        return jnp.where(since < 0, 1 - as_float(beta), falling)

    return weight
