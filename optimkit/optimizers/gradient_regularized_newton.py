"""Newton's step, regularised by the gradient's norm over a radius that is searched for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optimkit.gradients.hessian import gradient_product
from optimkit.gradients.krylov import conjugate_gradient
from optimkit.layout import named_leaves
from optimkit.leaves import widen
from optimkit.matrices import decompositions
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    safe_div,
    tree_norm,
)
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Method,
    PyTree,
    ScalarOrSchedule,
)
from optimkit.transforms.radius_search import Direction, Product, search_radius

HESSIANS = ("hvp", "gauss_newton", "fisher", "exact")
SOLVERS = ("cg", "dense")


def gradient_regularized_newton(
    learning_rate: ScalarOrSchedule = None,
    *,
    gamma0: Any = 1.0,
    hessian: Literal["hvp", "gauss_newton", "fisher", "exact"] | Product = "hvp",
    solver: Literal["cg", "dense"] = "cg",
    adaptive: bool = True,
    max_search_steps: int = 40,
    gamma_min: Any = 1e-9,
    eps: Any = 1e-8,
    cg_maxiter: int = 50,
    cg_tol: Any = 1e-6,
    refine_factor: tuple[float, float] = (2.0, 0.5),
    accept_constant: Any = 8.0,
    noise_tolerance: Any = 4.0,
) -> GradientTransformation:
    r"""Newton steps that become normalised gradient descent where the loss is rough.

    With the loss f, its gradient g, and H its Hessian or something like it:

    .. math::

        \lambda = \frac{\|g\|}{\gamma + \epsilon}, \qquad (H + \lambda I)\, d = -g, \qquad
        \text{taken if } f(w) - f(w + d) \ge \frac{\|g(w + d)\|^2}{8 \lambda}

    A step that is taken doubles :math:`\gamma`; otherwise :math:`\gamma` is halved and d solved for
    anew. No step is longer than about :math:`\gamma` where H has no negative eigenvalue.

    Args:
      learning_rate: multiplies the step; None: 1. The method has no rate of its own.
      gamma0: the first radius, > 0. The search corrects a wrong one.
      hessian: ``"hvp"`` and ``"exact"``: the Hessian of ``value_fn``. ``"gauss_newton"`` and
        ``"fisher"``: each update takes ``hvp_fn``, see ``optimkit.gradients.gauss_newton_product``
        and ``fisher_product``. Or a function ``(params, v) -> H v``.
      solver: ``"cg"``; or ``"dense"``, which forms H and factors it: below some 4000 parameters.
      adaptive: False: one solve a step with ``gamma0``, always taken.
      max_search_steps: halvings in one step, >= 0. After the last one the step is taken anyway.
      gamma_min: after a success, gamma is at least this, >= 0.
      eps: added to gamma, >= 0.
      cg_maxiter: most iterations of CG, each one product, >= 1.
      cg_tol: CG's residual over the gradient's norm, >= 0.
      refine_factor: factors of gamma after a success and after a failure.
      accept_constant: the 8 above, > 0.
      noise_tolerance: a change of the loss by this many units in its last place counts as success:
        near a minimum the test would fail for want of digits, and gamma collapse. 0 is the
        authors' code.

    Returns:
      An optimizer that needs ``params``, ``value``, the loss, and ``value_fn``, the loss on the
      same batch as a function of the parameters, in each update; ``grad_fn`` and ``hvp_fn`` take
      the place of its derivatives. No state per parameter; CG holds four copies for a time.

    Raises:
      ValueError: if an argument is out of range, or an extra argument is missing.

    Each step costs the solves, and a value and a gradient a try: two tries on average, for gamma
    doubles after every success. For full batches, or large ones: the test judges one batch. The
    theory wants H without negative eigenvalues. A try on which CG meets one, or the Cholesky factor
    does not exist, counts as failed, as does a loss that is not finite; where the last try is not
    finite, or its loss, nothing moves. A zero gradient leaves all as it is.

    >>> import jax, jax.numpy as jnp
    >>> def loss(w): return jnp.sum(jnp.array([1.0, 100.0]) * w**2) / 2
    >>> tx, w = gradient_regularized_newton(gamma0=1e4), jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, value=loss(w), value_fn=loss
    ... )
    >>> [round(float(u), 2) for u in updates], float(state[0].gamma)
    ([-0.99, -1.0], 20000.0)

    Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
    Approximate Hessians", ICLR 2026, arXiv 2506.13710. The search is that of the authors' code.
    """
    check_range(cg_tol=cg_tol, ge=0)
    check_count(cg_maxiter=cg_maxiter, least=1)
    check_choice(SOLVERS, solver=solver)
    if not callable(hessian):
        check_choice(HESSIANS, hessian=hessian)

    def directions(params: PyTree, grads: PyTree, grad_fn: Any, hvp_fn: Any) -> Direction:
        product = _product_of(hessian, params, grad_fn, hvp_fn)
        if solver == "dense":
            return _dense(product, params, grads)

        def solve(lam: Array, gamma: Array, before: PyTree) -> tuple[PyTree, Array]:
            del gamma
            down = jax.tree.map(jnp.negative, grads)
            found = conjugate_gradient(
                product, down, before, shift=lam, maxiter=cg_maxiter, tol=cg_tol
            )
            return found.x, found.positive

        return solve

    return search_radius(
        directions,
        learning_rate,
        gamma0=gamma0,
        adaptive=adaptive,
        max_search_steps=max_search_steps,
        gamma_min=gamma_min,
        eps=eps,
        refine_factor=refine_factor,
        accept_constant=accept_constant,
        noise_tolerance=noise_tolerance,
    )


def normalized_gradient_search(
    learning_rate: ScalarOrSchedule = None,
    *,
    gamma0: Any = 1.0,
    adaptive: bool = True,
    max_search_steps: int = 40,
    gamma_min: Any = 1e-9,
    eps: Any = 1e-8,
    refine_factor: tuple[float, float] = (2.0, 0.5),
    accept_constant: Any = 8.0,
    noise_tolerance: Any = 4.0,
) -> GradientTransformation:
    r"""Normalised gradient descent with the search of ``gradient_regularized_newton``: H = 0.

    .. math:: d = -\gamma\, g / \|g\|

    Args:
      learning_rate: multiplies the step; None: 1.
      gamma0: the first length of a step, > 0; this and all else as for
        ``gradient_regularized_newton``.
      adaptive: False: every step has length ``gamma0``.
      max_search_steps: halvings in one step.
      gamma_min: after a success, gamma is at least this.
      eps: added to gamma in the test.
      refine_factor: factors of gamma after a success and after a failure.
      accept_constant: the constant of the test.
      noise_tolerance: changes of the loss that count as success, in units of its last place.

    Returns:
      An optimizer that needs ``params``, ``value`` and ``value_fn`` in each update.

    Raises:
      ValueError: if an argument is out of range, or an extra argument is missing.

    >>> import jax, jax.numpy as jnp
    >>> def loss(w): return jnp.sum(w**2) / 2
    >>> tx, w = normalized_gradient_search(gamma0=1.0), jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w, value=loss(w), value_fn=loss)
    >>> [round(float(u), 3) for u in updates]
    [-0.6, -0.8]

    Reference: Semenov, Jaggi, Doikov, ICLR 2026, arXiv 2506.13710.
    """

    def directions(params: PyTree, grads: PyTree, grad_fn: Any, hvp_fn: Any) -> Direction:
        del params, grad_fn, hvp_fn
        norm = tree_norm(grads)

        def along(lam: Array, gamma: Array, before: PyTree) -> tuple[PyTree, Array]:
            del lam, before
            length = safe_div(gamma.astype(norm.dtype), norm)
            down = jax.tree.map(lambda g: -length.astype(g.dtype) * g, grads)
            return down, jnp.isfinite(length)

        return along

    return search_radius(
        directions,
        learning_rate,
        gamma0=gamma0,
        adaptive=adaptive,
        max_search_steps=max_search_steps,
        gamma_min=gamma_min,
        eps=eps,
        refine_factor=refine_factor,
        accept_constant=accept_constant,
        noise_tolerance=noise_tolerance,
    )


# ---------------------------------------------------------------------------------------------
# Products and solves
# ---------------------------------------------------------------------------------------------


def _product_of(
    hessian: Any, params: PyTree, grad_fn: Any, hvp_fn: Product | None
) -> Callable[[PyTree], PyTree]:
    if hvp_fn is not None:
        return lambda v: hvp_fn(params, v)
    if callable(hessian):
        return lambda v: hessian(params, v)
    if hessian in ("hvp", "exact"):
        return lambda v: gradient_product(grad_fn, params, v)
    raise ValueError(
        f"hessian={hessian!r} needs its products: call update(..., hvp_fn=...) with a function of "
        f"(params, v), for example optimkit.gradients.{hessian}_product"
    )


def _dense(product: Callable[[PyTree], PyTree], params: PyTree, grads: PyTree) -> Direction:
    """Forms the matrix, once a step, and factors it at every try."""
    flat, unravel = ravel_pytree(grads)
    del params
    eye = jnp.eye(flat.size, dtype=flat.dtype)
    matrix = jax.vmap(lambda v: ravel_pytree(widen(product(unravel(v)), grads))[0])(eye)
    matrix = (matrix + matrix.T) / 2

    def solve(lam: Array, gamma: Array, before: PyTree) -> tuple[PyTree, Array]:
        del gamma
        shifted = matrix + lam.astype(flat.dtype) * eye
        found = -decompositions.solve_positive(shifted, flat[:, None])[:, 0]
        good = jnp.all(jnp.isfinite(found))
        old = ravel_pytree(before)[0]
        return unravel(jnp.where(good, found, old)), good

    return solve


# ---------------------------------------------------------------------------------------------
# The records
# ---------------------------------------------------------------------------------------------


def _bowl(params: PyTree, grads: PyTree) -> dict[str, Any]:
    """A loss with these gradients at these parameters, and the identity as its Hessian."""
    start, slopes = dict(named_leaves(widen(params))), dict(named_leaves(grads))

    def value_fn(tree: PyTree) -> Array:
        total = jnp.zeros((), jnp.float32)
        for name, leaf in named_leaves(tree):  # by name: a mask may have taken some
            moved = leaf - start[name]
            slope = slopes[name].astype(moved.dtype)
            total += jnp.sum(moved * (slope + moved / 2))
        return total

    return {"value": jnp.zeros(()), "value_fn": value_fn}


_SEARCH = ("gamma0", "gamma_min", "eps", "accept_constant", "noise_tolerance")
_FIXED = ("adaptive", "max_search_steps", "refine_factor")
_PAPER = (
    'Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with Approximate '
    'Hessians", ICLR 2026, arXiv 2506.13710'
)
_REFERENCE = "epfml/grad-norm-smooth@9f4ca00029:src/methods.py:grad_norm_smooth"

RECORDS = (
    Method(
        factory=gradient_regularized_newton,
        kind="recipe",
        summary="Newton steps, regularised by the gradient's norm over a searched radius",
        # So large that the radius does not matter, for the contract masks leaves.
        example={"gamma0": 1e6},
        extras=_bowl,
        traced=("learning_rate", *_SEARCH, "cg_tol"),
        static=("hessian", "solver", "cg_maxiter", *_FIXED),
        needs=("params", "value", "value_fn"),
        position="alone",
        communication="reduce",
        response="proportional",
        state_bytes=0,
        moved_bytes=12,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="Apache-2.0",
    ),
    Method(
        factory=normalized_gradient_search,
        kind="recipe",
        summary="normalised gradient descent whose length of step is searched for",
        extras=_bowl,
        traced=("learning_rate", *_SEARCH),
        static=_FIXED,
        needs=("params", "value", "value_fn"),
        position="alone",
        communication="reduce",
        response="bounded",
        state_bytes=0,
        moved_bytes=12,
        paper=_PAPER,
        reference=_REFERENCE + "_gradient_method",
        licence="Apache-2.0",
    ),
)
