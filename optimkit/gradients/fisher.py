"""How much the loss depends on each parameter: the diagonal of the Fisher matrix, estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.leaves import check_real
from optimkit.numerics import check_choice, compute_dtype
from optimkit.protocols import PyTree

MODES = ("squared_batch_gradient", "absolute_batch_gradient")


def fisher_importance(
    loss_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    mode: Literal["squared_batch_gradient", "absolute_batch_gradient"] = "squared_batch_gradient",
    per_example: bool = False,
) -> PyTree:
    r"""The mean squared gradient of every parameter, over the batches of a data set.

    .. math:: I = \frac1J \sum_j \Big(\frac{\partial}{\partial w} L(w, B_j)\Big)^2

    Args:
      loss_fn: ``(params, batch) -> scalar``, the mean loss of a batch, in evaluation mode (no
        dropout, running statistics).
      params: w.
      batches: an iterable of batches, one compile a shape; a short last one counts as much as the
        others.
      mode: ``"absolute_batch_gradient"`` takes absolute values in place of squares, for loss-free
        importances: there the loss is the mean squared norm of the outputs.
      per_example: square, or take absolute values, of each example's gradient, which is the Fisher
        diagonal of the paper; the loss is then called with batches of one example (leading axis 1),
        and examples count alike. The squared gradient of a batch is smaller by up to its size.

    Returns:
      A tree like ``params``, in f32 at least.

    Raises:
      ValueError: if there is no batch, or for another mode.
      TypeError: for a complex or integer leaf.

    In f32, gradients below 1e-19 have squares that vanish. On several devices average the gradient
    over them inside ``loss_fn``, before it is squared.

    >>> def loss(w, x): return jnp.mean(x * w)
    >>> float(fisher_importance(loss, jnp.float32(1.0), [jnp.array([1.0, 3.0]), jnp.array([4.0])]))
    10.0
    >>> batches = [jnp.array([1.0, 3.0])]
    >>> float(fisher_importance(loss, jnp.float32(1.0), batches, per_example=True))
    5.0

    Reference: Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024, arXiv 2308.07707.
    """
    check_choice(MODES, mode=mode)
    check_real(params, "parameter")
    size = jnp.square if mode == "squared_batch_gradient" else jnp.abs

    def sized(params: PyTree, batch: Any) -> PyTree:
        grads = jax.grad(loss_fn)(params, batch)
        return jax.tree.map(lambda g: size(g.astype(compute_dtype(g))), grads)

    @jax.jit
    def add(total: PyTree, params: PyTree, batch: Any) -> PyTree:
        if not per_example:
            return jax.tree.map(jnp.add, total, sized(params, batch))

        def one(total: PyTree, example: Any) -> tuple[PyTree, None]:
            example = jax.tree.map(lambda x: x[None], example)
            return jax.tree.map(jnp.add, total, sized(params, example)), None

        return jax.lax.scan(one, total, batch)[0]

    total = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), compute_dtype(p)), params)
    count = 0
    for batch in batches:
        total = add(total, params, batch)
        count += len(jax.tree.leaves(batch)[0]) if per_example else 1
    if count == 0:
        raise ValueError("batches holds no batch")
    return jax.tree.map(lambda t: t / count, total)
