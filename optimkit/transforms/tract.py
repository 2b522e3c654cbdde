"""TrAct: the first layer's gradient as if its activations were trained, not its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import named_leaves, select_leaves
from optimkit.leaves import check_match, check_real
from optimkit.matrices.input_gram import (
    KINDS,
    METHODS,
    Kind,
    Padding,
    apply_left_inverse,
    apply_rows_left_inverse,
    count_rows,
    fan_in,
    gram_of_rows,
    input_rows,
    map_kernel,
)
from optimkit.matrices.input_gram import Method as Solver
from optimkit.numerics import check_choice, check_range, compute_dtype, narrow
from optimkit.protocols import (
    Array,
    GradientTransformation,
    LeafSelector,
    Method,
    PyTree,
    transformation,
)


def tract_precondition(
    l: Any = 0.1,  # noqa: E741 - the authors' name
    *,
    path: LeafSelector,
    method: Solver = "solve",
    axis_name: str | None = None,
    kind: Kind = "dense",
    kernel_size: Sequence[int] | None = None,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
) -> GradientTransformation:
    r"""Divides the first layer's gradient by the second moment of its inputs.

    With one row of A for each use of the kernel, b rows, and Z the gradient at what the layer puts
    out, the ordinary gradient is :math:`A^T Z`, which bright and contrasty images dominate. The
    step on the weights that comes nearest to a gradient step on the activations is

    .. math:: G' = (A^T A / b + \lambda I)^{-1} A^T Z

    Args:
      l: lambda, > 0; 0.1 in all of the authors' experiments.
      path: the kernel of the first layer: its name as ``a/b/c``, a pattern, or a function
        ``(path, leaf) -> bool``, which may also choose none.
      method: ``"solve"`` (LU) or ``"cholesky"``, which does half the work.
      axis_name: the axis of ``pmap`` or ``shard_map`` over which the batch is spread and gradients
        were averaged. Second moments are then averaged as well.
      kind: ``"dense"``, a kernel (inputs, ...); ``"conv"``, a kernel (*window, inputs, outputs).
      kernel_size: window of a convolution; default: that of the kernel.
      strides: its strides, as for the layer.
      padding: its padding, as for the layer; a number pads both sides.

    Returns:
      A transformation without state for the front of a chain. ``update`` takes
      ``first_layer_inputs``, the very array that enters the layer, or
      ``first_layer_gram=(gram, rows)``, with ``tract_gram`` and the number of rows, which only
      weighs the mean over ``axis_name``. All other leaves pass as they are.

    Raises:
      ValueError: if an argument is out of range, ``path`` chooses several leaves, an extra argument
        is missing, or its shape does not fit the kernel.

    Put clipping and decay after it: the gradient along a direction of the inputs with second moment
    e is divided by e + lambda, up to 10-fold growth at 0.1. For SGD that changes what the rate of
    this layer means. Where a step is made of several microbatches, or ``update`` is out of reach,
    use ``optimkit.nn.tract_dense``, ``tract_conv`` or their layers, which do the same to the
    gradient of each microbatch. Convolutions with dilation or groups are not supported. With fewer
    rows than inputs the b x b system is solved. In f32, lambda counts as 5e-7 times the trace of
    the second moment at least, which matters for pixels in 0..255. NaN in an input poisons the
    kernel. On a mesh the kernel is whole on every device for the solve.

    >>> import jax.numpy as jnp
    >>> tx = tract_precondition(1.0, path="stem/kernel")
    >>> grads = {"stem": {"kernel": jnp.array([[8.0], [8.0]])}}
    >>> x = jnp.array([[4.0, 0.0], [0.0, 2.0]])  # second moments 8 and 2
    >>> updates, _ = tx.update(grads, tx.init(grads), grads, first_layer_inputs=x)
    >>> [round(float(u), 3) for u in updates["stem"]["kernel"][:, 0]]  # 8 / (8 + 1), 8 / (2 + 1)
    [0.889, 2.667]

    Reference: Petersen et al., "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024,
    arXiv 2410.23970. Agrees with the authors' layers to rounding (goldens ``tract__*``). Their
    option ``cholesky_inverse`` factors nothing before it inverts; ``"cholesky"`` here is correct.
    """
    check_range(l=l, gt=0)
    check_choice(METHODS, method=method)
    check_choice(KINDS, kind=kind)

    def chosen(tree: PyTree) -> list[bool]:
        marks = select_leaves(path, tree, default=lambda name, leaf: False, argument="path")
        names = [name for name, mark in named_leaves(marks) if mark]
        if len(names) > 1:
            raise ValueError(f"path must choose one kernel, the first layer's; it chooses {names}")
        return jax.tree.leaves(marks)

    def precondition(name: str, g: Array, inputs: Any, gram: Any) -> Array:
        _check_kernel(name, g.shape, kind, kernel_size)
        n = fan_in(kind, g.shape)
        g = jnp.asarray(g, compute_dtype(g))
        if gram is None:
            window = g.shape[:-2] if kernel_size is None else kernel_size
            rows = input_rows(
                inputs, kind=kind, kernel_size=window, strides=strides, padding=padding
            )
            if rows.shape[-1] != n:
                raise ValueError(
                    f"first_layer_inputs of shape {np.shape(inputs)} give {rows.shape[-1]} numbers "
                    f"a row, but the kernel {name!r} of shape {g.shape} takes {n}"
                )
            if axis_name is None:
                return map_kernel(lambda m: apply_rows_left_inverse(rows, l, m, method), g, kind)
            moment, count = gram_of_rows(rows), count_rows(rows)
        else:
            moment, count = gram
            if np.shape(moment) != (n, n):
                raise ValueError(
                    f"first_layer_gram has shape {np.shape(moment)}, but the kernel {name!r} of "
                    f"shape {g.shape} needs {(n, n)}"
                )
        moment = jnp.asarray(moment, g.dtype)
        if axis_name is not None:
            share = jnp.asarray(count, g.dtype)
            moment = jax.lax.psum(moment * share, axis_name) / jax.lax.psum(share, axis_name)
        return map_kernel(lambda m: apply_left_inverse(moment, l, m, method), g, kind)

    def init(params: PyTree) -> optax.EmptyState:
        chosen(params)
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        first_layer_inputs: Any = None,
        first_layer_gram: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        marks = chosen(updates)
        if not any(marks):
            return updates, state
        if (first_layer_inputs is None) == (first_layer_gram is None):
            raise ValueError(
                "tract_precondition needs either first_layer_inputs or first_layer_gram: call "
                "update(gradients, state, params, first_layer_inputs=x)"
            )
        leaves, structure = jax.tree.flatten(updates)
        index = marks.index(True)
        name, g = named_leaves(updates)[index]
        new = precondition(name, g, first_layer_inputs, first_layer_gram)
        leaves[index] = narrow(new, jnp.result_type(g))
        return structure.unflatten(leaves), state

    return transformation(init, update)


def _check_kernel(
    name: str, shape: tuple[int, ...], kind: Kind, kernel_size: Sequence[int] | None
) -> None:
    least = 2 if kind == "dense" else 3
    if len(shape) < least:
        raise ValueError(
            f"path chooses {name!r} of shape {shape}, but a {kind} kernel has {least} axes or more"
        )
    if kind == "conv" and kernel_size is not None and shape[:-2] != tuple(kernel_size):
        raise ValueError(
            f"kernel_size is {tuple(kernel_size)}, but the kernel {name!r} of shape {shape} has "
            f"{shape[:-2]}"
        )


def _example_path(name: str, leaf: Any) -> bool:
    return len(np.shape(leaf)) == 2 and name in (
        "0", "(root)", "dense/kernel", "kernel", "layer/kernel"
    )  # fmt: skip


def _example_extras(params: PyTree, grads: PyTree) -> dict[str, Any]:
    """Inputs with as many features as the chosen kernel has rows."""
    del grads
    for name, leaf in named_leaves(params):
        if _example_path(name, leaf):
            x = np.random.default_rng(0).normal(size=(16, np.shape(leaf)[0]))
            return {"first_layer_inputs": jnp.asarray(x, jnp.float32)}
    return {}


RECORD = Method(
    factory=tract_precondition,
    kind="piece",
    summary="divide the first layer's gradient by the second moment of its inputs",
    example={"path": _example_path},
    extras=_example_extras,
    traced=("l",),
    static=("path", "method", "axis_name", "kind", "kernel_size", "strides", "padding"),
    needs=("first_layer_inputs",),
    position="first",
    communication="matrix",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Petersen et al., "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, '
    "arXiv 2410.23970",
    reference="Felix-Petersen/tract@8c04529a6a1e38609023500830a1bce4bc72fbc8:src/tract.py",
    licence="MIT",
)
