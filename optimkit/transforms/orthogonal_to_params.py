"""perpGrad: what of a gradient points along the weights themselves is taken out."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optimkit.leaves import check_match, check_real, require_params
from optimkit.numerics import (
    check_choice,
    check_range,
    compute_dtype,
    in_turn,
    narrow,
    safe_div,
    saturate,
    sums_together,
    tree_norm,
    tree_vdot,
    turn_after,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.project_to_norm import projected_leaves

ROUNDING = 4
"""What is left of a gradient parallel to the weights is noise of this many units of precision."""


def restored(o: Array, norm: Array, left: Array, eps: Any) -> Array:
    """``o``, of norm ``left``, brought back to the gradient's norm; zero where ``o`` is noise."""
    noise = ROUNDING * float(jnp.finfo(o.dtype).eps) * norm
    scale = jnp.where(left > noise, safe_div(norm, left + eps), 0)
    return o * jnp.where(jnp.isfinite(left), scale, 1).astype(o.dtype)


def orthogonal_to_params(
    *,
    rescale: bool = True,
    eps: Any = 1e-30,
    scope: Literal["leaf", "global"] = "leaf",
    mask: Any = None,
) -> GradientTransformation:
    r"""Removes the component of the gradient that is parallel to the weights.

    .. math::

        o = g - \frac{\langle w, g\rangle}{\langle w, w\rangle + \epsilon}\, w, \qquad
        g \leftarrow o\, \frac{\|g\|}{\|o\| + \epsilon} \text{ with rescale, else } o

    Once a classifier fits its training set, the gradient of the cross-entropy mostly scales the
    logits up, until the softmax rounds the loss to zero and learning stops. The moments of the
    optimizer that follows are built from what is left; its step is not projected, so momentum and
    decay may still change norms.

    Args:
      rescale: give the result the norm of the gradient, as the authors' code does; False is the
        paper's formula.
      eps: guards both divisions, >= 0; 1e-30 is the authors'.
      scope: ``"leaf"`` projects each leaf on its own; ``"global"`` treats the projected leaves as
        one vector, which is ours.
      mask: which leaves are projected (True = projected): a tree of bools, a function of the
        parameters, or path patterns. Default: all.

    Returns:
      A transformation without state for the front of a chain; it needs ``params``. Inside
      ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, params are missing, or a gradient has another
        shape.

    Zero weights and zero gradients pass as they are. Two guards are ours: with rescale, what is
    left of a gradient parallel to the weights is rounding noise and becomes zero, where the
    authors' code blows it up to full size; and with scope ``"leaf"`` a leaf of one entry, always
    parallel, passes as it is.

    >>> import jax.numpy as jnp
    >>> tx = orthogonal_to_params()
    >>> w, g = jnp.array([2.0, 0.0]), jnp.array([4.0, 3.0])
    >>> [round(float(x), 3) for x in tx.update(g, tx.init(w), w)[0]]
    [0.0, 5.0]

    Reference: Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025,
    arXiv 2501.04697.
    """
    check_range(eps=eps, ge=0)
    check_choice(("leaf", "global"), scope=scope)

    def init(params: PyTree) -> optax.EmptyState:
        projected_leaves(mask, params, lambda *_: True)  # a wrong pattern shows before training
        return optax.EmptyState()

    def project_leaf(g: Array, w: Array, previous: Array | None) -> tuple[Array, Array | None]:
        """The projected gradient, and a scalar that is known when it is."""
        if g.size <= 1:
            return g, previous
        everything = tuple(range(g.ndim))

        def rest(g: Array, w: Array, along: Array) -> Array:
            return g - along * w

        # Where squares overflow, beyond 1e18 in f32, the gradient passes as it is.
        waiting = in_turn(g, previous)
        gw, ww, gg = sums_together([waiting * w, jnp.square(w), jnp.square(waiting)], everything)
        along = safe_div(gw, ww + eps)
        along = jnp.where(jnp.isfinite(along), along, 0)
        if not rescale:
            return rest(g, w, along), turn_after(w, previous, gg.reshape(()))
        (square,) = sums_together([jnp.square(rest(waiting, w, along))], everything)
        left, norm = jnp.sqrt(square), jnp.sqrt(gg)
        # Behind the barrier the result is computed anew, where else it would be stored until the
        # links that follow have run for every leaf.
        along, left, norm = lax.optimization_barrier((along, left, norm))
        return restored(rest(g, w, along), norm, left, eps), turn_after(
            w, previous, left.reshape(())
        )

    def project_together(g: list[Array], w: list[Array]) -> list[Array]:
        square = jnp.square(tree_norm([saturate(x) for x in w]))
        along = safe_div(tree_vdot(g, w), square + eps)
        o = [x - along.astype(x.dtype) * y for x, y in zip(g, w, strict=True)]
        if not rescale:
            return o
        norm, left = tree_norm(g), tree_norm(o)
        return [restored(x, norm, left, eps) for x in o]

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        params = require_params(params, "orthogonal_to_params")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        leaves, structure = jax.tree.flatten(updates)
        weights = jax.tree.leaves(params)
        chosen = jax.tree.leaves(projected_leaves(mask, params, lambda *_: True))
        index = [i for i, projected in enumerate(chosen) if projected]
        g = [jnp.asarray(leaves[i], compute_dtype(leaves[i], weights[i])) for i in index]
        w = [jnp.asarray(weights[i], x.dtype) for i, x in zip(index, g, strict=True)]
        new: list[Array] = []
        if scope == "leaf":
            previous = None
            for x, y in zip(g, w, strict=True):
                o, previous = project_leaf(x, y, previous)
                new.append(o)
        else:
            new = project_together(g, w)
        for i, x in zip(index, new, strict=True):
            leaves[i] = narrow(x, jnp.result_type(leaves[i]))
        return structure.unflatten(leaves), state

    return transformation(init, update)


RECORD = Method(
    factory=orthogonal_to_params,
    kind="piece",
    summary="remove what of the gradient is parallel to the weights",
    traced=("eps",),
    static=("rescale", "scope", "mask"),
    needs=("params",),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025, '
    "arXiv 2501.04697",
    reference="LucasPrietoAl/grokking-at-the-edge-of-numerical-stability@"
    "0cc9e8dc62ce5ed66d29d80eebbaf14da2f71c67:orthograd.py:OrthoGrad",
    licence="MIT",
)
