"""GLAD: LoRA factors trained with a gradient that SAM's gradient steers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.gradients.sam import sam_reference_grads
from optimkit.layout import is_lora_leaf, select_leaves
from optimkit.leaves import check_match, check_real, require_params
from optimkit.numerics import check_range
from optimkit.protocols import (
    GradientTransformation,
    LeafSelector,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.regularize_gradient import Mode, Norm, regularize_gradient
from optimkit.wrappers.sam import slope_extras


def gradient_regularized_lora(
    inner: optax.GradientTransformation,
    *,
    rho: Any = 0.05,
    mode: Mode = "conflict",
    strength: Any = 1.0,
    per_leaf: bool = False,
    norm: Norm = "keep_projected",
    eps: Any = 1e-12,
    adaptive: bool = False,
    lora_leaves: LeafSelector = None,
) -> GradientTransformation:
    r"""Trains the LoRA factors alone, with a gradient that is steered towards flat regions.

    .. math::

        r = \nabla L\Big(w + \rho \frac{g}{\|g\|}\Big), \qquad
        u = \text{inner}\big(\text{regularize\_gradient}(g, r)\big)

    Few examples and a large model: LoRA alone overfits. SAM's gradient r, taken where the loss is
    about the highest nearby, corrects the direction of g.

    Args:
      inner: the optimizer of the factors. It sees nothing else.
      rho: how far uphill, >= 0; SAM's usual 0.05.
      mode: how r steers g: ``"conflict"``, ``"align"`` or ``"blend"`` (see
        ``regularize_gradient``).
      strength: how much, >= 0.
      per_leaf: leaf by leaf instead of over all factors.
      norm: ``"restore"`` gives the result the norm of g.
      eps: guards both divisions, >= 0.
      adaptive: way uphill relative to the size of each weight.
      lora_leaves: what is trained: a tree of bools, ``(path, leaf) -> bool`` or patterns; default
        everything below a component ``lora_a`` or ``lora_b``. All else gets a zero update.

    Returns:
      A transformation with the state of ``inner``. ``update`` needs ``params`` and ``grad_fn``,
      from parameters to their gradient on the batch of this step; or ``value_fn``, the loss, which
      is then differentiated here. That is a second forward and backward pass a step. With data on
      several devices it must average as the first one did.

    Raises:
      ValueError: if an argument is out of range, an extra argument is missing, no leaf is a factor,
        or a gradient has another shape.

    Provisional: the paper says that it tunes CLIP by LoRA and that a SAM gradient is the reference
    for the ordinary one; its formula was not accessible, and no code was published. Modes,
    ``strength`` and all defaults are ours. With a small rho ``"conflict"`` seldom acts. While
    ``lora_b`` is zero, ``lora_a`` has no gradient and only ``lora_b`` moves.

    >>> import jax, jax.numpy as jnp, optax
    >>> def loss(p): return (p["kernel"] + p["lora_a"] * p["lora_b"] - 1.0) ** 2
    >>> params = {"kernel": jnp.array(3.0), "lora_a": jnp.array(1.0), "lora_b": jnp.array(0.5)}
    >>> tx = gradient_regularized_lora(optax.sgd(0.25))
    >>> grads = jax.grad(loss)(params)
    >>> updates, _ = tx.update(grads, tx.init(params), params, grad_fn=jax.grad(loss))
    >>> {name: float(u) for name, u in updates.items()}
    {'kernel': 0.0, 'lora_a': -0.625, 'lora_b': -1.25}

    Reference: Peng et al., "GLAD: Generalizable Tuning for Vision-Language Models", 2025,
    arXiv 2507.13089.
    """
    check_range(rho=rho, eps=eps, ge=0)
    inner = optax.with_extra_args_support(inner)
    steer = regularize_gradient(mode=mode, strength=strength, per_leaf=per_leaf, norm=norm, eps=eps)

    def chosen(params: PyTree) -> PyTree:
        marks = select_leaves(lora_leaves, params, default=is_lora_leaf, argument="lora_leaves")
        if jax.tree.leaves(marks) and not any(jax.tree.leaves(marks)):
            raise ValueError(
                "no parameter is a LoRA factor: call the factors lora_a and lora_b, or name what "
                "is trained in lora_leaves"
            )
        return marks

    def init(params: PyTree) -> PyTree:
        check_real(params, "parameter")
        return inner.init(_only(chosen(params), params))

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        params = require_params(params, "gradient_regularized_lora")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        if grad_fn is None:
            if extra.get("value_fn") is None:
                raise ValueError(
                    "gradient_regularized_lora needs grad_fn or value_fn: call "
                    "update(gradients, state, params, grad_fn=...)"
                )
            grad_fn = jax.grad(extra["value_fn"])
        marks = chosen(params)
        # Frozen leaves stay where they are on the way uphill, and count in no norm.
        climbing = jax.tree.map(lambda mark, g: g if mark else jnp.zeros_like(g), marks, updates)
        reference = sam_reference_grads(
            grad_fn, params, climbing, rho=rho, eps=eps, adaptive=adaptive
        )
        few, _ = steer.update(
            _only(marks, updates),
            optax.EmptyState(),
            reference_grads=_only(marks, reference),
        )
        few, state = inner.update(few, state, _only(marks, params), **extra)
        return _with_zeros(few, updates), state

    return transformation(init, update)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _only(marks: PyTree, tree: PyTree) -> PyTree:
    """The tree without the leaves that are not chosen, as ``optax.masked`` leaves them out."""
    return jax.tree.map(lambda mark, x: x if mark else optax.MaskedNode(), marks, tree)


def _with_zeros(few: PyTree, like: PyTree) -> PyTree:
    """The full tree again; zero where a leaf was left out."""
    leaves, structure = jax.tree.flatten(like)
    found = structure.flatten_up_to(few)
    filled = [
        jnp.zeros_like(old) if _is_masked(new) else new
        for old, new in zip(leaves, found, strict=True)
    ]
    return structure.unflatten(filled)


def _everything(name: str, leaf: Any) -> bool:
    del name, leaf
    return True


RECORD = Method(
    factory=gradient_regularized_lora,
    kind="wrapper",
    summary="LoRA factors trained with a gradient steered by SAM's",
    example={"lora_leaves": _everything, "per_leaf": True, "strength": 0.5},
    example_made={"inner": scale_by_adam},
    extras=slope_extras,
    exempt={"fidelity": "no code was published, and the paper's formula was not accessible"},
    traced=("rho", "strength", "eps"),
    static=("inner", "mode", "per_leaf", "norm", "adaptive", "lora_leaves"),
    needs=("params", "grad_fn"),
    position="any",
    communication="reduce",
    response="bounded",
    state_bytes=8,
    moved_bytes=28,
    status="provisional",
    paper='Peng et al., "GLAD: Generalizable Tuning for Vision-Language Models", 2025, '
    "arXiv 2507.13089",
)
