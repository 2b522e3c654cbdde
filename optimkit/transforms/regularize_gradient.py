"""A gradient steered by another one, the reference."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, matching_leaves, narrow_like, widen
from optimkit.numerics import check_choice, check_range, safe_div, tree_norm, tree_vdot
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation

MODES = ("conflict", "align", "blend")
NORMS = ("keep_projected", "restore")

Mode = Literal["conflict", "align", "blend"]
Norm = Literal["keep_projected", "restore"]


def regularize_gradient(
    *,
    mode: Mode = "conflict",
    strength: Any = 1.0,
    per_leaf: bool = False,
    norm: Norm = "keep_projected",
    eps: Any = 1e-12,
) -> GradientTransformation:
    r"""Corrects the direction of a gradient g by a reference r, for example SAM's gradient.

    With :math:`p = \langle g, r\rangle\, r / (\|r\|^2 + \epsilon)`, the part of g along r:

    .. math::

        \text{conflict: } g - s\,p \ \text{ if } \langle g, r\rangle < 0, \text{ else } g \qquad
        \text{align: } (1-s)\, g + s\,p \qquad \text{blend: } g + s\,r

    Args:
      mode: ``"conflict"`` takes away what opposes the reference; ``"align"`` keeps what is along
        it; ``"blend"`` adds it.
      strength: s, >= 0; at most 1 makes sense for the first two.
      per_leaf: inner products and norms of each leaf; False: of the whole tree.
      norm: ``"restore"`` scales the result to the norm of g; ``"keep_projected"`` does not.
      eps: as above, >= 0.

    Returns:
      A transformation without state for the front of a chain. ``update`` needs
      ``reference_grads``, a tree like the gradient. Inside ``shard_map`` each device must hold
      whole leaves.

    Raises:
      ValueError: if an argument is out of range, the reference is missing, or a shape differs.

    Provisional: the paper's formula was not accessible. That a SAM gradient steers the ordinary one
    is stated there; the three rules, their defaults and ``strength`` are ours. For a smooth loss
    and a small rho SAM's gradient seldom opposes the ordinary one, so that ``"conflict"`` seldom
    acts. Where the reference is zero or not finite, g passes as it is.

    >>> import jax.numpy as jnp
    >>> g, r = jnp.array([1.0, 1.0]), jnp.array([0.0, -2.0])
    >>> for mode in ("conflict", "align", "blend"):
    ...     tx = regularize_gradient(mode=mode, eps=0.0)
    ...     print(tx.update(g, tx.init(g), reference_grads=r)[0].tolist())
    [1.0, 0.0]
    [0.0, 1.0]
    [1.0, -1.0]

    Reference: Peng et al., "GLAD: Generalizable Tuning for Vision-Language Models", 2025,
    arXiv 2507.13089.
    """
    check_choice(MODES, mode=mode)
    check_choice(NORMS, norm=norm)
    check_range(strength=strength, eps=eps, ge=0)

    def weights(g: PyTree, r: PyTree) -> _Weights:
        length = tree_norm(r)
        usable = (length >= jnp.finfo(length.dtype).tiny) & jnp.isfinite(length)
        length = jnp.where(usable, length, 1)
        along = tree_vdot(g, jax.tree.map(lambda x: x / length.astype(x.dtype), r))
        part = along * length / (length + eps / length)  # the square of a length may underflow
        own = jnp.ones_like(length)
        if mode == "conflict":
            other = jnp.where(along < 0, -strength * part, 0)
        elif mode == "align":
            own, other = own - strength, strength * part
        else:
            other = strength * length
        return _Weights(jnp.where(usable, own, 1), jnp.where(usable, other, 0), length)

    def mix(g: Array, r: Array, w: _Weights) -> Array:
        own, other, length = (x.astype(g.dtype) for x in w)
        return own * g + jnp.where(other == 0, 0, other * (r / length))

    def regularized(g: PyTree, r: PyTree) -> PyTree:
        w = weights(g, r)
        mixed = jax.tree.map(lambda g, r: mix(g, r, w), g, r)
        if norm == "keep_projected":
            return mixed
        factor = safe_div(tree_norm(g), tree_norm(mixed))
        return jax.tree.map(lambda x: factor.astype(x.dtype) * x, mixed)

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        reference_grads: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        if reference_grads is None:
            raise ValueError(
                "regularize_gradient needs reference_grads: call "
                "update(gradients, state, params, reference_grads=...)"
            )
        reference = matching_leaves(reference_grads, updates, what="reference_grads")
        check_real(reference, "reference_grads")
        g, r = widen(updates), widen(reference, updates)
        new = jax.tree.map(regularized, g, r) if per_leaf else regularized(g, r)
        return narrow_like(new, updates), state

    return transformation(init, update)


class _Weights(NamedTuple):
    """The result is ``own * g + other * r / length``, with three scalars."""

    own: Array
    other: Array
    length: Array


def _example_extras(params: PyTree, grads: PyTree) -> dict[str, Any]:
    """A reference that opposes some gradients."""
    del grads
    return {"reference_grads": jax.tree.map(lambda w: -w, params)}


RECORD = Method(
    factory=regularize_gradient,
    kind="piece",
    summary="steer the gradient by a reference gradient",
    example={"per_leaf": True, "strength": 0.5},
    extras=_example_extras,
    exempt={"fidelity": "no code was published, and the paper's formula was not accessible"},
    traced=("strength", "eps"),
    static=("mode", "per_leaf", "norm"),
    needs=("reference_grads",),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=16,
    status="provisional",
    paper='Peng et al., "GLAD: Generalizable Tuning for Vision-Language Models", 2025, '
    "arXiv 2507.13089",
)
