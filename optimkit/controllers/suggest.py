"""Which rate to try next: a Gaussian process over the rates tried so far."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimkit.numerics import check_count, check_range

FixedKernel = tuple[float, float, float]
"""Variance, length scale and noise, of values that are normalised, over u in [0, 1]."""


def to_unit(rates: Any, min_lr: float, max_lr: float) -> np.ndarray:
    """Rates as u: 0 at ``min_lr``, 1 at ``max_lr``, even in the logarithm."""
    low, high = np.log10(min_lr), np.log10(max_lr)
    return (np.log10(np.asarray(rates, np.float64)) - low) / (high - low)


def from_unit(u: Any, min_lr: float, max_lr: float) -> np.ndarray:
    """The inverse of ``to_unit``; never outside the two bounds."""
    low, high = np.log10(min_lr), np.log10(max_lr)
    return np.clip(10.0 ** (low + np.asarray(u, np.float64) * (high - low)), min_lr, max_lr)


def gp_posterior(
    u: np.ndarray,
    losses: Sequence[float] | np.ndarray,
    at: np.ndarray,
    *,
    kernel: FixedKernel | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a Gaussian process, without the noise of an observation.

    Args:
      u: where losses are known, in [0, 1].
      losses: what they are there; normalised inside.
      at: where to predict.
      kernel: None fits a Matern kernel (nu 2.5; length scale in [0.01, 100], variance in
        [0.01, 1000]) with white noise by maximum likelihood, from three starts; a triple is used as
        it is.
      seed: of the starts.

    Returns:
      Two arrays like ``at``.

    Raises:
      ImportError: without scikit-learn (``optimkit[controllers]``).
    """
    try:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    except ImportError:
        raise ImportError(
            'optimkit.controllers needs scikit-learn: pip install "optimkit[controllers]"',
            name="sklearn",
        ) from None
    y = np.asarray(losses, np.float64)
    if kernel is None:
        signal = ConstantKernel(1.0, (0.01, 1000.0)) * Matern(1.0, (0.01, 100.0), nu=2.5)
        noise: Any = WhiteKernel()
        search: dict[str, Any] = {"n_restarts_optimizer": 2, "random_state": seed}
    else:
        variance, length, level = kernel
        signal = ConstantKernel(variance, "fixed") * Matern(length, "fixed", nu=2.5)
        noise = WhiteKernel(max(level, np.finfo(np.float64).tiny), "fixed")
        search = {"optimizer": None}
    process = GaussianProcessRegressor(signal + noise, normalize_y=True, **search)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hyperparameter at its bound is no failure here
        process.fit(np.reshape(u, (-1, 1)), y)
        mean, deviation = process.predict(np.reshape(at, (-1, 1)), return_std=True)
    spread = np.std(y) or 1.0
    fitted: Any = process.kernel_  # a sum, the noise second
    noisy = np.square(deviation) - fitted.k2.noise_level * spread**2
    return mean, np.sqrt(np.maximum(noisy, 0))


def gp_lcb_suggest(
    lrs: Sequence[float] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    min_lr: float,
    max_lr: float,
    *,
    kappa: Any = 1e6,
    kernel: FixedKernel | None = None,
    num_grid: int = 2001,
    seed: int = 0,
) -> float:
    """The rate whose loss, by a Gaussian process over log rates, may be lowest.

    Minimises ``mean - kappa * deviation`` on a grid, without the rates already tried.

    Args:
      lrs: rates tried, at least one, within the two bounds.
      losses: their losses, finite.
      min_lr: lowest rate, > 0.
      max_lr: highest rate.
      kappa: weight of the deviation, >= 0. The authors' 1e6 means: where least is known; the ends
        of the interval come first.
      kernel: as in ``gp_posterior``.
      num_grid: points of the grid, even in the logarithm, both ends among them; >= 2.
      seed: of the kernel's fit.

    Returns:
      A rate that has not been tried.

    Raises:
      ValueError: if an argument is out of range, or every point of the grid has been tried.
      ImportError: without scikit-learn (``optimkit[controllers]``).

    >>> round(gp_lcb_suggest([0.01], [1.0], 1e-3, 1e-1, kernel=(1.0, 0.3, 0.0)), 6)
    0.001

    Reference: Jin et al., ICLR 2021, arXiv 2105.10762. Agrees with scikit-optimize 0.10, which
    searches at random and then by gradient, to 0.02 in u.
    """
    check_bounds(min_lr, max_lr)
    check_range(lrs=lrs, ge=min_lr, le=max_lr)
    check_range(losses=losses, gt=-np.inf, lt=np.inf)
    check_range(kappa=kappa, ge=0)
    check_count(least=2, num_grid=num_grid)
    if np.size(lrs) == 0 or np.shape(lrs) != np.shape(losses):
        raise ValueError(
            f"lrs and losses must be as many, at least one, got {np.size(lrs)} and "
            f"{np.size(losses)}"
        )
    tried = to_unit(lrs, min_lr, max_lr)
    grid = np.linspace(0, 1, num_grid)
    grid = grid[np.all(np.abs(grid[:, None] - tried) > 1e-9, axis=1)]
    if grid.size == 0:
        raise ValueError(f"num_grid must be > {num_grid}: every point of the grid has been tried")
    mean, deviation = gp_posterior(tried, losses, grid, kernel=kernel, seed=seed)
    return float(from_unit(grid[np.argmin(mean - kappa * deviation)], min_lr, max_lr))


def check_bounds(min_lr: Any, max_lr: Any) -> None:
    """Raises unless 0 < min_lr < max_lr."""
    check_range(min_lr=min_lr, max_lr=max_lr, gt=0, lt=np.inf)
    if not min_lr < max_lr:
        raise ValueError(f"min_lr must be < max_lr, got {min_lr:g} and {max_lr:g}")
