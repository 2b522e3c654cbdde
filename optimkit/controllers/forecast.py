"""Where a loss curve is going: an exponential fitted to its first part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from optimkit.numerics import check_range

_ROUNDS = 10
_OUTLIERS = 0.03
_TOLERANCE = 1e-5
_FEWEST = 4  # points that a quadratic does not already pass through


class Forecast(NamedTuple):
    """``predicted = a exp(b horizon) + c``."""

    predicted: float
    a: float
    b: float
    c: float


def drop_outliers(
    losses: Sequence[float] | np.ndarray, *, is_training: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The points of a loss curve that its outlier filter keeps: steps and losses.

    A quadratic spline is fitted, and the points farthest from it are dropped where they lie in the
    first half of the series: ten times 3 % of a training curve, once a single point of a validation
    curve. The second half is never touched, since it decides the forecast.

    Args:
      losses: one a step, at least four.
      is_training: a training curve, or a validation curve.

    Returns:
      The kept steps, counted from 0, and their losses.
    """
    y = np.asarray(losses, np.float64)
    x = np.arange(len(y), dtype=np.float64)
    first_half = (len(y) - 1) // 2
    for _ in range(_ROUNDS if is_training else 1):
        number = round(len(y) * _OUTLIERS) if is_training else 1
        if number == 0 or len(y) <= _FEWEST:
            break
        distance = np.abs(y - _smooth(x, y)(x))
        farthest = np.argsort(distance, kind="stable")[-number:]
        kept = np.setdiff1d(np.arange(len(y)), farthest[farthest < first_half])
        x, y = x[kept], y[kept]
    return x, y


def exponential_forecast(
    losses: Sequence[float] | np.ndarray, *, horizon: Any, is_training: bool = True
) -> Forecast:
    r"""Fits :math:`a e^{bx} + c`, b < 0, to a loss curve, and reads it off at ``horizon``.

    Outliers are dropped (``drop_outliers``), the rest is smoothed by a quadratic spline, and b is
    found by Nelder-Mead on the residual of the linear fit of a and c.

    Args:
      losses: one a step, x = 0, 1, ...; all finite.
      horizon: the step to predict, > 0.
      is_training: a training curve, or a validation curve with one point an evaluation.

    Returns:
      ``Forecast(predicted, a, b, c)``. Where the curve leaves a and c undetermined (it is flat, or
      shorter than four points), and where the prediction is not finite, it is the mean of the last
      ten losses (of the last one, for a validation curve), with a = b = 0.

    Raises:
      ValueError: if there are no losses, one is not finite, or ``horizon`` is out of range.
      ImportError: without SciPy (``optimkit[controllers]``).

    A series of fewer than 17 training losses is not filtered; the authors' code takes all of its
    first half for outliers there, and fails.

    On a clean curve the quadratic in between bends the end down, so that predictions are too low;
    they are there to be compared with one another.

    >>> curve = [1 + 2 * 0.98**step for step in range(100)]  # 1.27 at its end
    >>> round(exponential_forecast(curve, horizon=1000).predicted, 2)
    0.85

    Reference: Jin et al., "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on
    the Fly", ICLR 2021, arXiv 2105.10762. Agrees with the authors' code to the tolerance of the
    search, about 1e-4.
    """
    check_range(horizon=horizon, gt=0, lt=np.inf)
    y = np.asarray(losses, np.float64)
    if y.ndim != 1 or y.size == 0 or not np.all(np.isfinite(y)):
        raise ValueError(f"losses must be finite numbers, at least one, got {list(losses)!r}")
    fitted = None
    if y.size >= _FEWEST:
        x = np.arange(len(y), dtype=np.float64)
        fitted = _fit(x, _smooth(*drop_outliers(y, is_training=is_training))(x))
    if fitted is not None:
        a, b, c = fitted
        predicted = a * np.exp(b * float(horizon)) + c
        if np.isfinite(predicted):
            return Forecast(float(predicted), a, b, c)
    level = float(np.mean(y[-10:] if is_training else y[-1:]))
    return Forecast(level, 0.0, 0.0, level)


def _scipy() -> Any:
    try:
        import scipy.interpolate
        import scipy.optimize
    except ImportError:
        raise ImportError(
            'optimkit.controllers needs SciPy: pip install "optimkit[controllers]"', name="scipy"
        ) from None
    return scipy


def _smooth(x: np.ndarray, y: np.ndarray) -> Any:
    return _scipy().interpolate.UnivariateSpline(x, y, k=2)


def _linear_fit(b: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float, int]:
    """The best a and c for a given b, the squared residual, and the rank."""
    columns = np.stack([np.exp(b * x), np.ones_like(x)], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(columns, y, rcond=None)
    return solution, float(np.sum(np.square(columns @ solution - y))), int(rank)


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float] | None:
    def rate(log_rate: float) -> float:
        return -float(np.exp(np.clip(log_rate, -700, 700)))

    def residual(point: np.ndarray) -> float:
        return _linear_fit(rate(point[0]), x, y)[1]

    found = _scipy().optimize.fmin(residual, 0.0, xtol=_TOLERANCE, ftol=_TOLERANCE, disp=False)
    b = rate(found[0])
    (a, c), _, rank = _linear_fit(b, x, y)
    return (float(a), b, float(c)) if rank == 2 else None
