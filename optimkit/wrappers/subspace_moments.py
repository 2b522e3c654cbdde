"""Moments of projected gradients: where they are, how they follow a new subspace, in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from optimkit.layout import named_leaves
from optimkit.leaves import map_param_state, moment_paths
from optimkit.protocols import Array, PyTree
from optimkit.wrappers.projectors import project
from optimkit.wrappers.quantize_state import quantize_state

SQUARED_FIELDS = frozenset({"nu", "nu_max"})
"""Fields of squares, which a rotation of the subspace changes by its squared entries."""

FORMATS: Mapping[int, Literal["dynamic8", "dynamic4"]] = {8: "dynamic8", 4: "dynamic4"}
"""The format of ``quantize_state`` for a number of bits."""


def keep_in_bits(
    inner: optax.GradientTransformation,
    state_bits: int | None,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformation:
    """A transformation with its moments in 8 or 4 bits, or, for None, as it is.

    Raises:
      ValueError: for another number of bits.
    """
    if state_bits is None:
        return inner
    if state_bits not in FORMATS:
        raise ValueError(f"state_bits must be None, 8 or 4, got {state_bits!r}")
    return quantize_state(
        inner, format=FORMATS[state_bits], block_size=block_size, min_size=min_size
    )


def moments_by_leaf(
    init: Callable[[PyTree], PyTree], state: PyTree, params: PyTree
) -> dict[int, list[tuple[int, bool]]]:
    """Where a state keeps an array for every entry of a leaf.

    Args:
      init: the transformation's ``init``; it is run on a placeholder.
      state: its state.
      params: the parameters, or a tree of the same names and shapes.

    Returns:
      By the leaf's place among the leaves, ``(place among the leaves of the state, whether it holds
      squares)`` for each such array.
    """
    numbers = {name: index for index, (name, _) in enumerate(named_leaves(params))}
    owners = map_param_state(init, lambda name, _: numbers.get(name, -1), lambda _: -1, state)
    fields = jax.tree.leaves(moment_paths(init, state, params))
    found: dict[int, list[tuple[int, bool]]] = {}
    for place, (owner, field) in enumerate(zip(jax.tree.leaves(owners), fields, strict=True)):
        if field:
            squared = field.rsplit("/", 1)[-1] in SQUARED_FIELDS
            found.setdefault(owner, []).append((place, squared))
    return found


def turned_moment(
    moment: Array,
    squared: bool,
    old: Sequence[Array],
    new: Sequence[Array],
    sides: Sequence[int],
) -> Array:
    """A moment's coordinates in the new basis, as far as the old subspace lies in the new one.

    The turn is ``P_new^T P_old`` on each projected side, and its squared entries for squares.

    >>> old, new = jnp.eye(3)[:, :2], jnp.eye(3)[:, 1:]  # one direction of two is kept
    >>> turned_moment(jnp.array([[5.0], [7.0]]), False, [old], [new], [0]).tolist()
    [[7.0], [0.0]]
    """
    turns = [
        jnp.einsum("...dk,...dl->...kl", before, after, precision="highest")
        for before, after in zip(old, new, strict=True)
    ]
    turns = [jnp.square(turn) if squared else turn for turn in turns]
    return project(moment.astype(turns[0].dtype), turns, sides).astype(moment.dtype)
