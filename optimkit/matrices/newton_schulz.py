"""Newton-Schulz iteration: nearly the nearest semi-orthogonal matrix, by matrix products alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

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

FORMS = ("auto", "plain", "gram")
GRAM_ERROR = 1e-4
"""How far rounding may grow in a Gram matrix before it is computed anew."""


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
    *,
    form: Literal["auto", "plain", "gram"] = "auto",
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
      form: ``"plain"`` is the iteration above; ``"gram"`` the same on the m x m matrix A, see
        ``gram_steps``; ``"auto"`` takes the one with fewer multiplications, and plain below f32,
        where A has too few digits.

    Returns:
      The result, shape and dtype of ``x``. After five steps singular values above 1% of the norm
      lie in [0.68, 1.13] (keller), [0.97, 1.04] (dion), [0.85, 1.15] (polar_express).

    Raises:
      ValueError: for an array of rank below two, coefficients that do not fit ``steps``, or an
        unknown form.

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
    check_choice(FORMS, form=form)
    if jnp.ndim(x) < 2:
        raise ValueError(f"newton_schulz needs shape (..., m, n), got {jnp.shape(x)}")
    rows, cols = x.shape[-2:]
    if rows > cols:
        flipped = newton_schulz(jnp.swapaxes(x, -2, -1), steps, coeffs, eps, dtype, form=form)
        return jnp.swapaxes(flipped, -2, -1)
    triples = ns_triples(coeffs, steps, rows, cols)
    if x.size == 0:
        return x
    wide = compute_dtype(x)
    dtype = jnp.dtype(wide if dtype is None else dtype)
    margin = 1.0
    if isinstance(coeffs, str) and coeffs == "polar_express":
        margin, eps = POLAR_EXPRESS_MARGIN, jnp.maximum(eps, POLAR_EXPRESS_EPS)
    y = divide_by_norm(x.astype(wide), margin, eps).astype(dtype)
    if form == "auto":
        enough = float(jnp.finfo(dtype).eps) <= float(jnp.finfo(jnp.float32).eps)
        cheaper = gram_flops(rows, cols, triples, dtype) < 0.9 * plain_flops(rows, cols, steps)
        form = "gram" if enough and cheaper else "plain"
    iterate = gram_steps if form == "gram" else plain_steps
    return iterate(y, triples).astype(x.dtype)


def divide_by_norm(y: Array, margin: Any = 1.0, eps: Any = 0.0) -> Array:
    """Each matrix over ``margin`` times its Frobenius norm plus ``eps``; a zero one stays zero."""
    largest = jnp.max(jnp.abs(y), axis=(-2, -1), keepdims=True)
    # A divisor and its reciprocal stay normal, for hardware may read subnormal numbers as zero.
    normal = float(jnp.finfo(y.dtype).smallest_normal)
    scale = jnp.where(largest < normal, 1, jnp.minimum(largest, 1 / normal))
    y = y / scale
    norm = jnp.sqrt(jnp.sum(jnp.square(y), axis=(-2, -1), keepdims=True))
    return safe_div(y, margin * norm + eps / scale)


def plain_steps(y: Array, triples: Sequence[Triple]) -> Array:
    """The steps on a normalised stack, rows <= cols; products read the dtype of ``y``."""
    for a, b, c in triples:
        gram = product("...ij,...kj->...ik", y, y)
        square = product("...ij,...jk->...ik", gram.astype(y.dtype), gram.astype(y.dtype))
        polynomial = (b * gram + c * square).astype(y.dtype)
        step = product("...ij,...jk->...ik", polynomial, y)
        y = (a * y.astype(step.dtype) + step).astype(y.dtype)
    return y


def gram_steps(y: Array, triples: Sequence[Triple]) -> Array:
    r"""The same steps on the small Gram matrix: :math:`X \leftarrow Q X` at the end, alone.

    .. math::

        R = X X^T, \qquad P = a I + b R + c R^2, \qquad Q \leftarrow P Q, \quad
        R \leftarrow P R P

    All products but the first and the last are m x m, which pays for cols above about twice the
    rows. Rounding of R grows by :math:`a^2` a step where singular values are small. Before it
    reaches 1e-4, X and R are computed anew: with Keller's coefficients in f32 after three steps.
    """
    matmul = functools.partial(product, "...ij,...jk->...ik")
    identity = jnp.expand_dims(jnp.eye(y.shape[-2], dtype=y.dtype), tuple(range(y.ndim - 2)))
    for segment in gram_segments(triples, y.dtype):
        r = product("...ij,...kj->...ik", y, y)
        q: Array | None = None
        for step, (a, b, c) in enumerate(segment):
            p = a * identity + b * r + c * matmul(r, r)
            q = p if q is None else matmul(p, q)
            if step + 1 < len(segment):
                r = matmul(p, matmul(p, r))
        y = matmul(q, y)
    return y


def gram_segments(triples: Sequence[Triple], dtype: Any) -> list[list[Triple]]:
    """The steps between which the Gram matrix need not be computed anew."""
    limit = GRAM_ERROR / float(jnp.finfo(dtype).eps)
    segments: list[list[Triple]] = [[]]
    growth = 1.0
    for triple in triples:
        if segments[-1] and growth > limit:
            segments.append([])
            growth = 1.0
        segments[-1].append(triple)
        growth *= max(1.0, triple[0] ** 2)
    return segments


def plain_flops(rows: int, cols: int, steps: int) -> int:
    """Floating-point operations of ``plain_steps`` for one matrix: the usual count."""
    return steps * (4 * rows * rows * cols + 2 * rows**3)


def gram_flops(rows: int, cols: int, triples: Sequence[Triple], dtype: Any) -> int:
    """Floating-point operations of ``gram_steps`` for one matrix."""
    segments = gram_segments(triples, dtype)
    inner = sum(2 * len(segment) + 6 * (len(segment) - 1) for segment in segments)
    return len(segments) * 4 * rows * rows * cols + inner * rows**3


def product(spec: str, left: Array, right: Array) -> Array:
    """A product that accumulates in f32 at least."""
    accumulate = jnp.promote_types(jnp.float32, left.dtype)
    return jnp.einsum(spec, left, right, preferred_element_type=accumulate)
