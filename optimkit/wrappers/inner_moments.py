"""The moments inside the state of a wrapped transformation: to find, to read and to mask them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optimkit.layout import named_leaves, path_name
from optimkit.leaves import moment_paths
from optimkit.protocols import Array, PyTree

Moments: TypeAlias = dict[str, dict[str, Array]]
"""``{path of the field: {name of the parameter: array}}``."""


def inner_moments(inner: optax.GradientTransformation, state: PyTree, params: PyTree) -> Moments:
    """The floating-point arrays of a state that stand in a parameter's place and have its shape.

    >>> params = {"kernel": jnp.zeros(2)}
    >>> state = optax.adam(0.1).init(params)
    >>> sorted(inner_moments(optax.adam(0.1), state, params))
    ['0/mu', '0/nu']
    """
    found: Moments = {}
    held = jax.tree.leaves(moment_paths(inner.init, state, params))
    for where, (path, leaf) in zip(held, jax.tree_util.tree_leaves_with_path(state), strict=True):
        if where:
            found.setdefault(where, {})[_owner(path, where)] = leaf
    return found


def _owner(path: Any, where: str) -> str:
    """The name of the parameter that a moment at ``path``, in the field ``where``, belongs to."""
    return path_name(path).removeprefix(where).removeprefix("/") or path_name(())


def momentum_of(name: str, moments: Moments) -> Array:
    """Adam's direction without bias correction, or else momentum, of one parameter.

    Raises:
      ValueError: if there is neither.
    """
    held = {path: leaves[name] for path, leaves in moments.items() if name in leaves}

    def of(field: str) -> dict[str, Array]:
        """The arrays in fields of this name, by the path in front of it."""
        return {p.removesuffix(field): m for p, m in held.items() if p.split("/")[-1] == field}

    second = of("nu")
    for where, first in of("mu").items():
        if where in second:
            return first / (jnp.sqrt(second[where]) + 1e-8)
    for momentum in (*of("trace").values(), *of("mu").values()):
        return momentum
    raise ValueError(
        f"growth='momentum' needs an inner transformation whose state has a field trace or mu; it "
        f"holds {sorted(held) or 'no moments'} for {name!r}"
    )


def mask_moments(
    inner: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    masks: PyTree,
    chosen: Callable[[str], bool],
) -> PyTree:
    """A state whose moments, in the fields that are chosen by name, are zero outside of masks."""
    of = dict(zip([n for n, _ in named_leaves(params)], jax.tree.leaves(masks), strict=True))

    def one(path: Any, where: str, leaf: Array) -> Array:
        if not where or not chosen(where.rsplit("/", 1)[-1]):
            return leaf
        mask = of[_owner(path, where)]
        return jnp.where(mask, leaf, 0) if mask.ndim else leaf

    return jax.tree_util.tree_map_with_path(one, moment_paths(inner.init, state, params), state)
