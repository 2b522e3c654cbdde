"""Decoupled weight decay as a link: the weights, times a factor, added to the update."""

from __future__ import annotations

from typing import Any

import jax
import optax

from optimkit.leaves import decay_tree, require_params
from optimkit.protocols import Array, GradientTransformation, Mask, PyTree, transformation


def decayed_weights(weight_decay: Any, mask: Mask = None) -> GradientTransformation:
    """``optax.add_decayed_weights``, with a clear error for a mask that does not fit.

    Args:
      weight_decay: what the weights are multiplied by.
      mask: which leaves are decayed (True = decayed), a tree of bools, a prefix of one, or a
        function of the parameters; default all.

    Returns:
      A transformation without state that needs ``params``.

    Raises:
      ValueError: from ``update``, if params are missing or the mask is another tree.
    """

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        params = require_params(params, "weight decay")

        def add(u: Array, w: Array, decayed: Any) -> Array:
            return u + weight_decay * w if decayed else u

        return jax.tree.map(add, updates, params, decay_tree(mask, params)), state

    return transformation(lambda params: optax.EmptyState(), update)
