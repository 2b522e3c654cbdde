"""Products with the Hessian and with its approximations, none of which is ever formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, narrow_like, widen
from optimkit.numerics import check_choice, check_range, safe_div, tree_norm
from optimkit.protocols import Array, PyTree

METHODS = ("exact", "finite_difference")


def hessian_product(loss_fn: Callable[[PyTree], Any], params: PyTree, v: PyTree) -> PyTree:
    """The product H v of the loss's Hessian and a tree v: forward over reverse.

    Args:
      loss_fn: from parameters to a scalar.
      params: where the Hessian is taken.
      v: a tree like them.

    Returns:
      A tree like ``params``. It costs two to three gradients.

    Raises:
      ValueError: if the trees differ.

    >>> import jax.numpy as jnp
    >>> def loss(w): return w[0] ** 2 * w[1]
    >>> hessian_product(loss, jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0])).tolist()
    [6.0, 2.0]
    """
    return gradient_product(jax.grad(loss_fn), params, v)


def gradient_product(grad_fn: Callable[[PyTree], PyTree], params: PyTree, v: PyTree) -> PyTree:
    """The product of the Jacobian of a gradient function and a tree v: H v."""
    check_match(v, params, what="v", like="the parameters")
    return jax.jvp(grad_fn, (params,), (narrow_like(v, params),))[1]


def gauss_newton_product(
    outputs_fn: Callable[[PyTree], Any],
    loss_of_outputs: Callable[[Any], Any],
    params: PyTree,
    v: PyTree,
) -> PyTree:
    """The product of the generalised Gauss-Newton matrix and a tree v.

    The matrix is that of the Hessian in which the model counts as linear: J^T H_out J. It has no
    negative eigenvalue where the loss is convex in the outputs.

    Args:
      outputs_fn: from parameters to the model's outputs on a batch.
      loss_of_outputs: from the outputs to a scalar.
      params: where the matrix is taken.
      v: a tree like them.

    >>> import jax.numpy as jnp
    >>> w, v = jnp.array([2.0]), jnp.array([1.0])
    >>> gauss_newton_product(lambda w: w**2, lambda y: jnp.sum(y**2) / 2, w, v).tolist()
    [16.0]
    """
    check_match(v, params, what="v", like="the parameters")
    outputs, pull = jax.vjp(outputs_fn, params)
    pushed = jax.jvp(outputs_fn, (params,), (narrow_like(v, params),))[1]
    return pull(jax.jvp(jax.grad(loss_of_outputs), (outputs,), (pushed,))[1])[0]


def fisher_product(losses_fn: Callable[[PyTree], Any], params: PyTree, v: PyTree) -> PyTree:
    """The product of the empirical Fisher matrix, the mean of g_i g_i^T, and a tree v.

    Args:
      losses_fn: from parameters to one loss an example, ``(n,)``.
      params: where the gradients g_i are taken.
      v: a tree like them.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0])
    >>> fisher_product(lambda w: x * w, jnp.array(5.0), jnp.array(1.0)).tolist()  # (1 + 9) / 2
    5.0
    """
    check_match(v, params, what="v", like="the parameters")
    losses, pull = jax.vjp(losses_fn, params)
    along = jax.jvp(losses_fn, (params,), (narrow_like(v, params),))[1]
    return pull(along / max(losses.size, 1))[0]


def hessian_gradient(
    loss_fn: Callable[[PyTree], Any],
    params: PyTree,
    grads: PyTree,
    method: Literal["exact", "finite_difference"] = "exact",
) -> PyTree:
    r"""The product H g of the loss's Hessian and its gradient.

    Args:
      loss_fn: from parameters to a scalar, on the batch that ``grads`` was taken on.
      params: where the Hessian is taken.
      grads: the gradient g, a tree like them.
      method: ``"exact"``: forward over reverse, about one more forward and backward pass.
        ``"finite_difference"``: :math:`(\nabla L(w + \epsilon g) - g)/\epsilon` with
        :math:`\epsilon = 0.01/\|g\|`, one more gradient, in f32 at least; entries are right to
        the third derivative times 0.005.

    Returns:
      A tree like ``params``, in its dtypes; zero for a zero gradient.

    Raises:
      ValueError: if the trees differ, or the method is unknown.

    >>> import jax.numpy as jnp
    >>> def loss(w): return jnp.sum(jnp.array([1.0, 3.0]) * w**2) / 2
    >>> w = jnp.array([1.0, 1.0])
    >>> hessian_gradient(loss, w, jnp.array([1.0, 3.0])).tolist()
    [1.0, 9.0]

    Reference: Rosca et al., "On a continuous time model of gradient descent dynamics and
    instability in deep learning", TMLR 2023, arXiv 2302.01952.
    """
    check_choice(METHODS, method=method)
    check_match(grads, params, what="gradient", like="the parameters")
    gradient = jax.grad(loss_fn)
    if method == "exact":
        return gradient_product(gradient, params, grads)
    difference, norm = _gradient_difference(gradient, params, grads, 0.01, grads)
    product = jax.tree.map(lambda d: d * (norm / 0.01).astype(d.dtype), difference)
    return narrow_like(product, params)


def finite_difference_hvp(
    fn: Callable[[PyTree], Any],
    params: PyTree,
    direction: PyTree,
    r: Any,
    *,
    grads: PyTree | None = None,
    eps: Any = 0.0,
) -> tuple[PyTree, Array]:
    r"""The Hessian times a direction of unit length, from two gradients a way ``r`` apart.

    .. math:: H \frac{d}{\|d\|} \approx
        \frac{\nabla f(w + r\, d / (\|d\| + \epsilon)) - \nabla f(w)}{r}

    With d the gradient of f it is the gradient of the gradient's norm, so that lambda times it
    penalises that norm.

    Args:
      fn: from parameters to a scalar.
      params: w.
      direction: d, a tree like them.
      r: length of the way, > 0.
      grads: the gradient of ``fn`` at ``params``, if known; else it is computed.
      eps: added to the norm, >= 0.

    Returns:
      The product, a tree like ``params`` in f32 at least, and the norm of d. Zero for d = 0.

    Raises:
      ValueError: if an argument is out of range, or the trees differ.

    >>> import jax.numpy as jnp
    >>> def f(w): return jnp.sum(jnp.array([1.0, 2.0]) * w**2) / 2
    >>> product, norm = finite_difference_hvp(f, jnp.zeros(2), jnp.array([3.0, 4.0]), r=0.5)
    >>> float(norm), product
    (5.0, Array([0.6, 1.6], dtype=float32))

    Reference: Dao et al., "Incorporating Surrogate Gradient Norm to Improve Offline Optimization
    Techniques", NeurIPS 2024, arXiv 2503.04242.
    """
    check_range(r=r, gt=0)
    check_range(eps=eps, ge=0)
    check_match(direction, params, what="direction", like="the parameters")
    gradient = jax.grad(fn)
    start = gradient(params) if grads is None else grads
    difference, norm = _gradient_difference(gradient, params, direction, r, start, eps)
    return jax.tree.map(lambda d: d / jnp.asarray(r, d.dtype), difference), norm


def _gradient_difference(
    gradient: Callable[[PyTree], PyTree],
    params: PyTree,
    direction: PyTree,
    r: Any,
    grads: PyTree,
    eps: Any = 0.0,
) -> tuple[PyTree, Array]:
    """The gradient a way ``r`` ahead minus ``grads``, in f32 at least; the direction's norm."""
    wide, d = widen(params), widen(direction, params)
    norm = tree_norm(d)
    unit = jax.tree.map(lambda x: safe_div(x, (norm + eps).astype(x.dtype)), d)
    ahead = gradient(jax.tree.map(lambda w, u: w + r * u, wide, unit))
    return jax.tree.map(lambda a, x: a - x, ahead, widen(grads, params)), norm
