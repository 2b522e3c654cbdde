"""A penalty on the norm of the gradient of a model's output, with its weight found in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.gradients.hessian import finite_difference_hvp
from optimkit.leaves import narrow_like, widen
from optimkit.numerics import check_range, compute_dtype, hyperparameter_dtype
from optimkit.protocols import Array, PyTree


def ignite_gradient(
    loss_fn: Callable[..., Any],
    output_fn: Callable[..., Any],
    *,
    rho: Any,
    r: Any,
    eps: Any = 0.0,
) -> Callable[..., tuple[Array, PyTree, Array]]:
    r"""The loss's gradient plus that of a penalty on how steeply the output depends on the weights.

    With h the model's mean output over the batch:

    .. math::

        u = \nabla h(w), \qquad \hat u = \nabla h\!\left(w + r \frac{u}{\|u\| + \epsilon}\right),
        \qquad g = \nabla L(w) + \lambda \frac{\rho}{r} (\hat u - u)

    which is the gradient of :math:`L + \lambda\rho\|\nabla h\|`, to first order in r.

    Args:
      loss_fn: ``(params, *args) -> scalar``.
      output_fn: ``(params, *args) -> scalar``: h, the mean prediction on the same batch.
      rho: factor of the penalty, >= 0. The authors: 0.05, and 0.2 with a fixed multiplier.
      r: length of the way between the two gradients of h, > 0. The authors: equal to ``rho``.
      eps: added to the norm, >= 0; the authors add nothing.

    Returns:
      ``fn(params, multiplier, *args) -> (loss, gradient, output_grad_norm)``; the norm is
      :math:`\|u\|`, which ``ignite_multiplier`` needs. Costs three gradients; no state.

    Raises:
      ValueError: if an argument is out of range.

    A zero u adds nothing, where the authors' code divides by zero.

    >>> def loss(w, x): return jnp.mean((x @ w) ** 2) / 2
    >>> def output(w, x): return jnp.mean((x @ w) ** 2)  # any scalar of the outputs
    >>> fn = ignite_gradient(loss, output, rho=0.5, r=0.5)
    >>> value, g, norm = fn(jnp.array([3.0]), 0.1, jnp.ones((1, 1)))  # 3 + 0.1 * 0.5 * 2
    >>> float(value), round(float(g[0]), 4), float(norm)
    (4.5, 3.1, 6.0)

    Reference: Dao et al., "Incorporating Surrogate Gradient Norm to Improve Offline Optimization
    Techniques", NeurIPS 2024, arXiv 2503.04242.
    """
    check_range(rho=rho, eps=eps, ge=0)
    check_range(r=r, gt=0)

    def fn(params: PyTree, multiplier: Any, *args: Any) -> tuple[Array, PyTree, Array]:
        def output(params: PyTree) -> Any:
            return output_fn(params, *args)

        loss, g = jax.value_and_grad(loss_fn)(params, *args)
        u = jax.grad(output)(params)
        steeper, norm = finite_difference_hvp(output, params, u, r, grads=u, eps=eps)
        total = jax.tree.map(
            lambda g, s: g + jnp.asarray(multiplier * rho, s.dtype) * s, widen(g, params), steeper
        )
        return loss, narrow_like(total, params), norm

    return fn


class IgniteMultiplier(NamedTuple):
    """``init() -> multiplier`` and ``update(multiplier, output_grad_norm) -> multiplier``."""

    init: Callable[[], Array]
    update: Callable[[Array, Any], Array]


def ignite_multiplier(
    value: Any,
    *,
    learning_rate: Any = 1e-3,
    threshold: Any = 0.1,
    rho: Any = 0.05,
    nonnegative: bool = False,
) -> IgniteMultiplier:
    r"""The weight of ``ignite_gradient``'s penalty: raised while the norm exceeds a threshold.

    .. math:: \lambda \leftarrow \lambda + \eta\,(\rho \|\nabla h(w)\| - \theta)

    dual ascent for: least loss, subject to :math:`\rho\|\nabla h\| \le \theta`.

    Args:
      value: start; the authors' 1e-3.
      learning_rate: eta, >= 0; 0 fixes the multiplier, as the authors' second script does at 0.01.
      threshold: theta.
      rho: as given to ``ignite_gradient``, >= 0.
      nonnegative: hold the multiplier at zero from below, as theory has it; the authors' code does
        not, and a negative multiplier rewards steepness.

    Returns:
      ``IgniteMultiplier``. The multiplier, a scalar in f32 at least, is the only state: carry it
      along from step to step. Each step uses it as it was before the step's update.

    Raises:
      ValueError: if an argument is out of range.

    >>> multiplier = ignite_multiplier(0.5, learning_rate=0.1, threshold=1.0, rho=0.5)
    >>> float(multiplier.update(multiplier.init(), 6.0))  # 0.5 + 0.1 * (0.5 * 6 - 1)
    0.699999988079071

    Reference: Dao et al., "Incorporating Surrogate Gradient Norm to Improve Offline Optimization
    Techniques", NeurIPS 2024, arXiv 2503.04242.
    """
    check_range(learning_rate=learning_rate, rho=rho, ge=0)
    check_range(value=value, threshold=threshold, ge=-float("inf"))

    def init() -> Array:
        return jnp.asarray(value, hyperparameter_dtype())

    def update(multiplier: Array, output_grad_norm: Any) -> Array:
        dtype = compute_dtype(multiplier)
        new = multiplier + learning_rate * (rho * jnp.asarray(output_grad_norm, dtype) - threshold)
        new = jnp.asarray(new, dtype)
        return jnp.maximum(new, 0) if nonnegative else new

    return IgniteMultiplier(init, update)
