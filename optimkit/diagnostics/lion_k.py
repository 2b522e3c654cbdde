"""What Lion-K minimises: its Lyapunov function, and how far weights are outside their bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, check_real, widen
from optimkit.numerics import check_choice, check_range, tree_vdot
from optimkit.protocols import Array, PyTree
from optimkit.transforms.kappa import GLOBAL_KAPPAS, SCOPES, Kappa, kappa_function

MARGIN = 1e-5
"""How far outside the domain of K* rounding may carry weights that sit on its edge."""

Scope = Literal["leaf", "global"]


def constraint_violation(
    params: PyTree, kappa: str | Kappa, weight_decay: Any, *, scope: Scope = "leaf"
) -> Array:
    r"""How far :math:`\lambda w` is outside the set to which Lion-K's decay confines it.

    ``max(0, ||wd w||_* - 1)`` with the dual norm of K: the largest |entry| for ``l1``, so that 0
    says that all weights lie in the box |w| <= 1/wd.

    Args:
      params: the weights; leave out those that are not decayed.
      kappa: a name of ``lion_k``'s table that needs no arguments, or a ``Kappa`` from
        ``optimkit.transforms.kappa.kappa_function``.
      weight_decay: the decay that trained them, >= 0.
      scope: the scope that trained them. With ``"leaf"``, the worst leaf counts.

    Returns:
      A scalar; 0 inside, and always for ``half_squared``, which has no constraint.

    Raises:
      ValueError: for an unknown name, or an argument out of range.
      TypeError: for complex or integer leaves.

    >>> import jax.numpy as jnp
    >>> float(constraint_violation({"w": jnp.array([0.5, -3.0])}, "l1", 0.5))
    0.5
    """
    check_range(weight_decay=weight_decay, ge=0)
    function, groups = _resolve(kappa, params, scope)
    return jnp.maximum(_worst(function.gauge, _scaled(groups, weight_decay)) - 1, 0)


def lion_k_lyapunov(
    params: PyTree,
    momentum: PyTree,
    f_value: Any,
    *,
    kappa: str | Kappa,
    weight_decay: Any,
    alpha: Any,
    gamma: Any,
    epsilon: Any,
    scope: Scope = "leaf",
) -> Array:
    r"""The function that Lion-K's flow never lets grow.

    For the flow :math:`\dot m = -\alpha\nabla f(x) - \gamma m`,
    :math:`\dot x = \partial K(\tilde m) - \lambda x` with
    :math:`\tilde m = m - \epsilon(\alpha\nabla f + \gamma m)`:

    .. math::

        H = \alpha f(x) + \frac{\gamma}{\lambda} K^*(\lambda x)
            + \frac{1 - \epsilon\gamma}{1 + \epsilon\lambda}
              \big(K^*(\lambda x) + K(m) - \lambda\langle x, m\rangle\big)

    Args:
      params: x.
      momentum: m, which points downhill: minus the ``mu`` of ``scale_by_lion_k``.
      f_value: the loss at x.
      kappa: a name that needs no arguments, or a ``Kappa`` from ``kappa_function``.
      weight_decay: lambda, > 0.
      alpha: weight of the gradient in the flow, > 0.
      gamma: decay of the momentum in the flow, > 0.
      epsilon: weight of the look-ahead, >= 0, with epsilon gamma <= 1.
      scope: norms of each leaf, or of the whole tree.

    Returns:
      A scalar; infinite while lambda x lies outside the domain of K*, which training enters
      exponentially fast.

    Raises:
      ValueError: for an unknown name, an argument out of range, or trees that differ.
      TypeError: for complex or integer leaves.

    It falls along the continuous flow of a smooth K; at finite steps, and for the sign, it is
    a picture and no proof. How b1, b2 and the rate map to alpha, gamma and epsilon is not
    part of it. The formula is recalled from the paper, and its decrease checked.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([0.5])
    >>> float(lion_k_lyapunov(x, -x, 1.0, kappa="half_squared", weight_decay=1.0, alpha=1.0,
    ...                       gamma=1.0, epsilon=0.0))
    1.625

    Reference: Chen et al., "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
    ICLR 2024, arXiv 2310.05898.
    """
    check_range(weight_decay=weight_decay, alpha=alpha, gamma=gamma, gt=0)
    check_range(epsilon=epsilon, ge=0)
    check_match(momentum, params, what="momentum", like="the parameters")
    function, groups = _resolve(kappa, params, scope)
    _, momenta = _resolve(function, momentum, scope)
    scaled = _scaled(groups, weight_decay)
    conjugate = jnp.where(
        _worst(function.gauge, scaled) <= 1 + MARGIN, _sum(function.conjugate, scaled), jnp.inf
    )
    gap = conjugate + _sum(function.value, momenta) - weight_decay * tree_vdot(params, momentum)
    share = (1 - epsilon * gamma) / (1 + epsilon * weight_decay)
    return alpha * f_value + gamma / weight_decay * conjugate + share * gap


Groups = list[list[Array]]


def _resolve(kappa: str | Kappa, tree: PyTree, scope: str) -> tuple[Kappa, Groups]:
    """The function, and the leaves in groups that share a norm."""
    check_choice(SCOPES, scope=scope)
    check_real(tree, "parameter")
    if scope == "global" and isinstance(kappa, str):
        check_choice(GLOBAL_KAPPAS, kappa=kappa)
    function = kappa_function(kappa) if isinstance(kappa, str) else kappa
    leaves = jax.tree.leaves(widen(tree))
    return function, [leaves] if scope == "global" else [[leaf] for leaf in leaves]


def _scaled(groups: Groups, factor: Any) -> Groups:
    return [[x * jnp.asarray(factor, x.dtype) for x in group] for group in groups]


def _sum(function: Callable[[list[Array]], Array], groups: Groups) -> Array:
    return sum((function(group) for group in groups), start=jnp.zeros(()))


def _worst(function: Callable[[list[Array]], Array], groups: Groups) -> Array:
    worst = jnp.zeros(())
    for group in groups:
        worst = jnp.maximum(worst, function(group))
    return worst
