"""Newton-Schulz iteration: nearly the nearest semi-orthogonal matrix, by matrix products alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from optimkit.numerics import check_choice, check_count, compute_dtype, safe_div
from optimkit.protocols import Array

Triple: TypeAlias = tuple[float, float, float]

NsCoeffs: TypeAlias = str | Sequence[float] | Sequence[Sequence[float]] | Callable[[int, int], Any]
"""A table's name, one triple for all steps, a triple a step, or ``(rows, cols) ->`` one of them."""

KELLER: Triple = (3.4445, -4.7750, 2.0315)

NS_COEFFS: Mapping[str, tuple[Triple, ...]] = {
    "keller": (KELLER,),
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
"""Coefficients by name: one triple that serves every step, or one a step."""

POLAR_EXPRESS_MARGIN = 1.02
POLAR_EXPRESS_EPS = 1e-6


def ns_triples(coeffs: NsCoeffs, steps: int, rows: int = 1, cols: int = 1) -> tuple[Triple, ...]:
    """The triple of each step.

    Args:
      coeffs: a name of ``NS_COEFFS``, one triple for all steps, a sequence of triples (one a step;
        the first ``steps`` count), or a function of the matrix size that gives one of these.
      steps: how many triples are wanted.
      rows: the smaller side of the matrix.
      cols: the larger side.

    Raises:
      ValueError: for an unknown name, something that is no triple, or too few triples.

    >>> ns_triples((2.0, -1.5, 0.5), steps=2)
    ((2.0, -1.5, 0.5), (2.0, -1.5, 0.5))
    """
    if callable(coeffs):
        return ns_triples(coeffs(rows, cols), steps)
    if isinstance(coeffs, str):
        check_choice(tuple(NS_COEFFS), ns_coeffs=coeffs)
        given: Any = NS_COEFFS[coeffs]
    else:
        given = coeffs
    try:
        table: Any = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        table = np.zeros(0)
    if table.ndim == 1:
        table = table[None]
    if table.ndim != 2 or table.shape[1] != 3 or not np.all(np.isfinite(table)):
        raise ValueError(
            f"ns_coeffs must be a name ({', '.join(NS_COEFFS)}), three finite numbers, or a "
            f"sequence of such triples, got {given!r}"
        )
    if len(table) == 1:
        table = np.repeat(table, steps, axis=0)
    if len(table) < steps:
        raise ValueError(f"ns_coeffs has triples for {len(table)} steps, ns_steps is {steps}")
    return tuple((float(a), float(b), float(c)) for a, b, c in table[:steps])


def newton_schulz(
    x: Array,
    steps: int = 5,
    coeffs: NsCoeffs = "keller",
    eps: Any = 1e-7,
    dtype: Any = None,
) -> Array:
    r"""Brings the singular values of each matrix close to one, and keeps its singular vectors.

    .. math::

        X \leftarrow \frac{X}{\|X\|_F + \epsilon}, \qquad
        \text{then, each step:} \quad A = X X^T, \quad X \leftarrow a X + (b A + c A A) X

    The iteration runs on the orientation with rows <= cols. Products accumulate in f32 at least
    and are rounded to ``dtype`` in between.

    Args:
      x: one matrix or a stack of them, shape (..., m, n); each has its own norm.
      steps: number of steps, >= 1. Table entries beyond it are not used.
      coeffs: ``"keller"`` (one triple for any number of steps), ``"dion"`` or ``"polar_express"``
        (five triples), a triple, a sequence of triples, or ``(rows, cols) ->`` one of these.
        ``"polar_express"`` normalises by ``1.02 ||X||_F + max(eps, 1e-6)``, as its authors do.
      eps: added to the norm, >= 0; matrices far below it come out small.
      dtype: what the products read. Default: the dtype of ``x``, f32 at least. In bfloat16 the
        result is off by 2 to 3% of its norm, evenly spread over all directions.

    Returns:
      The result, shape and dtype of ``x``. After five steps singular values above 1% of the norm
      lie in [0.68, 1.13] (keller), [0.97, 1.04] (dion), [0.85, 1.15] (polar_express).

    Raises:
      ValueError: for an array of rank below two, or coefficients that do not fit ``steps``.

    A zero matrix stays zero. No finite entry overflows: the norm is taken of ``X / max|X|``.
    A non-finite entry makes its own matrix NaN and no other.

    >>> import jax.numpy as jnp
    >>> x = newton_schulz(jnp.array([[3.0, 0.0], [0.0, -1.0]]), coeffs="dion")
    >>> [round(float(v), 1) for v in jnp.diag(x)]
    [1.0, -1.0]

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024;
    microsoft/dion; Amsel et al., "The Polar Express", 2025, arXiv 2505.16932.
    """
    check_count(steps=steps, least=1)
    if jnp.ndim(x) < 2:
        raise ValueError(f"newton_schulz needs shape (..., m, n), got {jnp.shape(x)}")
    if x.shape[-2] > x.shape[-1]:
        flipped = newton_schulz(jnp.swapaxes(x, -2, -1), steps, coeffs, eps, dtype)
        return jnp.swapaxes(flipped, -2, -1)
    triples = ns_triples(coeffs, steps, x.shape[-2], x.shape[-1])
    if x.size == 0:
        return x
    wide = compute_dtype(x)
    dtype = jnp.dtype(wide if dtype is None else dtype)
    accumulate = jnp.promote_types(jnp.float32, dtype)
    margin = 1.0
    if isinstance(coeffs, str) and coeffs == "polar_express":
        margin, eps = POLAR_EXPRESS_MARGIN, jnp.maximum(eps, POLAR_EXPRESS_EPS)

    y = x.astype(wide)
    largest = jnp.max(jnp.abs(y), axis=(-2, -1), keepdims=True)
    # A divisor and its reciprocal stay normal, for hardware may read subnormal numbers as zero.
    normal = float(jnp.finfo(wide).smallest_normal)
    scale = jnp.where(largest < normal, 1, jnp.minimum(largest, 1 / normal))
    y = y / scale
    norm = jnp.sqrt(jnp.sum(jnp.square(y), axis=(-2, -1), keepdims=True))
    y = safe_div(y, margin * norm + eps / scale).astype(dtype)

    def product(spec: str, left: Array, right: Array) -> Array:
        return jnp.einsum(
            spec, left.astype(dtype), right.astype(dtype), preferred_element_type=accumulate
        )

    for a, b, c in triples:
        gram = product("...ij,...kj->...ik", y, y)
        polynomial = b * gram + c * product("...ij,...jk->...ik", gram, gram)
        y = (a * y.astype(accumulate) + product("...ij,...jk->...ik", polynomial, y)).astype(dtype)
    return y.astype(x.dtype)
