"""How far two updates agree, as one number for the whole tree, on which a rate can be built."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optimkit.numerics import LARGE, in_turn, tree_vdot
from optimkit.protocols import Array, PyTree


def limited(x: Array) -> Array:
    """A scalar held within 1e15 (f32) in size, infinite ones too; NaN passes."""
    limit = LARGE[jnp.finfo(x.dtype).dtype.itemsize]
    return jnp.clip(x, -limit, limit)


def after(rate: Array, tree: PyTree) -> PyTree:
    """The tree, made to wait for a rate.

    The product behind a rate reads the last updates. What takes their place must not be written
    before it is known, or the compiler copies them first, 4 bytes a parameter; and what is computed
    before and after need not be stored in between.
    """
    return jax.tree.map(lambda x: in_turn(x, rate), tree)


def alignment(a: PyTree, b: PyTree) -> Array:
    """The inner product over all leaves, within 1e15 (f32) in size.

    >>> float(alignment({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])}))
    1.0
    """
    return limited(tree_vdot(a, b))
