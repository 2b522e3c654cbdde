"""Sharpness-aware gradients: taken at the nearby point where the loss is about the highest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.layout import select_leaves
from optimkit.leaves import check_match, narrow_like, widen
from optimkit.numerics import check_choice, check_range, safe_div, tree_norm
from optimkit.protocols import Array, LeafSelector, PyTree


def sam_perturbed_params(
    params: PyTree,
    grads: PyTree,
    *,
    rho: Any = 0.05,
    eps: Any = 1e-12,
    adaptive: bool = False,
) -> PyTree:
    r"""The parameters moved uphill, by ``rho`` in all.

    .. math::

        w' = w + \rho\, \frac{g}{\|g\| + \epsilon} \quad\text{or, adaptive,}\quad
        w' = w + \rho\, \frac{w^2 g}{\|\,|w|\, g\,\| + \epsilon}

    Args:
      params: w.
      grads: g, a tree like them.
      rho: length of the way, >= 0.
      eps: added to the norm, >= 0; a zero gradient moves nothing.
      adaptive: measure the way relative to the size of each weight.

    Returns:
      A tree like ``params``, in its dtypes. Added in f32 and then rounded: in bfloat16 a way of
      less than 2^-9 of a weight is lost.

    Raises:
      ValueError: if an argument is out of range, or the trees differ.

    >>> sam_perturbed_params(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), rho=0.5).tolist()
    [1.2999999523162842, 2.4000000953674316]

    Reference: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021, arXiv 2010.01412; Kwon et al., "ASAM", ICML 2021, arXiv 2102.11600.
    """
    check_range(rho=rho, eps=eps, ge=0)
    return narrow_like(_uphill(params, grads, rho, eps, adaptive), params)


def _uphill(params: PyTree, grads: PyTree, rho: Any, eps: Any, adaptive: bool) -> PyTree:
    """The perturbed parameters in f32 at least."""
    check_match(grads, params, what="gradient", like="the parameters")
    w, g = widen(params), widen(grads, params)
    scaled = jax.tree.map(lambda w, g: jnp.abs(w) * g, w, g) if adaptive else g
    norm = tree_norm(scaled) + eps

    def move(w: Array, s: Array) -> Array:
        way = rho * safe_div(s, norm.astype(s.dtype))
        return w + (jnp.abs(w) * way if adaptive else way)

    return jax.tree.map(move, w, scaled)


def sam_reference_grads(
    grad_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    grads: PyTree,
    *,
    rho: Any = 0.05,
    eps: Any = 1e-12,
    adaptive: bool = False,
) -> PyTree:
    r"""The gradient at ``sam_perturbed_params``: what SAM descends along.

    Args:
      grad_fn: from parameters to their gradient, on the batch that ``grads`` was taken on. Where
        gradients are averaged over devices, it must average too.
      params: the parameters.
      grads: their gradient.
      rho: length of the way, >= 0; 0.05 is SAM's usual value.
      eps: added to the norm, >= 0.
      adaptive: measure the way relative to the size of each weight.

    Returns:
      A tree like ``params``; it costs one more forward and backward pass.

    Raises:
      ValueError: if an argument is out of range, or the trees differ.

    >>> w = jnp.array([1.0, 2.0])  # of the loss (w0^2 + 4 w1^2) / 2
    >>> sam_reference_grads(lambda w: jnp.array([1.0, 4.0]) * w, w, jnp.array([3.0, 4.0]), rho=0.5)
    Array([1.3, 9.6], dtype=float32)

    Reference: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021, arXiv 2010.01412.
    """
    reference = grad_fn(sam_perturbed_params(params, grads, rho=rho, eps=eps, adaptive=adaptive))
    check_match(reference, params, what="gradient of grad_fn", like="the parameters")
    return reference


def sam_gradient_parts(
    loss_fn: Callable[..., Any],
    *,
    rho: Any = 0.05,
    adaptive: bool = False,
    eps: Any = 1e-12,
    has_aux: bool = False,
    aux_from: Literal["first", "second"] = "first",
    axis_name: Any = None,
    sync_perturbation: bool = True,
    mask: LeafSelector = None,
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    """``sam_gradient`` with both gradients: ``fn(params, *args, **kw) -> (value, g, g_sam)``.

    ``g_sam - g`` is rho times the gradient of the gradient's norm, to first order. Arguments and
    errors are those of ``sam_gradient``.

    >>> parts = sam_gradient_parts(lambda w: jnp.sum(w**2) / 2, rho=0.5)
    >>> value, g, g_sam = parts(jnp.array([3.0, 4.0]))
    >>> float(value), (g_sam - g).tolist()
    (12.5, [0.2999999523162842, 0.40000009536743164])
    """
    check_range(rho=rho, eps=eps, ge=0)
    check_choice(("first", "second"), aux_from=aux_from)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def averaged(tree: PyTree) -> PyTree:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, PyTree]:
        chosen = select_leaves(mask, params, default=lambda name, leaf: True, argument="mask")
        here = params if axis_name is None else _own_copy(params, axis_name)
        value, own = value_and_grad(here, *args, **kwargs)
        g = averaged(own)
        if isinstance(rho, (int, float)) and rho == 0:
            return _averaged_value(value, has_aux, averaged), g, g
        direction = g if sync_perturbation else own
        climbing = jax.tree.map(lambda c, x: x if c else jnp.zeros_like(x), chosen, direction)
        # In f32 at least: in bfloat16 most of the way would be rounded off.
        ahead = _uphill(params, climbing, rho, eps, adaptive)
        ahead = ahead if axis_name is None else _own_copy(ahead, axis_name)
        second, g_sam = value_and_grad(ahead, *args, **kwargs)
        if has_aux and aux_from == "second":
            value = (value[0], second[1])
        value = _averaged_value(value, has_aux, averaged)
        return value, g, narrow_like(averaged(g_sam), params)

    return fn


def sam_gradient(
    loss_fn: Callable[..., Any],
    *,
    rho: Any = 0.05,
    adaptive: bool = False,
    eps: Any = 1e-12,
    has_aux: bool = False,
    aux_from: Literal["first", "second"] = "first",
    axis_name: Any = None,
    sync_perturbation: bool = True,
    mask: LeafSelector = None,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""``jax.value_and_grad``, with the gradient taken where the loss nearby is about the highest.

    .. math::

        g' = \nabla L(w + e), \qquad e = \rho \frac{g}{\|g\| + \epsilon}, \qquad g = \nabla L(w)

    and, adaptive, :math:`e = \rho\, w^2 g / (\|\,|w|\, g\,\| + \epsilon)`. The norm is that of all
    leaves together. Feed g' to any optimizer, which steps from w, and decays w.

    Args:
      loss_fn: from parameters, and what else is given, to a scalar; or ``(scalar, aux)``.
      rho: length of the way, >= 0. 0 gives the plain gradient, bit for bit, at its price. 0.05 is
        the authors' value; the adaptive form is usually run with 2.
      adaptive: measure the way relative to the size of each weight (ASAM).
      eps: added to the norm, >= 0; a zero gradient moves nothing.
      has_aux: whether the loss returns ``(scalar, aux)``.
      aux_from: which of the two passes ``aux`` is taken from. ``"first"``: batch norm statistics
        are those of w, as in the authors' code.
      axis_name: of devices, each with its share of the batch, over which loss and gradients are
        averaged. ``aux`` is each device's own.
      sync_perturbation: all devices move by the averaged gradient; False: each by its own
        (m-sharpness), as in the authors' code unless told otherwise. Needs ``axis_name``.
      mask: which leaves move, True = moves: a tree of bools, ``(path, leaf) -> bool`` or path
        patterns; default all. The others count in no norm; all leaves get their gradient.

    Returns:
      ``fn(params, *args, **kw) -> (value, gradient)``, of the shapes that
      ``jax.value_and_grad(loss_fn, has_aux=has_aux)`` gives; the value is the loss at w. It keeps
      no state, and costs two gradients.

    Raises:
      ValueError: if an argument is out of range, or the mask is of another tree.

    The second pass gets its parameters in f32 at least, whatever their dtype, since a way of 0.05
    over a whole model is less than bfloat16 resolves; the gradient comes back in their dtype. Both
    passes see the same arguments, so the same random keys. To accumulate micro-batches, wrap the
    loss over all of them. NaN in the first gradient is NaN in the second.

    >>> fn = sam_gradient(lambda w: (w[0] ** 2 + 4 * w[1] ** 2) / 2, rho=0.5)
    >>> value, gradient = fn(jnp.array([3.0, 1.0]))  # gradient (3, 4), so w + e = (3.3, 1.4)
    >>> float(value), gradient
    (6.5, Array([3.3, 5.6], dtype=float32))

    Reference: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021, arXiv 2010.01412. Agrees with ``davda54/sam`` to rounding.
    """
    parts = sam_gradient_parts(
        loss_fn,
        rho=rho,
        adaptive=adaptive,
        eps=eps,
        has_aux=has_aux,
        aux_from=aux_from,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        mask=mask,
    )

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        value, _, g_sam = parts(params, *args, **kwargs)
        return value, g_sam

    return fn


def _own_copy(params: PyTree, axis_name: Any) -> PyTree:
    """Marks replicated parameters as each device's own, so that gradients are not summed yet."""
    zero = jax.lax.axis_index(axis_name) * 0
    return jax.tree.map(lambda w: w + zero.astype(jnp.result_type(w)), params)


def _averaged_value(value: Any, has_aux: bool, averaged: Callable[[PyTree], PyTree]) -> Any:
    return (averaged(value[0]), value[1]) if has_aux else averaged(value)
