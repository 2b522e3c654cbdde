"""One gradient a task, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.numerics import check_count
from optimkit.protocols import Array, PyTree


def task_gradients(
    losses_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> tuple[Any, PyTree]:
    """The losses of K tasks, and the gradient of each, stacked as combiners take them.

    The forward pass runs once. The backward pass runs for all tasks side by side, or for
    ``batch_size`` tasks at a time, one group after the other.

    Args:
      losses_fn: ``(params, *args) -> losses`` of shape ``(K,)``, or ``(losses, aux)``.
      params: what to differentiate by, any tree of floating-point arrays.
      *args: handed on.
      batch_size: tasks whose backward passes run side by side, >= 1; default all. Fewer need less
        memory: what a backward pass holds is held for so many tasks. Every task's gradient of the
        parameters is returned in any case, K copies of them.
      has_aux: whether ``losses_fn`` returns ``(losses, aux)``.

    Returns:
      ``(losses, task_grads)``, or ``((losses, aux), task_grads)``. A leaf of ``task_grads`` has the
      shape ``(K, *parameter.shape)``.

    Raises:
      ValueError: if the losses are not an array of one axis, or ``batch_size`` is below 1.

    >>> def losses_fn(w, x):
    ...     return jnp.stack([jnp.sum(w * x), jnp.sum(w**2)])
    >>> losses, grads = task_gradients(losses_fn, jnp.array([1.0, 2.0]), 3.0)
    >>> losses.tolist(), grads.tolist()
    ([9.0, 5.0], [[3.0, 3.0], [2.0, 4.0]])
    """
    if batch_size is not None:
        check_count(batch_size=batch_size, least=1)

    def checked(params: PyTree) -> tuple[Array, Any]:
        out = losses_fn(params, *args)
        losses, aux = out if has_aux else (out, None)
        if np.ndim(losses) != 1 or np.shape(losses)[0] < 1:
            raise ValueError(
                "losses_fn must return one loss a task, an array of shape (K,); got shape "
                f"{np.shape(losses)}"
            )
        return losses, aux

    losses, pull, aux = jax.vjp(checked, params, has_aux=True)
    directions = jnp.eye(losses.shape[0], dtype=losses.dtype)
    if batch_size is None or batch_size >= losses.shape[0]:
        (task_grads,) = jax.vmap(pull)(directions)
    elif batch_size == 1:
        (task_grads,) = jax.lax.map(pull, directions)
    else:
        (task_grads,) = jax.lax.map(pull, directions, batch_size=batch_size)
    return (losses, aux) if has_aux else losses, task_grads
