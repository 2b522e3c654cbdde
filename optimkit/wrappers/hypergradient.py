"""Hypergradient descent: the rate itself goes down the gradient of the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, widen, zeros_like
from optimkit.numerics import (
    check_range,
    hyperparameter_dtype,
    narrow,
    safe_div,
    tree_norm,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.alignment import after, alignment, limited


class HypergradientState(NamedTuple):
    """``learning_rate``: scalar in f32 or better, the rate of the last update.

    ``last_update``: the last direction, before the rate, one array a parameter.
    """

    learning_rate: Array
    last_update: PyTree
    inner_state: PyTree


def hypergradient(
    inner: optax.GradientTransformation,
    learning_rate: Any,
    *,
    hyper_lr: Any,
    min_lr: Any = None,
    max_lr: Any = None,
    multiplicative: bool = False,
) -> GradientTransformation:
    r"""Applies a rate that rises while successive steps agree, and falls when they turn back.

    The derivative of the loss by the last rate is :math:`-\langle g_t, u_{t-1}\rangle`, where u is
    the direction that ``inner`` makes of the gradient. With :math:`u_0 = 0`:

    .. math::

        h &= \langle g_t, u_{t-1}\rangle \text{ over all leaves}, \qquad
        \eta_t = \eta_{t-1} + \beta h \\
        \Delta w_t &= -\eta_t\, u_t

    The new rate acts at once.

    Args:
      inner: gives the direction, without rate and sign: ``optax.identity()`` is SGD,
        ``scale_by_adam()`` is Adam.
      learning_rate: the first rate, >= 0, a number; a schedule is refused. 0 works, except with
        ``multiplicative``: the first step then moves nothing and the second raises the rate.
      hyper_lr: beta, the rate of the rate, >= 0. It has the scale of ``learning_rate`` over a
        squared gradient norm, so no value suits all losses.
      min_lr: lower bound. None, as in the authors' code, lets the rate become negative after
        gradients that turn back hard: the method then climbs. 0 is recommended.
      max_lr: upper bound; None: none.
      multiplicative: :math:`\eta_t = \eta_{t-1}(1 + \beta\cos(g_t, u_{t-1}))` instead, which does
        not depend on the scale of the loss. Provisional: recalled from the paper; the authors' code
        does not have it.

    Returns:
      A transformation that replaces the rate at the end of a chain; needs what ``inner`` needs. It
      keeps 4 bytes a f32 parameter, a scalar, and the state of ``inner``.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.
      TypeError: if ``learning_rate`` is a schedule, or a leaf is complex or integer.

    The rate is kept in f32 (f64 under x64): steps of it below 6e-8 of itself are lost. Rate and
    product are limited to 1e15 in f32. A non-finite gradient poisons the rate for good; put
    ``optax.apply_if_finite`` around. ``get_learning_rate(state)`` reads the rate.

    >>> import jax.numpy as jnp, optax
    >>> tx = hypergradient(optax.identity(), 0.1, hyper_lr=0.01)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([2.0]), state)
    >>> round(float(state.learning_rate), 6), round(float(updates[0]), 6)  # 0.1 + 0.01 * 2 * 2
    (0.14, -0.28)

    Reference: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR
    2018, arXiv 1703.04782. The product is taken over all leaves before any moves, as in the paper;
    the authors' Adam adds leaf by leaf, so that early leaves move at an unfinished rate.
    """
    return hypergradient_decayed(
        inner,
        learning_rate,
        None,
        hyper_lr=hyper_lr,
        min_lr=min_lr,
        max_lr=max_lr,
        multiplicative=multiplicative,
    )


def hypergradient_decayed(
    inner: optax.GradientTransformation,
    learning_rate: Any,
    weight_decay: Any,
    *,
    hyper_lr: Any,
    min_lr: Any = None,
    max_lr: Any = None,
    multiplicative: bool = False,
) -> GradientTransformation:
    """``hypergradient`` with coupled weight decay in front, for the speed of a recipe.

    The decayed gradient is needed for the product, and again once the rate is known. A link in
    front would store it in between, 4 bytes a parameter; here the product is a sum of two.

    Args:
      inner: gives the direction.
      learning_rate: the first rate; this and all else as for ``hypergradient``.
      weight_decay: ``weight_decay`` times the parameter is added to the gradient; None: nothing is.
      hyper_lr: the rate of the rate.
      min_lr: lower bound.
      max_lr: upper bound.
      multiplicative: raise the rate by a factor; not with weight decay.
    """
    if callable(learning_rate):
        raise TypeError("learning_rate must be a number, the first rate, got a schedule")
    check_range(learning_rate=learning_rate, hyper_lr=hyper_lr, ge=0)
    check_range(min_lr=min_lr, max_lr=max_lr, gt=-jnp.inf, lt=jnp.inf)
    if min_lr is not None:
        check_range(**{"learning_rate - min_lr": learning_rate - min_lr}, ge=0)
    if max_lr is not None:
        check_range(**{"max_lr - learning_rate": max_lr - learning_rate}, ge=0)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> HypergradientState:
        rate = jnp.array(learning_rate, hyperparameter_dtype(), copy=True)
        return HypergradientState(rate, zeros_like(params), inner.init(widen(params)))

    def next_rate(rate: Array, gradients: PyTree, last: PyTree, params: PyTree | None) -> Array:
        product = alignment(gradients, last)
        if weight_decay is not None:  # of sums, since the sum of two arrays would be stored
            product = limited(product + weight_decay * alignment(params, last))
        if multiplicative:
            norms = tree_norm(gradients) * tree_norm(last)
            new = rate * (1 + hyper_lr * safe_div(product, norms))
        else:
            new = rate + hyper_lr * product
        return jnp.clip(limited(new), min_lr, max_lr).astype(rate.dtype)

    def update(
        updates: PyTree, state: HypergradientState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, HypergradientState]:
        check_real(updates, "gradient")
        check_match(updates, state.last_update, what="gradient", like="the state")
        gradients = widen(updates, state.last_update)
        params = None if params is None else widen(params)

        rate = next_rate(state.learning_rate, gradients, state.last_update, params)
        gradients = after(rate, gradients)
        if weight_decay is not None:
            gradients = jax.tree.map(lambda g, p: g + weight_decay * p, gradients, params)
        directions, inner_state = inner.update(gradients, state.inner_state, params, **extra)
        updates = jax.tree.map(
            lambda u, g: narrow(-rate.astype(u.dtype) * u, jnp.result_type(g)), directions, updates
        )
        return updates, HypergradientState(rate, after(rate, directions), inner_state)

    return transformation(init, update)


def get_learning_rate(opt_state: PyTree) -> Array:
    """The rate of the last update, read off the state of a method that sets its own rate.

    Args:
      opt_state: any optimizer state that holds one state with a ``learning_rate``, however deep.

    Returns:
      A scalar.

    Raises:
      ValueError: if there is no such state, or several.

    >>> import jax.numpy as jnp, optimkit as ok
    >>> state = ok.sgd_hd(0.5).init(jnp.zeros(2))
    >>> float(get_learning_rate(state))
    0.5
    """

    def has_rate(node: Any) -> bool:
        return "learning_rate" in getattr(node, "_fields", ())

    nodes = [node for node in jax.tree.leaves(opt_state, is_leaf=has_rate) if has_rate(node)]
    if len(nodes) != 1:
        raise ValueError(
            f"opt_state holds {len(nodes) or 'no'} states with a learning_rate of their own, it "
            "must hold exactly one" + ("; pass the part that is meant" if nodes else "")
        )
    return nodes[0].learning_rate


RECORD = Method(
    factory=hypergradient,
    kind="wrapper",
    summary="a rate that follows the product of successive gradients and directions",
    example={"learning_rate": 1e-2, "hyper_lr": 1e-4, "min_lr": 0.0, "max_lr": 1.0},
    example_made={"inner": scale_by_adam},
    traced=("learning_rate", "hyper_lr", "min_lr", "max_lr"),
    static=("inner", "multiplicative"),
    position="last",
    communication="reduce",
    response="bounded",
    state_bytes=12,
    moved_bytes=44,  # 36, and gradient and last direction once more for the product
    paper='Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, '
    "arXiv 1703.04782",
    reference="gbaydin/hypergradient-descent@020d6080c4cedfbc88d5cdb7a2a53f92b34c2b16:"
    "hypergrad/sgd_hd.py:SGDHD",
    licence="MIT",
)
