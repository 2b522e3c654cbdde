"""A schedule made from the gradient norms of a finished run."""

from __future__ import annotations

import bisect
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optimkit.numerics import as_float, check_count, check_range
from optimkit.protocols import Array, Method


def _usable(grad_norms: Any) -> np.ndarray:
    """The norms as f64, non-finite ones interpolated, zeros raised to the smallest above zero."""
    norms = np.array(grad_norms, np.float64)
    if norms.ndim != 1 or norms.size == 0:
        raise ValueError(f"grad_norms must have one entry a step, got the shape {norms.shape}")
    if np.any(norms < 0):
        raise ValueError(f"grad_norms must be >= 0, got {np.min(norms):g}")
    good = np.isfinite(norms)
    if not np.any(norms[good] > 0):
        raise ValueError("grad_norms must hold a finite norm above 0, got none")
    places = np.arange(norms.size)
    norms = np.interp(places, places[good], norms[good])
    return np.maximum(norms, np.min(norms[norms > 0]))


def median_filter_norms(grad_norms: Any, filter_fraction: float) -> np.ndarray:
    """A running median, which takes out spikes shorter than half its window.

    Args:
      grad_norms: one norm a step, >= 0. Non-finite ones are interpolated between their neighbours,
        and zeros count as the smallest norm above 0.
      filter_fraction: width of the window over the number of steps, T, in [0, 1]; the width is
        ``2 * (int(filter_fraction * T) // 2) + 1``.

    Returns:
      T norms in f64. The start is extended by its first value, the end by reflection.

    Raises:
      ValueError: if a norm is negative, none is above 0, or the fraction is out of range.

    >>> median_filter_norms([1.0, 9.0, 2.0, 3.0], 0.5).tolist()
    [1.0, 2.0, 3.0, 2.0]
    """
    check_range(filter_fraction=filter_fraction, ge=0, le=1)
    norms = _usable(grad_norms)
    half = int(filter_fraction * norms.size) // 2
    padded = np.pad(np.pad(norms, (half, 0), mode="edge"), (0, half), mode="reflect").tolist()
    # A sorted window, so that long runs cost T log T comparisons and no matrix of windows.
    window = sorted(padded[: 2 * half + 1])
    medians = [window[half]]
    for leaving, entering in zip(padded, padded[2 * half + 1 :], strict=False):
        del window[bisect.bisect_left(window, leaving)]
        bisect.insort(window, entering)
        medians.append(window[half])
    return np.asarray(medians)


def bound_minimizer(weights: np.ndarray) -> np.ndarray:
    r"""``w_t * sum_{p > t} w_p``: what minimizes the bound on the last iterate, up to a factor.

    >>> bound_minimizer(np.array([1.0, 1.0, 2.0])).tolist()
    [3.0, 2.0, 0.0]
    """
    return weights * np.append(np.cumsum(weights[::-1])[::-1][1:], 0.0)


def refine_weights(grad_norms: Any, power: float, filter_fraction: float) -> np.ndarray:
    """The refined schedule as numbers: one a step, the largest 1.

    Args:
      grad_norms: one norm a step, as ``median_filter_norms`` takes them.
      power: 2 with l2 norms for SGD, 1 with l1 norms for Adam; >= 0. 0 is linear decay.
      filter_fraction: as ``median_filter_norms`` takes it; 0 does not smooth.

    Returns:
      T numbers in [0, 1], f64; the last is 0. For a single step it is 1.

    Raises:
      ValueError: if an argument is out of range.

    >>> refine_weights([1.0, 1.0, 1.0], 2.0, 0.0).tolist()
    [1.0, 0.5, 0.0]
    """
    check_range(power=power, ge=0)
    norms = median_filter_norms(grad_norms, filter_fraction)
    if norms.size == 1:
        return np.ones(1)
    # The scale of the norms cancels, and their ratios to the smallest cannot overflow.
    rates = bound_minimizer((np.min(norms) / norms) ** power)
    return rates / np.max(rates)


def refined_schedule(
    grad_norms: Any,
    *,
    peak_value: Any = 1.0,
    power: float = 2.0,
    filter_fraction: float = 0.1,
    total_steps: int | None = None,
) -> optax.Schedule:
    r"""The schedule that a bound on the last iterate calls best, from the norms of an earlier run.

    With :math:`G_t` the norms of the gradients, smoothed by a running median, and
    :math:`w_t = G_t^{-q}`,

    .. math:: \eta_t \propto w_t \sum_{p > t} w_p

    scaled to the largest rate P. Constant norms give linear decay; norms that fall at first give a
    warm-up, and norms that rise at last a steeper end.

    Args:
      grad_norms: one global norm a step of a finished run, over all parameters: the gradient as the
        optimizer saw it, after any clipping (the paper does not say; this is our choice).
        ``record_gradient_norms`` collects them. l2 norms for SGD, l1 norms for Adam.
      peak_value: P, tuned as usual.
      power: q: 2 for SGD, 1 for Adam and its kind; >= 0.
      filter_fraction: width of the median's window over the number of steps, in [0, 1]. 0.1 is the
        authors'.
      total_steps: T of the new run; the norms are interpolated if it has another length.

    Returns:
      A schedule over the 0-based count, a table of T numbers; the last of T updates has rate 0, and
      so has every later one. A run of 0 or 1 steps has the constant rate P. No state.

    Raises:
      ValueError: if a norm is negative, none is above 0, or an argument is out of range.

    Record the norms in a run with linear decay or another schedule that ends low. Where the model
    interpolates its data the norms collapse at the end, the schedule becomes late and peaked, and
    plain linear decay is better.

    >>> rate = refined_schedule([2.0, 1.0, 1.0, 1.0], filter_fraction=0.0)
    >>> [round(float(rate(count)), 3) for count in range(6)]
    [0.375, 1.0, 0.5, 0.0, 0.0, 0.0]

    Reference: Defazio et al., "When, Why and How Much? Adaptive Learning Rate Scheduling by
    Refinement", 2023, arXiv 2310.07831. Agrees with the authors' function to rounding (goldens
    ``refined_schedule__*``).
    """
    check_range(peak_value=peak_value, power=power, ge=0)
    norms = _usable(grad_norms)
    steps = norms.size if total_steps is None else total_steps
    check_count(total_steps=steps)
    if steps != norms.size:
        places = np.linspace(0, 1, max(steps, 1))
        norms = np.interp(places, np.linspace(0, 1, norms.size), norms)
    table = refine_weights(norms, power, filter_fraction)

    def schedule(count: Any) -> Array:
        index = jnp.clip(as_float(count), 0, table.size - 1).astype(jnp.int32)
        return as_float(peak_value) * as_float(table)[index]

    return schedule


RECORD = Method(
    factory=refined_schedule,
    kind="schedule",
    summary="the best schedule for the gradient norms of an earlier run",
    example={
        "grad_norms": tuple(1 + 0.1 * (t % 7) + 2.0 / (1 + t) for t in range(90)),
        "peak_value": 1e-3,
    },
    traced=("peak_value",),
    static=("grad_norms", "power", "filter_fraction", "total_steps"),
    paper='Defazio et al., "When, Why and How Much? Adaptive Learning Rate Scheduling by '
    'Refinement", 2023, arXiv 2310.07831',
    reference="facebookresearch/adaptive_scheduling@37a8a9ba057089a6cf4937c579cc1764cea14184:"
    "find_schedule.py:find_closed_form_schedule",
    licence="CC-BY-NC-4.0",
)
