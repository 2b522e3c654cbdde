"""Gradient disorder: how often the sign of a gradient flips from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.leaves import check_match, check_real, zero_count
from optimkit.numerics import as_float, check_count, compute_dtype, next_count
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class GradientDisorderState(NamedTuple):
    """What the measurement remembers, but for ``count`` one entry a gradient entry.

    ``sign``: of the last gradient, int8. ``flips``: of this window so far, int32. ``disorder``: of
    the last full window, f32 or better; 1 before there was one.
    """

    count: Array
    sign: PyTree
    flips: PyTree
    disorder: PyTree


def gradient_disorder(sign_history: Array) -> Array:
    """The share of steps at which the sign changed, for every entry, in [0, 1].

    Args:
      sign_history: signs (or gradients, whose signs are taken), shape ``(window, ...)``; signs are
        -1, 0 and 1, so that a step from or to 0 is a change, and NaN counts as 0.

    Returns:
      An array of shape ``(...)``: changes over the ``window - 1`` pairs of neighbours.

    Raises:
      ValueError: for fewer than two steps.

    >>> gradient_disorder(jnp.array([[1, 1], [-1, 1], [1, 1]])).tolist()
    [1.0, 0.0]
    """
    if np.ndim(sign_history) == 0 or np.shape(sign_history)[0] < 2:
        raise ValueError(
            f"sign_history must have at least two steps in front, got {np.shape(sign_history)}"
        )
    signs = signs_of(jnp.asarray(sign_history))
    return jnp.mean((signs[1:] != signs[:-1]).astype(jnp.float32), axis=0)


def signs_of(gradient: Array) -> Array:
    """-1, 0 or 1 for every entry, int8; 0 for NaN."""
    return ((gradient > 0).astype(jnp.int8) - (gradient < 0).astype(jnp.int8)).astype(jnp.int8)


def init_disorder(params: PyTree) -> GradientDisorderState:
    """The state before the first gradient."""

    def zeros(dtype: Any) -> PyTree:
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)

    disorder = jax.tree.map(lambda p: jnp.ones_like(p, dtype=compute_dtype(p)), params)
    return GradientDisorderState(zero_count(), zeros(jnp.int8), zeros(jnp.int32), disorder)


def advance_disorder(
    gradients: PyTree, state: GradientDisorderState, window: int
) -> GradientDisorderState:
    """The state after one more gradient; a window that is full is evaluated one step later."""
    place = state.count % window
    full = (place == 0) & (state.count > 0)
    disorder = jax.tree.map(
        lambda d, n: jnp.where(full, (as_float(n) / (window - 1)).astype(d.dtype), d),
        state.disorder,
        state.flips,
    )
    sign = jax.tree.map(signs_of, gradients)
    flips = jax.tree.map(
        lambda n, new, old: jnp.where(place == 0, 0, n + (new != old)).astype(jnp.int32),
        state.flips,
        sign,
        state.sign,
    )
    return GradientDisorderState(next_count(state.count), sign, flips, disorder)


def check_window(window: int) -> None:
    """Raises unless a window holds at least one pair of neighbours."""
    check_count(window=window, least=2)


def track_gradient_disorder(window: int) -> GradientTransformation:
    r"""Measures how often each entry's gradient changes its sign; leaves the updates alone.

    .. math::

        d = \frac{1}{n-1} \sum_{t=2}^{n} \left[\operatorname{sign} g_t \ne
        \operatorname{sign} g_{t-1}\right]

    over windows of n steps that follow one another.

    Args:
      window: steps in a window, n, >= 2.

    Returns:
      A transformation that passes updates on unchanged. Its state's ``disorder`` is that of the
      last full window, brought up to date at the first step after it; 9 bytes a parameter.

    Raises:
      ValueError: if ``window`` is below 2; from ``update``, for gradients of another tree or shape.
      TypeError: for complex or integer leaves.

    Noise gives 1/2, steady descent 0, a parameter that swings across its optimum 1. A sign of 0
    differs from 1 and -1. NaN counts as 0.

    >>> tx = track_gradient_disorder(3)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]):
    ...     _, state = tx.update(jnp.array(g), state)
    >>> state.disorder.tolist()
    [1.0, 0.5]

    Reference: Jiang et al., "GAQAT: Gradient-adaptive Quantization-aware Training for Domain
    Generalization", 2024, arXiv 2412.05551. The paper has no public code; this follows
    descriptions of it.
    """
    check_window(window)

    def init(params: PyTree) -> GradientDisorderState:
        check_real(params, "parameter")
        return init_disorder(params)

    def update(
        updates: PyTree,
        state: GradientDisorderState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, GradientDisorderState]:
        del params, extra
        check_match(updates, state.sign, what="gradient", like="the state")
        check_real(updates, "gradient")
        return updates, advance_disorder(updates, state, window)

    return transformation(init, update)


RECORD = Method(
    factory=track_gradient_disorder,
    kind="piece",
    summary="how often each entry's gradient changes its sign; leaves the updates alone",
    example={"window": 3},
    static=("window",),
    position="any",
    communication="none",
    response="proportional",
    state_bytes=9,
    moved_bytes=22,
    status="provisional",
    paper='Jiang et al., "GAQAT: Gradient-adaptive Quantization-aware Training for Domain '
    'Generalization", 2024, arXiv 2412.05551',
)
