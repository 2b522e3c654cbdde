"""Selective synaptic dampening: makes a trained model forget some of its data, without training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.layout import named_leaves, select_leaves
from optimkit.leaves import check_match, check_real
from optimkit.numerics import check_range, compute_dtype, narrow, safe_div
from optimkit.protocols import Array, LeafSelector, PyTree


class LeafDampening(NamedTuple):
    """``fraction``: of the leaf's entries that are dampened. ``factor``: their mean factor."""

    fraction: Array
    factor: Array


def selective_synaptic_dampening(
    params: PyTree,
    importance_full: PyTree,
    importance_forget: PyTree,
    *,
    alpha: Any = 10.0,
    lam: Any = 1.0,
    exponent: Any = 1.0,
    upper_bound: Any = 1.0,
    mask: LeafSelector = None,
) -> PyTree:
    r"""Shrinks the weights that matter much more for the data to forget than for all data.

    .. math::

        w \leftarrow w \cdot \min\Big(\Big(\frac{\lambda I}{I_f}\Big)^{c}, u\Big)
        \quad\text{where } I_f > \alpha I

    Args:
      params: w, of a trained model.
      importance_full: I, from ``fisher_importance`` over all training data, those to forget too.
      importance_forget: :math:`I_f`, the same over the data to forget.
      alpha: how many times as important, >= 0; 10 for the authors' ResNet-18, 5 to 25 for ViT, 50
        for faces. Too small destroys the model, too large does nothing: see ``ssd_statistics``.
      lam: lambda, >= 0; 1, and 0.1 for faces.
      exponent: c, >= 0; the authors' 1.
      upper_bound: u, >= 0: the largest factor. It acts only where ``lam`` exceeds ``alpha``.
      mask: which leaves may change, True = may: a tree of bools, ``(path, leaf) -> bool`` or path
        patterns; default all, biases and norms too.

    Returns:
      A tree like ``params``, in its dtypes.

    Raises:
      ValueError: if an argument is out of range, or the trees differ.
      TypeError: for a complex or integer leaf.

    Where only the data to forget need a weight (I = 0), it is erased. A zero or NaN importance
    selects nothing. Apply it once: a second time needs new importances. Classes that are much alike
    may lose what they share.

    >>> w, full, forget = jnp.ones(3), jnp.array([1.0, 1.0, 1.0]), jnp.array([20.0, 10.0, 0.0])
    >>> selective_synaptic_dampening(w, full, forget).tolist()
    [0.05000000074505806, 1.0, 1.0]

    Reference: Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024, arXiv 2308.07707. Agrees with the authors' code to rounding.
    """
    chosen, factors = _factors(
        params, importance_full, importance_forget, alpha, lam, exponent, upper_bound, mask
    )

    def dampen(w: Array, s: Array, f: Array) -> Array:
        wide = jnp.asarray(w, compute_dtype(w))
        return narrow(jnp.where(s, f.astype(wide.dtype) * wide, wide), jnp.result_type(w))

    return jax.tree.map(dampen, params, chosen, factors)


def ssd_statistics(
    params: PyTree,
    importance_full: PyTree,
    importance_forget: PyTree,
    *,
    alpha: Any = 10.0,
    lam: Any = 1.0,
    exponent: Any = 1.0,
    upper_bound: Any = 1.0,
    mask: LeafSelector = None,
) -> dict[str, LeafDampening]:
    """What ``selective_synaptic_dampening`` would do, leaf by leaf; arguments as there.

    Returns:
      ``{path: LeafDampening(fraction, factor)}``; the factor is 1 where nothing is selected.

    >>> full, forget = jnp.array([1.0, 1.0]), jnp.array([20.0, 10.0])
    >>> found = ssd_statistics({"w": jnp.ones(2)}, {"w": full}, {"w": forget})["w"]
    >>> round(float(found.fraction), 3), round(float(found.factor), 3)
    (0.5, 0.05)
    """
    chosen, factors = _factors(
        params, importance_full, importance_forget, alpha, lam, exponent, upper_bound, mask
    )

    def summary(s: Array, f: Array) -> LeafDampening:
        number = jnp.sum(s).astype(f.dtype)
        mean = safe_div(jnp.sum(jnp.where(s, f, 0)), number, otherwise=1.0)
        return LeafDampening(number / max(s.size, 1), mean)

    pairs = zip(named_leaves(chosen), jax.tree.leaves(factors), strict=True)
    return {name: summary(s, f) for (name, s), f in pairs}


def _factors(
    params: PyTree,
    full: PyTree,
    forget: PyTree,
    alpha: Any,
    lam: Any,
    exponent: Any,
    upper_bound: Any,
    mask: LeafSelector,
) -> tuple[PyTree, PyTree]:
    """Which entries are selected, and the factor of each entry."""
    check_range(alpha=alpha, lam=lam, exponent=exponent, upper_bound=upper_bound, ge=0)
    check_real(params, "parameter")
    check_match(full, params, what="importance_full", like="the parameters")
    check_match(forget, params, what="importance_forget", like="the parameters")
    marks = select_leaves(mask, params, default=lambda name, leaf: True, argument="mask")

    def selected(mark: Any, i: Array, f: Array) -> Array:
        dtype = compute_dtype(i, f)
        return mark & (jnp.asarray(f, dtype) > alpha * jnp.asarray(i, dtype))

    def factor(i: Array, f: Array) -> Array:
        dtype = compute_dtype(i, f)
        ratio = safe_div(lam * jnp.asarray(i, dtype), jnp.asarray(f, dtype))
        return jnp.minimum(ratio**exponent, upper_bound)

    return jax.tree.map(selected, marks, full, forget), jax.tree.map(factor, full, forget)
