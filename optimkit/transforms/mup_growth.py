"""By how much a model grew over its base model, leaf by leaf; muP's multipliers follow from it."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optimkit import layout
from optimkit.layout import MatrixAxesOverride, path_name
from optimkit.protocols import MatrixAxes, PyTree

BaseShapes = PyTree | Callable[[str, Any], tuple[int, ...]]


def base_shapes(init_fn: Callable[..., PyTree], **small_config: Any) -> PyTree:
    """The shapes of the parameters of a small model, which is never built.

    Args:
      init_fn: makes the parameters: ``lambda width: Model(width).init(key, x)["params"]``.
      **small_config: its arguments for the base model.

    >>> import jax.numpy as jnp
    >>> base_shapes(lambda width: {"kernel": jnp.zeros((3, width))}, width=8)["kernel"].shape
    (3, 8)
    """
    return jax.eval_shape(functools.partial(init_fn, **small_config))


def is_shape(node: Any) -> bool:
    """Whether a node of a tree is a shape, not a container."""
    return type(node) in (tuple, list) and all(isinstance(n, (int, np.integer)) for n in node)


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(map(int, leaf)) if is_shape(leaf) else tuple(np.shape(leaf))


def shapes_by_name(base: BaseShapes) -> Callable[[str, Any], tuple[int, ...]]:
    """``(name, leaf) -> shape in the base model``; names need not be all those of the base."""
    if callable(base):
        return lambda name, leaf: _shape(base(name, leaf))
    with_path = jax.tree_util.tree_leaves_with_path(base, is_leaf=is_shape)
    known: Mapping[str, tuple[int, ...]] = {path_name(p): _shape(leaf) for p, leaf in with_path}

    def look_up(name: str, leaf: Any) -> tuple[int, ...]:
        if name not in known:
            raise ValueError(f"base_shapes has no leaf {name!r}; it has {sorted(known)}")
        return known[name]

    return look_up


def _fans(name: str, leaf: Any, fan_axes: MatrixAxesOverride) -> tuple[MatrixAxes, bool]:
    """Which axes are inputs and outputs, and whether the user said so.

    All axes of a vector are outputs, and the rows of an embedding table inputs.
    """
    shape = _shape(leaf)
    rank, last = len(shape), name.rsplit("/", 1)[-1].lower()
    if callable(fan_axes):
        given = fan_axes(name, leaf)
    else:
        patterns = (fan_axes or {}).items()
        given = next((axes for p, axes in patterns if fnmatch.fnmatchcase(name, p)), None)
    if given is not None:
        return layout.check_axes(name, shape, given), True
    if rank < 2 or last in layout.VECTOR_WORDS:
        return MatrixAxes((), (), tuple(range(rank))), False
    split = (*layout.SPLIT_OUTPUT_WORDS, *layout.SPLIT_INPUT_WORDS)
    is_conv = layout.has_word(name, layout.CONV_WORDS)
    if rank == 3 and layout.has_word(name, split) and not is_conv:
        return layout.default_matrix_axes(name, shape) or MatrixAxes((), (), (0, 1, 2)), False
    return MatrixAxes(tuple(range(rank - 2)), (rank - 2,), (rank - 1,)), False


class Growth(NamedTuple):
    """By what inputs and outputs grew over the base model; None where they are of fixed size."""

    inputs: float | None
    outputs: float | None


def growth(name: str, leaf: Any, base: tuple[int, ...], fan_axes: MatrixAxesOverride) -> Growth:
    """The growth of one leaf; an axis that grew must be one of inputs or outputs."""
    shape = _shape(leaf)
    if len(shape) != len(base):
        raise ValueError(f"leaf {name!r} has shape {shape}, but {base} in base_shapes")
    axes, said = _fans(name, leaf, fan_axes)
    other = [axis for axis in axes.batch if shape[axis] != base[axis]]
    if other and not said:
        raise ValueError(
            f"leaf {name!r} of shape {shape} grew from {base} along axis {other[0]}, which is read "
            f"as neither inputs {axes.inputs} nor outputs {axes.outputs}; say what it is, with "
            f"fan_axes={{{name!r}: MatrixAxes(batch=..., inputs=..., outputs=...)}}"
        )

    def ratio(group: tuple[int, ...]) -> float | None:
        if all(shape[axis] == base[axis] for axis in group):
            return None
        small = math.prod(base[axis] for axis in group)
        return math.prod(shape[axis] for axis in group) / small if small else 1.0

    grown = Growth(ratio(axes.inputs), ratio(axes.outputs))
    is_table = layout.has_word(name.rsplit("/", 1)[-1], layout.EMBEDDING_WORDS) and not said
    if is_table and grown.inputs is not None:
        raise ValueError(f"embedding {name!r} has shape {shape}, but {base} in base_shapes: the "
                         "vocabulary must be the same")  # fmt: skip
    return grown
