"""Convex functions: value, subgradient, and what their conjugate allows.

Lion-K steps by a subgradient of a convex K and, with weight decay, minimises a loss plus the convex
conjugate K*. For a norm that is a constraint, the unit ball of the dual norm; for the smooth
functions it is a penalty as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.matrices import decompositions
from optimkit.matrices.engine import gather, map_matrices
from optimkit.matrices.newton_schulz import NS_COEFFS, newton_schulz
from optimkit.numerics import max_abs, safe_div, safe_norm
from optimkit.protocols import Array, MatrixAxes


class Kappa(NamedTuple):
    """One convex function of the leaves of a tree. All functions take a list of arrays.

    ``value``: K, a scalar. ``subgradient``: an element of its subdifferential, a list of arrays;
    zero at zero. ``conjugate``: K* where it is finite. ``gauge``: the dual norm whose unit ball is
    the domain of K*, a scalar; 0 everywhere when K* is finite everywhere.
    """

    value: Callable[[Sequence[Array]], Array]
    subgradient: Callable[[Sequence[Array]], list[Array]]
    conjugate: Callable[[Sequence[Array]], Array]
    gauge: Callable[[Sequence[Array]], Array]


Leaves = Sequence[Array]


def _total(function: Callable[[Array], Array]) -> Callable[[Leaves], Array]:
    """The sum of ``function`` over all entries of all leaves."""
    return lambda leaves: sum((jnp.sum(function(x)) for x in leaves), start=jnp.zeros(()))


def _largest(leaves: Leaves) -> Array:
    out = jnp.zeros(())
    for x in leaves:
        out = jnp.maximum(out, max_abs(x))
    return out


def _zero(leaves: Leaves) -> Array:
    del leaves
    return jnp.zeros(())


def _elementwise(
    value: Callable[[Array], Array],
    subgradient: Callable[[Array], Array],
    conjugate: Callable[[Array], Array] | None = None,
    gauge: Callable[[Leaves], Array] = _largest,
) -> Kappa:
    return Kappa(
        _total(value),
        lambda leaves: [subgradient(x) for x in leaves],
        _total(conjugate) if conjugate else _zero,
        gauge,
    )


# ---------------------------------------------------------------------------------------------
# Separable functions: K* lives on the box |x_i| <= 1
# ---------------------------------------------------------------------------------------------


def l1() -> Kappa:
    """The sum of |x|: the sign, and the box."""
    return _elementwise(jnp.abs, jnp.sign)


def soft_l1(threshold: Any) -> Kappa:
    """The sum of max(|x| - e, 0): the sign of what exceeds the threshold."""
    return _elementwise(
        lambda x: jnp.maximum(jnp.abs(x) - threshold, 0),
        lambda x: jnp.where(jnp.abs(x) > threshold, jnp.sign(x), 0),
        lambda x: threshold * jnp.abs(x),
    )


def huber(threshold: Any) -> Kappa:
    """The sum of Huber's function, x^2 / 2e inside, |x| - e/2 outside: a clipped line."""

    def value(x: Array) -> Array:
        inside = jnp.square(jnp.clip(x, -threshold, threshold)) / (2 * threshold)
        return inside + jnp.maximum(jnp.abs(x) - threshold, 0)

    return _elementwise(
        value,
        # Scaled before it is clipped: the limits are exactly -1 and 1.
        lambda x: jnp.clip(safe_div(x, jnp.asarray(threshold, x.dtype)), -1, 1),
        lambda x: threshold / 2 * jnp.square(x),
    )


def log_cosh(sharpness: Any) -> Kappa:
    """The sum of log cosh(s x) / s: tanh, a smooth sign. K* is a binary entropy."""

    def value(x: Array) -> Array:
        size = jnp.abs(sharpness * x)  # log cosh s = s - log 2 + log(1 + exp(-2 s))
        return (size - math.log(2) + jnp.log1p(jnp.exp(-2 * size))) / sharpness

    def conjugate(x: Array) -> Array:
        x = jnp.clip(x, -1, 1)
        terms = jax.scipy.special.xlogy(1 + x, 1 + x) + jax.scipy.special.xlogy(1 - x, 1 - x)
        return terms / (2 * sharpness)

    return _elementwise(value, lambda x: jnp.tanh(sharpness * x), conjugate)


def half_squared() -> Kappa:
    """Half the squared 2-norm: the identity. K* is the same, without a constraint."""

    def half(x: Array) -> Array:
        return jnp.square(x) / 2

    return _elementwise(half, lambda x: x, half, gauge=_zero)


# ---------------------------------------------------------------------------------------------
# Norms
# ---------------------------------------------------------------------------------------------


def _norm(leaves: Leaves, p: Any) -> Array:
    """The p-norm of all entries together, without overflow of the powers."""
    largest = _largest(leaves)
    total = _total(lambda x: jnp.power(safe_div(jnp.abs(x), largest.astype(x.dtype)), p))(leaves)
    return largest * jnp.power(total, 1 / p)


def lp(p: Any) -> Kappa:
    """The p-norm of all leaves together; ``p`` may be traced."""

    def subgradient(leaves: Leaves) -> list[Array]:
        norm = _norm(leaves, p)
        return [
            jnp.sign(x) * jnp.power(safe_div(jnp.abs(x), norm.astype(x.dtype)), p - 1)
            for x in leaves
        ]

    def gauge(leaves: Leaves) -> Array:
        # 1/p + 1/q = 1; p may be traced, so both branches exist.
        steep = jnp.asarray(p) > 1
        q = jnp.where(steep, p / jnp.where(steep, jnp.asarray(p) - 1, 1), 2)
        return jnp.where(steep, _norm(leaves, q), _largest(leaves))

    return Kappa(lambda leaves: _norm(leaves, p), subgradient, _zero, gauge)


def l2() -> Kappa:
    """The 2-norm of all leaves together."""

    def norm(leaves: Leaves) -> Array:
        norms = [safe_norm(x) for x in leaves]
        return safe_norm(jnp.stack(norms)) if norms else jnp.zeros(())

    def subgradient(leaves: Leaves) -> list[Array]:
        length = norm(leaves)
        return [safe_div(x, length.astype(x.dtype)) for x in leaves]

    return Kappa(norm, subgradient, _zero, norm)


def linf() -> Kappa:
    """The largest |x| of all leaves: the sign at the largest entries, which share the step."""

    def subgradient(leaves: Leaves) -> list[Array]:
        largest = _largest(leaves)
        hits = [jnp.abs(x) == largest.astype(x.dtype) for x in leaves]
        ties = jnp.maximum(_total(lambda hit: hit)(hits), 1)
        return [
            jnp.where(hit, jnp.sign(x) / ties.astype(x.dtype), 0)
            for x, hit in zip(leaves, hits, strict=True)
        ]

    return Kappa(_largest, subgradient, _zero, _total(jnp.abs))


def top_k(k: int) -> Kappa:
    """The sum of the k largest |x| of each leaf."""

    def largest(x: Array) -> Array:
        return jax.lax.top_k(jnp.ravel(gather(jnp.abs(x))), min(k, x.size))[0]

    def subgradient(x: Array) -> Array:
        if x.size == 0:
            return x
        limit, size = largest(x)[-1], jnp.abs(x)
        above, tied = size > limit, size == limit
        # Entries tied for the last place share what is left of it.
        share = (min(k, x.size) - jnp.sum(above)) / jnp.sum(tied)
        partly = jnp.where(tied, jnp.sign(x) * share.astype(x.dtype), 0)
        return jnp.where(above, jnp.sign(x), partly)

    def gauge(leaves: Leaves) -> Array:
        sums = [jnp.sum(jnp.abs(x)) / max(1, min(k, x.size)) for x in leaves]
        return jnp.maximum(_largest(leaves), _largest(sums))

    return Kappa(
        lambda leaves: sum((jnp.sum(largest(x)) for x in leaves), start=jnp.zeros(())),
        lambda leaves: [subgradient(x) for x in leaves],
        _zero,
        gauge,
    )


def group_l2(axis: int) -> Kappa:
    """The sum of the 2-norms of the groups along one axis; a vector is one group."""

    def norms(x: Array) -> Array:
        """One norm a group, kept in place; a vector is one group."""
        return safe_norm(x, axis if x.ndim > 1 else None, keepdims=True)

    return Kappa(
        _total(norms),
        lambda leaves: [safe_div(x, norms(x)) for x in leaves],
        _zero,
        lambda leaves: _largest([norms(x) for x in leaves]),
    )


POLISH = (1.5, -0.5, 0.0)
"""A Newton-Schulz step that takes no singular value in [0, sqrt 3] above one."""


def nuclear() -> Kappa:
    """The sum of singular values: the polar factor, by Newton-Schulz steps."""

    def check(x: Array) -> None:
        if x.ndim > 2:
            raise ValueError(
                f"kappa='nuclear' takes matrices and vectors, got a leaf of shape {x.shape}: which "
                "of its axes are inputs is not known here; use muon for such leaves"
            )

    def subgradient(x: Array) -> Array:
        check(x)
        if x.ndim < 2:  # a vector is a matrix of one column
            return safe_div(x, safe_norm(x))
        # The polar factor by matrix products. The table alone leaves singular values in
        # [0.97, 1.04]; two plain steps more bring them to [0.9999, 1] and never above one, so
        # that the constraint |wd x| <= 1 holds.
        triples = (*NS_COEFFS["dion"], POLISH, POLISH)

        def polar(stack: Array) -> Array:
            return newton_schulz(stack, len(triples), triples, eps=0.0)

        return map_matrices(polar, [x], [MatrixAxes((), (0,), (1,))])[0]

    def singular_values(x: Array) -> Array:
        check(x)
        if x.ndim < 2 or x.size == 0:
            return safe_norm(x)
        return decompositions.singular_values(x)

    return Kappa(
        _total(singular_values),
        lambda leaves: [subgradient(x) for x in leaves],
        _zero,
        lambda leaves: _largest([singular_values(x) for x in leaves]),
    )
