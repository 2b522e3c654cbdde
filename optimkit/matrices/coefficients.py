"""Newton-Schulz coefficients by matrix size: the published table, and how to fit further ones."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from optimkit.matrices.newton_schulz import KELLER, NsCoeffs, Triple, ns_triples
from optimkit.numerics import check_choice, check_count, check_range

CoeffTable: TypeAlias = Mapping[Any, NsCoeffs]
"""``{(smaller side, larger side): coefficients}``; a key may also be text, such as ``"64x256"``."""

ROOT_COEFFS: Mapping[tuple[int, int], Triple] = types.MappingProxyType(
    {
        (2048, 2048): (3.4916, -4.8224, 2.1095),
        (2048, 3072): (3.4509, -4.5790, 1.9325),
        (2048, 8192): (2.9794, -3.6674, 1.6207),
        (2048, 16384): (3.1943, -3.8221, 1.5322),
    }
)
"""All that the authors of ROOT published; each triple serves all five steps."""

OBJECTIVES = ("mse", "minimax")
POWERS = (0.25, 0.5, 1.0)
"""Spectra of real momenta fall about like one of these powers of the index."""

LARGEST = 1.3
"""A triple that lets any singular value in [0, 1] end above this is refused."""

POINTS = 512
RESTARTS = 5

_Spectrum: TypeAlias = npt.NDArray[np.float64]


def coefficients_by_size(
    table: CoeffTable, fallback: NsCoeffs, steps: int
) -> Callable[[int, int], NsCoeffs]:
    """The table as a function of the two sides, in either order; ``fallback`` for other sizes.

    Raises:
      ValueError: for a key that is no size, or coefficients that do not fit ``steps``.

    >>> find = coefficients_by_size({"2x8": (2.0, -1.5, 0.5)}, KELLER, 5)
    >>> find(8, 2), find(3, 3) == KELLER
    ((2.0, -1.5, 0.5), True)
    """
    sizes: dict[tuple[int, int], NsCoeffs] = {}
    for key, given in table.items():
        size = _size(key)
        try:
            ns_triples(given, steps, *size)
        except ValueError as error:
            raise ValueError(f"coeff_table[{key!r}]: {error}") from error
        sizes[size] = given
    try:
        ns_triples(fallback, steps)
    except ValueError as error:
        raise ValueError(f"fallback_coeffs: {error}") from error

    def find(rows: int, cols: int) -> NsCoeffs:
        return sizes.get((min(rows, cols), max(rows, cols)), fallback)

    return find


def _size(key: Any) -> tuple[int, int]:
    parts = key.split("x") if isinstance(key, str) else key
    try:
        first, second = (int(part) for part in parts)
    except (TypeError, ValueError):
        first = second = 0
    if min(first, second) < 1:
        raise ValueError(
            f"coeff_table: a key must be two sides, such as (64, 256) or '64x256', got {key!r}"
        )
    return min(first, second), max(first, second)


# ---------------------------------------------------------------------------------------------
# Spectra, and what the iteration makes of them
# ---------------------------------------------------------------------------------------------


def gaussian_spectrum(m: int, n: int, points: int = POINTS) -> _Spectrum:
    """Singular values of a large Gaussian m x n matrix over its Frobenius norm, ascending.

    Quantiles of the Marchenko-Pastur law, so that no matrix is decomposed; ``points`` of them
    stand for the min(m, n) values.

    >>> values = gaussian_spectrum(64, 256)
    >>> [round(float(v) * 8, 2) for v in (values[0], values[-1])]  # near 1 -+ sqrt(64 / 256)
    [0.51, 1.49]
    """
    rows, cols = min(m, n), max(m, n)
    y = rows / cols
    # An eigenvalue is 1 + y + 2 sqrt(y) cos(theta): smooth in theta, also where y is 1.
    theta = (np.arange(8192) + 0.5) * np.pi / 8192
    value = 1 + y + 2 * np.sqrt(y) * np.cos(theta)
    weight = np.square(np.sin(theta)) / value
    below = np.cumsum(weight[::-1]) - weight[::-1] / 2
    wanted = (np.arange(points) + 0.5) / points * np.sum(weight)
    return _normalized(np.interp(wanted, below, np.sqrt(value[::-1])), rows)


def power_spectrum(m: int, n: int, power: float) -> _Spectrum:
    """Singular values that fall like ``index ** -power``, over their norm, descending."""
    rows = min(m, n)
    return _normalized(np.arange(1, rows + 1, dtype=np.float64) ** -power, rows)


def orthogonality_error(coeffs: NsCoeffs, spectrum: npt.ArrayLike, steps: int = 5) -> float:
    r"""The mean of :math:`(s^2 - 1)^2` over singular values, after Newton-Schulz.

    Args:
      coeffs: the coefficients, see ``ns_triples``.
      spectrum: singular values of a matrix over its Frobenius norm.
      steps: Newton-Schulz steps.

    >>> orthogonality_error((1.5, -0.5, 0.0), [1.0, 0.0])
    0.5
    """
    values = _iterated(ns_triples(coeffs, steps), np.asarray(spectrum, np.float64))
    return float(np.mean(np.square(np.square(values) - 1)))


def _normalized(values: _Spectrum, number: int) -> _Spectrum:
    """Values that stand for ``number`` of them, over their norm."""
    return values / np.sqrt(number * np.mean(np.square(values)))


def _iterated(triples: Sequence[Triple], values: _Spectrum) -> _Spectrum:
    for a, b, c in triples:
        square = np.square(values)
        values = values * (a + square * (b + c * square))
    return values


# ---------------------------------------------------------------------------------------------
# Fitting
# ---------------------------------------------------------------------------------------------


def fit_ns_coefficients(
    m: int,
    n: int,
    steps: int = 5,
    *,
    spectra: Sequence[npt.ArrayLike] | None = None,
    mixture: float = 0.75,
    objective: Literal["mse", "minimax"] = "mse",
) -> Triple:
    r"""The triple (a, b, c) whose Newton-Schulz steps are best for m x n matrices.

    .. math::

        \min_{a,b,c}\; w\,E(\text{Gaussian}) + (1-w) \operatorname{mean}_k E(\text{spectrum}_k),
        \qquad E = \operatorname{mean}_i (s_i^2 - 1)^2

    where s are the singular values after all steps, which use the same triple. The search is
    Nelder and Mead's, from the usual triple (3.4445, -4.7750, 2.0315), in NumPy and f64; it takes
    less than a second, offline, and its results go into the table of ``root``.

    Args:
      m: one side of the matrix, >= 1.
      n: the other side; the order does not matter.
      steps: Newton-Schulz steps, >= 1.
      spectra: singular values of recorded momenta, one array a matrix, of any scale. Default:
        values that fall like the index to the power -1/4, -1/2 and -1.
      mixture: w, in [0, 1]; 1 fits random matrices alone.
      objective: ``"mse"`` as above; ``"minimax"``: the largest E among all spectra, without w.

    Returns:
      The triple. No singular value that it is given ends above 1.3.

    Raises:
      ValueError: if an argument is out of range, or a spectrum is no list of finite numbers.

    The authors of ROOT published four triples and no program that finds them; this procedure is
    ours. Fitted to random matrices alone, its triples have 0.7 to 0.02 of the published ones' error
    on those; the published ones serve wider spectra, too, as the default mixture does.

    >>> random_only = fit_ns_coefficients(2048, 8192, mixture=1.0)
    >>> spectrum = gaussian_spectrum(2048, 8192)
    >>> orthogonality_error(random_only, spectrum) < orthogonality_error(KELLER, spectrum) / 100
    True

    Reference: after He et al., "ROOT: Robust Orthogonalized Optimizer for Neural Network
    Training", 2025, arXiv 2511.20626.
    """
    check_count(m=m, n=n, steps=steps, least=1)
    check_range(mixture=mixture, ge=0, le=1)
    check_choice(OBJECTIVES, objective=objective)
    recorded = None if spectra is None else tuple(_recorded(values) for values in spectra)
    return _fit(min(m, n), max(m, n), steps, recorded, float(mixture), objective)


def _recorded(values: npt.ArrayLike) -> tuple[float, ...]:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.all(np.isfinite(values)) or not np.any(values):
        raise ValueError(
            f"spectra must be lists of finite singular values, not all zero, got {values!r}"
        )
    return tuple(_normalized(np.abs(values), len(values)).tolist())


@functools.cache
def _fit(
    rows: int,
    cols: int,
    steps: int,
    recorded: tuple[tuple[float, ...], ...] | None,
    mixture: float,
    objective: str,
) -> Triple:
    heavy = [np.asarray(values) for values in recorded or ()]
    if recorded is None:
        heavy = [power_spectrum(rows, cols, power) for power in POWERS]
    spectra = [gaussian_spectrum(rows, cols), *heavy]
    weights = [1.0] if not heavy else [mixture, *([(1 - mixture) / len(heavy)] * len(heavy))]
    # Every singular value of a normalised matrix lies here, also one that no spectrum has.
    everywhere = np.linspace(0.0, 1.0, 513)

    def loss(point: _Spectrum) -> float:
        a, b, c = point.tolist()
        triples = [(a, b, c)] * steps
        # An unstable triple overflows here before it is refused.
        with np.errstate(over="ignore", invalid="ignore"):
            largest = np.max(np.abs(_iterated(triples, everywhere)))
            if not largest < LARGEST:
                return float("inf")
            errors = [np.mean(np.square(np.square(_iterated(triples, s)) - 1)) for s in spectra]
        return float(max(errors) if objective == "minimax" else np.dot(weights, errors))

    best = np.asarray(KELLER)
    for _ in range(RESTARTS):  # a simplex that became flat starts anew
        best = nelder_mead(loss, best)
    a, b, c = best.tolist()
    return a, b, c


def nelder_mead(
    loss: Callable[[_Spectrum], float],
    start: _Spectrum,
    *,
    size: float = 0.05,
    tolerance: float = 1e-7,
    most: int = 2000,
) -> _Spectrum:
    """The point of least loss that Nelder and Mead's simplex finds; infinite losses are avoided.

    >>> nelder_mead(lambda x: float((x[0] - 3) ** 2 + (x[1] + 1) ** 2), np.ones(2)).round(4)
    array([ 3., -1.])
    """
    corners = np.vstack([start, start + np.diag(size * np.where(start == 0, 1, start))])
    losses = np.array([loss(corner) for corner in corners])
    for _ in range(most):
        order = np.argsort(losses)
        corners, losses = corners[order], losses[order]
        if np.max(np.abs(corners - corners[0])) < tolerance:
            break
        middle = np.mean(corners[:-1], axis=0)
        out = middle - corners[-1]
        tried = [middle + out]
        found = [loss(tried[0])]
        if found[0] < losses[0]:
            tried.append(middle + 2 * out)
        elif found[0] >= losses[-2]:
            tried.append(middle + (0.5 if found[0] < losses[-1] else -0.5) * out)
        found += [loss(point) for point in tried[1:]]
        best = int(np.argmin(found))
        if found[best] < losses[-2 if len(tried) == 1 else -1]:
            corners[-1], losses[-1] = tried[best], found[best]
        else:
            corners[1:] = (corners[1:] + corners[0]) / 2
            losses[1:] = [loss(corner) for corner in corners[1:]]
    return corners[np.argmin(losses)]
