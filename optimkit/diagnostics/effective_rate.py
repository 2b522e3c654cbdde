"""How fast scale-invariant weights really turn: the effective rate, and the angle of a step."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, check_real
from optimkit.numerics import check_choice, compute_dtype, safe_div, safe_norm
from optimkit.protocols import Array, PyTree

RULES = {"adam": 1, "sgd": 2}
"""The power of the norm by which an update rule's effect on the direction falls."""


def effective_learning_rate(
    params: PyTree, learning_rate: Any, *, rule: Literal["adam", "sgd"] = "adam"
) -> PyTree:
    r"""The rate that acts on each leaf's direction, if the network is invariant to its scale.

    .. math:: \eta_{eff} = \eta / \|W\| \text{ (adam)}, \qquad \eta / \|W\|^2 \text{ (sgd)}

    A gradient shrinks like :math:`1/\|W\|`; SGD passes that on, Adam and sign updates do not.

    Args:
      params: the parameters.
      learning_rate: eta, at this step.
      rule: ``"sgd"`` for updates proportional to the gradient, ``"adam"`` for those of a size of
        their own.

    Returns:
      One f32 scalar a leaf, in a tree like ``params``; zero for a leaf of norm zero.

    Raises:
      ValueError: for an unknown rule.

    >>> import jax.numpy as jnp
    >>> rates = effective_learning_rate({"w": jnp.array([3.0, 4.0])}, 0.5, rule="sgd")
    >>> round(float(rates["w"]), 3)
    0.02

    Reference: Lyle et al., "Normalization and effective learning rates in reinforcement learning",
    NeurIPS 2024, arXiv 2407.01800.
    """
    check_choice(tuple(RULES), rule=rule)
    check_real(params, "parameter")

    def of_leaf(w: Array) -> Array:
        norm = safe_norm(jnp.asarray(w, compute_dtype(w)))
        rate = safe_div(jnp.asarray(learning_rate, norm.dtype), norm)
        return safe_div(rate, norm) if rule == "sgd" else rate

    return jax.tree.map(of_leaf, params)


def angular_update(params: PyTree, new_params: PyTree) -> PyTree:
    r"""The angle, in radians, by which each leaf has turned.

    Args:
      params: the parameters before a step, or before many.
      new_params: those after it.

    Returns:
      One f32 scalar a leaf, in [0, pi]; zero where a leaf is zero on either side. Small angles are
      accurate too.

    Raises:
      ValueError: if the two trees differ in structure or shapes.

    >>> import jax.numpy as jnp
    >>> turned = angular_update({"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([3.0, 3.0])})
    >>> round(float(turned["w"]) / float(jnp.pi), 3)
    0.25
    """
    check_match(new_params, params, what="new parameters", like="the parameters")
    check_real(params, "parameter")

    def of_leaf(old: Array, new: Array) -> Array:
        wide = compute_dtype(old, new)
        old, new = jnp.asarray(old, wide), jnp.asarray(new, wide)
        norms = safe_norm(old), safe_norm(new)
        # Half-angle form: the arc cosine has no digits left below 1e-4.
        a, b = safe_div(old, norms[0]), safe_div(new, norms[1])
        angle = 2 * jnp.arctan2(safe_norm(a - b), safe_norm(a + b))
        return jnp.where((norms[0] > 0) & (norms[1] > 0), angle, 0)

    return jax.tree.map(of_leaf, params, new_params)
