"""Between y, which schedule-free training holds, and x, which is evaluated and shipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from optimkit.layout import path_name
from optimkit.numerics import compute_dtype
from optimkit.protocols import Array, PyTree
from optimkit.wrappers.schedule_free import ScheduleFreeState


def schedule_free_eval_params(opt_state: PyTree, params: PyTree) -> PyTree:
    r"""The averaged parameters x: :math:`(y - (1-b_1) z)/b_1`, or the x that the state keeps.

    Args:
      opt_state: any optimizer state that holds one schedule-free state, however deep: in a chain,
        ``inject_hyperparams``, ``MultiSteps``, ``masked``, ``apply_if_finite``, a wrapper.
      params: y, as the training loop holds it.

    Returns:
      x, in the dtype of ``params``. Leaves that the schedule-free state does not have (masked
      ones) are handed back as they are.

    Raises:
      ValueError: if ``opt_state`` holds no schedule-free state, or several, or if its tree does
        not fit ``params``.

    >>> import jax.numpy as jnp, optax, optimkit as ok
    >>> tx = optax.chain(optax.clip(1.0), ok.schedule_free(optax.identity(), 0.5))
    >>> y = jnp.ones(2); state = tx.init(y)
    >>> schedule_free_eval_params(state, y).tolist()
    [1.0, 1.0]
    """
    state = _find(opt_state)
    if state.average is not None:
        return _combine(lambda x, y: x, state.average, params)
    b1 = state.b1
    return _combine(lambda z, y: z + (y - z) / b1, state.z, params)


def schedule_free_train_params(opt_state: PyTree, x: PyTree) -> PyTree:
    r"""The parameters y to go on training from: :math:`b_1 x + (1-b_1) z`; the way back from x.

    A checkpoint may hold x, which others can use, and the optimizer state; this restores y.

    Args:
      opt_state: any optimizer state that holds one schedule-free state.
      x: averaged parameters, as ``schedule_free_eval_params`` gives them.

    Returns:
      y, in the dtype of ``x``; equal to the y that gave x up to rounding in that dtype.

    Raises:
      ValueError: if ``opt_state`` holds no schedule-free state, or several, or if its tree does
        not fit ``x``.

    >>> import jax.numpy as jnp, optax, optimkit as ok
    >>> tx = ok.schedule_free(optax.identity(), 0.5)
    >>> y = jnp.ones(2); state = tx.init(y)
    >>> schedule_free_train_params(state, schedule_free_eval_params(state, y)).tolist()
    [1.0, 1.0]
    """
    state = _find(opt_state)
    b1 = state.b1
    return _combine(lambda z, x: z + b1 * (x - z), state.z, x)


def _find(opt_state: PyTree) -> ScheduleFreeState:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ScheduleFreeState))
    found = [node for node in nodes if isinstance(node, ScheduleFreeState)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found) or 'no'} schedule-free states, it must hold exactly one"
            + ("; pass the part of opt_state with the one that is meant" if found else "")
        )
    return found[0]


def _combine(rule: Callable[[Array, Array], Array], state_tree: PyTree, params: PyTree) -> PyTree:
    def one(path: Any, kept: Any, leaf: Any) -> Any:
        if isinstance(kept, optax.MaskedNode):
            return leaf
        if np.shape(kept) != np.shape(leaf):
            raise ValueError(
                f"parameter leaf {path_name(path)!r} has shape {np.shape(leaf)}, "
                f"but the schedule-free state has {np.shape(kept)}"
            )
        dtype = compute_dtype(kept, leaf)
        return rule(kept.astype(dtype), leaf.astype(dtype)).astype(leaf.dtype)

    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    structure = jax.tree.structure(state_tree, is_leaf=is_masked)
    try:
        structure.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"the parameters and the schedule-free state are different trees: {error}"
        ) from error
    return jax.tree_util.tree_map_with_path(one, state_tree, params, is_leaf=is_masked)
