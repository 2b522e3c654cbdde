"""Which leaf is what: normalised paths, one leaf selector, and how a leaf is seen as matrices.

Everything here knows names and shapes and nothing about optimization. Weight layouts are Flax's:
a Dense kernel is ``(in, out)``, a Conv kernel ``(h, w, in, out)``, an attention kernel
``(d, heads, head_dim)`` or ``(heads, head_dim, d)``, an embedding table ``(vocab, features)``.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from optimkit.protocols import LeafSelector, MatrixAxes, PyTree

EMBEDDING_WORDS = ("embed", "embedding", "embedder", "embeddings")
HEAD_WORDS = ("head", "logits", "lm_head")
CONV_WORDS = ("conv", "convolution")
SPLIT_OUTPUT_WORDS = ("query", "key", "value", "qkv")  # (d, heads, head_dim)
SPLIT_INPUT_WORDS = ("out",)  # (heads, head_dim, d)
LORA_WORDS = ("lora_a", "lora_b")
VECTOR_WORDS = ("bias", "scale", "b", "gamma", "beta", "offset")

_KEY_ATTRIBUTES = ("key", "name", "idx")


def path_parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Splits a JAX key path into its names; drops the ``.value`` that NNX variables add at the end.

    >>> tree = {"dense": {"kernel": 1.0}}
    >>> path_parts(jax.tree_util.tree_leaves_with_path(tree)[0][0])
    ('dense', 'kernel')
    """
    parts = []
    for key in path:
        found = next((getattr(key, a) for a in _KEY_ATTRIBUTES if hasattr(key, a)), key)
        parts.append(str(found))
    if len(parts) > 1 and parts[-1] == "value" and hasattr(path[-1], "name"):
        parts.pop()  # an attribute called .value; a dict key "value" stays
    return tuple(parts)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as ``a/b/c``, the spelling of every message, pattern and table."""
    return "/".join(path_parts(path)) or "(root)"


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a tree with their ``a/b/c`` names, in JAX's order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def has_word(name: str, words: Iterable[str]) -> bool:
    """Whether a component of ``a/b/c`` is one of ``words`` or ends in ``_word``.

    Trailing numbers of a component do not count, and neither does case, so ``Conv_0`` is ``conv``.

    >>> has_word("decoder/lm_head/kernel", ["head"]), has_word("multi_head_attention", ["head"])
    (True, False)
    """
    for part in name.lower().split("/"):
        part = re.sub(r"_?\d+$", "", part)
        if any(part == word or part.endswith("_" + word) for word in words):
            return True
    return False


# ---------------------------------------------------------------------------------------------
# Choosing leaves
# ---------------------------------------------------------------------------------------------


def select_leaves(
    selector: LeafSelector,
    params: PyTree,
    *,
    default: Callable[[str, Any], bool],
    argument: str = "leaves",
) -> PyTree:
    """Resolves any leaf selector to a tree of bools with the structure of ``params``.

    Args:
      selector: ``None`` (use ``default``), a tree of bools, a callable ``(path, leaf) -> bool``
        with the path as ``a/b/c``, or a list of path patterns (``fnmatch``; a pattern that matches
        no leaf raises).
      params: the tree to choose from.
      default: the rule for ``None``.
      argument: the name of the user's argument, for messages.

    Raises:
      ValueError: if a pattern matches nothing, or the tree of bools has another structure.
    """
    if selector is None:
        selector = default
    if isinstance(selector, str):
        selector = [selector]
    if callable(selector):
        choose: Callable[..., Any] = selector
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: bool(choose(path_name(path), leaf)), params
        )
    if isinstance(selector, (list, tuple)) and all(isinstance(s, str) for s in selector):
        names = [name for name, _ in named_leaves(params)]
        for pattern in selector:
            # An empty tree has nothing to match (optax.tree_map_params inits on one).
            if names and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{argument}: {pattern!r} matches none of the leaves {names}")
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(fnmatch.fnmatchcase(path_name(path), s) for s in selector), params
        )
    if jax.tree.leaves(params) and jax.tree.structure(selector) != jax.tree.structure(params):
        raise ValueError(
            f"{argument}: the tree of bools has another structure than the parameters: "
            f"{[n for n, _ in named_leaves(selector)]} against "
            f"{[n for n, _ in named_leaves(params)]}"
        )
    return jax.tree.map(bool, selector) if jax.tree.leaves(params) else params


def is_lora_leaf(name: str, leaf: Any) -> bool:
    """Whether a leaf is a LoRA factor: a component of its path is ``lora_a`` or ``lora_b``.

    >>> is_lora_leaf("query/lora_a/kernel", None), is_lora_leaf("query/kernel", None)
    (True, False)
    """
    del leaf
    return has_word(name, LORA_WORDS)


def lora_mask(params: PyTree) -> PyTree:
    """A tree of bools: True for LoRA factors, which are trained, False for what they adapt.

    >>> lora_mask({"query": {"kernel": np.zeros(1), "lora_a": np.zeros(1), "lora_b": np.zeros(1)}})
    {'query': {'kernel': False, 'lora_a': True, 'lora_b': True}}
    """
    return select_leaves(is_lora_leaf, params, default=is_lora_leaf)


# ---------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------

MatrixAxesOverride = (
    Mapping[str, MatrixAxes | None] | Callable[[str, Any], MatrixAxes | None] | None
)


def _ambiguous(name: str, shape: tuple[int, ...], readings: Mapping[str, MatrixAxes]) -> ValueError:
    listed = "; ".join(f"{what}: {axes}" for what, axes in readings.items())
    return ValueError(
        f"leaf {name!r} of shape {shape} can be read in several ways: {listed}. Say which, with "
        f"matrix_axes={{{name!r}: MatrixAxes(batch=..., inputs=..., outputs=...)}}"
    )


def default_matrix_axes(name: str, shape: tuple[int, ...]) -> MatrixAxes | None:
    """The default reading of a leaf as a stack of matrices; None for vectors and scalars.

    Raises:
      ValueError: where name and shape allow two readings; the message shows the override.
    """
    rank = len(shape)
    last = name.rsplit("/", 1)[-1].lower()
    if rank < 2 or last in VECTOR_WORDS:
        return None
    axes = tuple(range(rank))
    if rank == 2:
        # A table is read as torch reads it: one output per row of the vocabulary.
        if has_word(last, EMBEDDING_WORDS):
            return MatrixAxes((), (1,), (0,))
        return MatrixAxes((), (0,), (1,))
    conv = MatrixAxes((), axes[:-1], axes[-1:])
    if has_word(name, CONV_WORDS):
        return conv
    if rank == 3:
        split_output = MatrixAxes((), (0,), (1, 2))
        split_input = MatrixAxes((), (0, 1), (2,))
        if has_word(name, SPLIT_OUTPUT_WORDS):
            return split_output
        if has_word(name, SPLIT_INPUT_WORDS):
            return split_input
        raise _ambiguous(
            name,
            shape,
            {
                "stacked (layers, in, out)": MatrixAxes((0,), (1,), (2,)),
                "1-d convolution (width, in, out)": conv,
                "attention (d, heads, head_dim)": split_output,
                "attention (heads, head_dim, d)": split_input,
            },
        )
    raise _ambiguous(
        name,
        shape,
        {
            "convolution (..., in, out)": conv,
            "stacked (..., in, out)": MatrixAxes(axes[:-2], axes[-2:-1], axes[-1:]),
            "stacked attention (layers, d, heads, head_dim)": MatrixAxes(
                (0,), (1,), tuple(axes[2:])
            ),
        },
    )


def check_axes(name: str, shape: tuple[int, ...], axes: MatrixAxes) -> MatrixAxes:
    """Raises unless ``axes`` names every axis of the leaf exactly once."""
    given = (*axes.batch, *axes.inputs, *axes.outputs)
    if sorted(given) != list(range(len(shape))) or not axes.inputs or not axes.outputs:
        raise ValueError(
            f"matrix_axes for leaf {name!r} of shape {shape}: {axes} must name each axis "
            f"0..{len(shape) - 1} exactly once, with at least one input and one output axis"
        )
    return axes


def matrix_axes(name: str, leaf: Any, override: MatrixAxesOverride = None) -> MatrixAxes | None:
    """How one leaf is seen as a stack of matrices, after the user's override.

    Args:
      name: the leaf's path as ``a/b/c``.
      leaf: anything with a shape.
      override: ``{pattern: MatrixAxes or None}`` (the first matching pattern counts), or a
        callable ``(path, leaf) -> MatrixAxes | None``; None from the callable means the default.
    """
    shape = tuple(np.shape(leaf))
    if callable(override):
        chosen = override(name, leaf)
        return (
            check_axes(name, shape, chosen)
            if chosen is not None
            else default_matrix_axes(name, shape)
        )
    for pattern, chosen in (override or {}).items():
        if fnmatch.fnmatchcase(name, pattern):
            return None if chosen is None else check_axes(name, shape, chosen)
    return default_matrix_axes(name, shape)


def output_axes(name: str, leaf: Any) -> tuple[int, ...]:
    """The axes that number a leaf's output channels: last, but first in an embedding table."""
    axes = matrix_axes(name, leaf)
    return axes.outputs if axes is not None else ()


def is_hidden_matrix(name: str, leaf: Any) -> bool:
    """The default of ``matrix_leaves``: rank two or more, and no embedding, head or norm scale."""
    last = name.rsplit("/", 1)[-1].lower()
    return (
        len(np.shape(leaf)) >= 2
        and last not in VECTOR_WORDS
        and not has_word(name, (*EMBEDDING_WORDS, *HEAD_WORDS))
    )


_axes_of = matrix_axes  # matrix_tree has an argument of that name


def matrix_tree(
    params: PyTree,
    matrix_leaves: LeafSelector = None,
    matrix_axes: MatrixAxesOverride = None,
) -> PyTree:
    """A tree of bools: which leaves a matrix method takes.

    By default the hidden matrices: rank two or more, no norm scale, and no path component that is,
    or ends in, ``embed``, ``embedding``, ``head``, ``lm_head`` or ``logits``; nor a leaf to which
    ``matrix_axes`` gives None.

    Raises:
      ValueError: for a chosen leaf that is no matrix, or whose layout is ambiguous.

    >>> matrix_tree({"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}})
    {'dense': {'bias': False, 'kernel': True}}
    """

    def default(name: str, leaf: Any) -> bool:
        if not is_hidden_matrix(name, leaf):
            return False
        return _axes_of(name, leaf, matrix_axes) is not None

    chosen = select_leaves(matrix_leaves, params, default=default, argument="matrix_leaves")
    for (name, leaf), use in zip(named_leaves(params), jax.tree.leaves(chosen), strict=True):
        if use and _axes_of(name, leaf, matrix_axes) is None:
            raise ValueError(
                f"matrix_leaves chooses leaf {name!r} of shape {leaf.shape}, which is no "
                "matrix: leave it out, or say how it is one, with "
                f"matrix_axes={{{name!r}: MatrixAxes(...)}}"
            )
    return chosen


def matrix_shape(shape: tuple[int, ...], axes: MatrixAxes) -> tuple[int, int, int]:
    """``(batch, inputs, outputs)``: how many matrices a leaf holds, and of what size."""
    return tuple(math.prod(shape[a] for a in group) for group in axes)  # type: ignore[return-value]


def describe(params: PyTree, matrix_axes_override: MatrixAxesOverride = None) -> str:
    """A table of what was decided for every leaf: kind, and the matrices it is seen as.

    >>> print(describe({"dense": {"kernel": np.zeros((4, 8)), "bias": np.zeros(8)}}))
    leaf           shape    kind    matrices
    dense/bias     (8,)     vector  -
    dense/kernel   (4, 8)   hidden  1 x (4 in, 8 out)
    """
    rows = [("leaf", "shape", "kind", "matrices")]
    for name, leaf in named_leaves(params):
        shape = tuple(np.shape(leaf))
        try:
            axes = matrix_axes(name, leaf, matrix_axes_override)
        except ValueError:
            rows.append((name, str(shape), "ambiguous", "needs matrix_axes"))
            continue
        if axes is None:
            kind = "vector"
        elif has_word(name, EMBEDDING_WORDS):
            kind = "embedding"
        elif has_word(name, HEAD_WORDS):
            kind = "head"
        else:
            kind = "hidden"
        seen = "-"
        if axes is not None:
            batch, inputs, outputs = matrix_shape(shape, axes)
            seen = f"{batch} x ({inputs} in, {outputs} out)"
        rows.append((name, str(shape), kind, seen))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    gaps = (3, 3, 2, 0)
    return "\n".join(
        "".join(
            cell.ljust(width + gap) for cell, width, gap in zip(row, widths, gaps, strict=True)
        ).rstrip()
        for row in rows
    )
