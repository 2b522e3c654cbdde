"""Gradient estimates without back-propagation: from two losses, or a forward derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.gradients.directions import (
    KINDS,
    Direction,
    GivenDirection,
    NoiseKind,
    along,
    difference_quotient,
)
from optimkit.numerics import check_choice, check_count, check_range, compute_dtype
from optimkit.protocols import Array, LeafSelector, PyTree

MEMORY = ("regenerate", "keep")


def spsa(
    loss_fn: Callable[..., Any],
    *,
    eps: Any = 1e-3,
    num_samples: int = 1,
    noise: NoiseKind = "normal",
    two_sided: bool = True,
    has_aux: bool = False,
    antithetic_memory: Literal["regenerate", "keep"] = "regenerate",
    mask: LeafSelector = None,
    return_both: bool = False,
    axis_name: Any = None,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""A gradient from two values of the loss, on both sides of the parameters.

    .. math:: g = \frac{L(w + \epsilon z) - L(w - \epsilon z)}{2\epsilon}\, z,
        \qquad E[z z^T] = I

    Its mean tends to the gradient as eps tends to 0. Its size does not: :math:`E\|g\|^2` is D + 2
    times the squared gradient norm for normal z, D times for signs, over D parameters. So rates are
    smaller by that factor, and ``mask`` pays.

    Args:
      loss_fn: from parameters, and what else is given, to a scalar; or ``(scalar, aux)``. It need
        not have a derivative. Both values see the same arguments, so the same random keys.
      eps: the way to each side, > 0; 1e-3 is MeZO's. In bfloat16, ``eps * z`` must be more than
        the spacing of the weights, 2^-8 of them.
      num_samples: n, >= 1: the mean of n estimates, each with its own z, one after the other.
      noise: ``"normal"``, ``"rademacher"`` or ``"sphere"``; see ``sample_direction``.
      two_sided: False: :math:`(L(w + \epsilon z) - L(w))/\epsilon`, whose error is of first order.
      has_aux: whether the loss returns ``(scalar, aux)``.
      antithetic_memory: ``"regenerate"``: z is made from its key wherever it is read, and no
        longer-lived. ``"keep"``: made once and kept, 4 bytes a parameter.
      mask: which leaves are estimated, True = estimated: a tree of bools, ``(path, leaf) -> bool``
        or path patterns; default all. The others get zero, as integer leaves do.
      return_both: give ``(L+, L-)`` in place of ``L+``.
      axis_name: of devices, over which both values are averaged before their difference is taken.
        Give all devices the same key.

    Returns:
      ``fn(params, key, *args, direction=None) -> (loss, gradient)`` for any optimizer. ``loss`` is
      :math:`L(w + \epsilon z)`, as MeZO reports it, of the mean over samples; ``(loss, aux)`` with
      ``has_aux``, of the last sample. ``direction``, a tree like the parameters, replaces z.

    Raises:
      ValueError: if an argument is out of range, or a tree does not match.

    A difference that is not finite gives a zero gradient, so that one bad batch does not end the
    run; the loss shows it. ``mezo`` needs no memory for the gradient either.

    >>> fn = spsa(lambda w: jnp.sum(w**2), eps=0.5)
    >>> loss, g = fn(jnp.array([1.0, 2.0]), jax.random.key(0), direction=jnp.array([1.0, -1.0]))
    >>> float(loss), g.tolist()  # (1.5^2 + 1.5^2 - 0.5^2 - 2.5^2) / 1 = -2
    (4.5, [-2.0, 2.0])

    Reference: Spall, "Multivariate stochastic approximation using a simultaneous perturbation
    gradient approximation", 1992; Malladi et al., "Fine-Tuning Language Models with Just Forward
    Passes", NeurIPS 2023, arXiv 2305.17333. Agrees with MeZO's code to rounding.
    """
    check_range(eps=eps, gt=0)
    check_count(num_samples=num_samples, least=1)
    check_choice(KINDS, noise=noise)
    check_choice(MEMORY, antithetic_memory=antithetic_memory)

    def both(params: PyTree, z: Direction, args: Any) -> tuple[Any, Any, Any]:
        def at(z: Direction, way: Any) -> tuple[Any, Any]:
            return evaluate(loss_fn, z.map(lambda w, z: w + way * z, params), args, has_aux)

        plus, aux = at(z, eps)
        if two_sided:
            minus, _ = at(z.after(plus), -eps)
        else:
            minus, _ = evaluate(loss_fn, params, args, has_aux)
        if axis_name is not None:
            plus, minus = jax.lax.pmean((plus, minus), axis_name)
        return plus, minus, aux

    def one(params: PyTree, z: Direction, args: Any) -> tuple[Any, PyTree]:
        plus, minus, aux = both(params, z, args)
        p = finite_or_zero(difference_quotient(plus, minus, (2 if two_sided else 1) * eps))
        loss = (plus, minus) if return_both else plus
        return ((loss, aux) if has_aux else loss), scaled(z.after(minus), params, p)

    return _mean_of_samples(one, num_samples, noise, mask, has_aux, antithetic_memory == "keep")


def forward_gradient(
    loss_fn: Callable[..., Any],
    *,
    num_samples: int = 1,
    noise: NoiseKind = "normal",
    has_aux: bool = False,
    mask: LeafSelector = None,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""A gradient from one forward pass: the exact slope along a random direction, times it.

    .. math:: g = \langle \nabla L(w), z \rangle\, z, \qquad E[z z^T] = I

    It is unbiased, and as noisy as ``spsa``: see there for how much.

    Args:
      loss_fn: from parameters, and what else is given, to a scalar; or ``(scalar, aux)``. It needs
        a derivative.
      num_samples: n, >= 1: the mean of n estimates, one after the other.
      noise: ``"normal"``, ``"rademacher"`` or ``"sphere"``; see ``sample_direction``.
      has_aux: whether the loss returns ``(scalar, aux)``.
      mask: which leaves are estimated, True = estimated, as for ``spsa``.

    Returns:
      ``fn(params, key, *args, direction=None) -> (loss, gradient)``, as ``spsa`` gives it, with the
      loss at w. Activations are not kept: memory is that of two forward passes.

    Raises:
      ValueError: if an argument is out of range, or a tree does not match.

    A slope that is not finite gives a zero gradient; the loss shows it.

    >>> fn = forward_gradient(lambda w: jnp.sum(w**2))
    >>> loss, g = fn(jnp.array([1.0, 2.0]), jax.random.key(0), direction=jnp.array([1.0, -1.0]))
    >>> float(loss), g.tolist()  # slope 2 * 1 - 4 * 1
    (5.0, [-2.0, 2.0])

    Reference: Baydin et al., "Gradients without Backpropagation", 2022, arXiv 2202.08587.
    """
    check_count(num_samples=num_samples, least=1)
    check_choice(KINDS, noise=noise)

    def one(params: PyTree, z: Direction, args: Any) -> tuple[Any, PyTree]:
        value, p = along(lambda params: loss_fn(params, *args), params, z, has_aux)
        return value, scaled(z.after(p), params, finite_or_zero(p))

    return _mean_of_samples(one, num_samples, noise, mask, has_aux, False)


def evaluate(
    loss_fn: Callable[..., Any], params: PyTree, args: Any, has_aux: bool
) -> tuple[Array, Any]:
    """The loss, in f32 at least, and the auxiliary results or None."""
    value, aux = loss_fn(params, *args) if has_aux else (loss_fn(params, *args), None)
    return jnp.asarray(value, compute_dtype(value)), aux


def finite_or_zero(p: Array) -> Array:
    """The slope, or zero where it is none: NaN would spread to all parameters at once."""
    return jnp.where(jnp.isfinite(p), p, 0)


def scaled(z: Direction, params: PyTree, p: Array) -> PyTree:
    """``p z`` in the dtypes of the parameters; zero where nothing is drawn."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return z.map(lambda w, z: w + p.astype(z.dtype) * z, zeros)


def _mean_of_samples(
    one: Callable[[PyTree, Direction, Any], tuple[Any, PyTree]],
    num_samples: int,
    noise: NoiseKind,
    mask: LeafSelector,
    has_aux: bool,
    keep: bool,
) -> Callable[..., tuple[Any, PyTree]]:
    def fn(
        params: PyTree, key: Array, *args: Any, direction: PyTree | None = None
    ) -> tuple[Any, PyTree]:
        if direction is not None:
            return one(params, GivenDirection(direction, params, mask), args)
        if num_samples == 1:
            return one(params, drawn(key, params), args)

        def sample(total: PyTree, index: Array) -> tuple[PyTree, Any]:
            value, g = one(params, drawn(jax.random.fold_in(key, index), params), args)
            total = jax.tree.map(lambda t, g: t + (g / num_samples).astype(t.dtype), total, g)
            return total, value

        zeros = jax.tree.map(lambda w: jnp.zeros_like(w, compute_dtype(w)), params)
        total, values = jax.lax.scan(sample, zeros, jnp.arange(num_samples))
        g = jax.tree.map(lambda t, w: t.astype(jnp.result_type(w)), total, params)
        loss, aux = values if has_aux else (values, None)
        loss = jax.tree.map(lambda x: jnp.mean(x, axis=0), loss)
        return ((loss, jax.tree.map(lambda x: x[-1], aux)) if has_aux else loss), g

    def drawn(key: Array, params: PyTree) -> Direction:
        z = Direction(key, params, noise, mask)
        return GivenDirection(z.tree(), params, mask) if keep else z

    return fn
