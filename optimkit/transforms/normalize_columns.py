"""SCALE's normalisation: every column of a gradient matrix is brought to norm one."""

from __future__ import annotations

import fnmatch
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit import layout
from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import check_match, map_leaves
from optimkit.numerics import check_choice, check_range, safe_div, safe_norm
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


def column_axes(name: str, leaf: Any, override: MatrixAxesOverride) -> tuple[int, ...]:
    """The axes that make up one column: the inputs of one output unit; none for vectors.

    A table of embeddings maps one-hot tokens to features, so its inputs are the vocabulary.
    """
    axes = layout.matrix_axes(name, leaf, override)
    if axes is None:
        return ()
    given = (
        override(name, leaf) is not None
        if callable(override)
        else any(fnmatch.fnmatchcase(name, pattern) for pattern in override or {})
    )
    last = name.rsplit("/", 1)[-1]
    is_table = len(np.shape(leaf)) == 2 and layout.has_word(last, layout.EMBEDDING_WORDS)
    return axes.outputs if is_table and not given else axes.inputs


def checked_axes(name: str, leaf: Any, axes: int | tuple[int, ...]) -> tuple[int, ...]:
    """The axes asked for, counted from the front; none for vectors."""
    rank = len(np.shape(leaf))
    asked = (axes,) if isinstance(axes, int) else tuple(axes)
    if rank < 2:
        return ()
    if any(not -rank <= axis < rank for axis in asked):
        raise ValueError(f"axes {axes} do not all exist in leaf {name!r} of shape {np.shape(leaf)}")
    return tuple(sorted({axis % rank for axis in asked}))


def normalize_columns(
    axes: Literal["inputs"] | int | tuple[int, ...] = "inputs",
    norm: Literal["rms", "l2"] = "rms",
    eps: Any = 1e-8,
    *,
    axis: int | tuple[int, ...] | None = None,
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""Divides every column of a matrix, all inputs of one output unit, by its norm.

    .. math::

        u_{:,j} \leftarrow \frac{u_{:,j}}{\max(r_j, \epsilon)}, \qquad
        r_j = \sqrt{\tfrac{1}{n}\textstyle\sum_i u_{ij}^2} \text{ (rms)} \quad\text{or}\quad
        r_j = \sqrt{\textstyle\sum_i u_{ij}^2} \text{ (l2)}

    The step no longer depends on the size of the gradient, so it needs a rate that decays and no
    clipping. A column with one huge entry becomes nearly one-hot, of size sqrt(n) for rms.

    Args:
      axes: what one norm is taken over. ``"inputs"``: the input axes of each matrix, which are all
        but the last of a convolution, and the vocabulary of an embedding table, so that a table
        gets one norm a feature, as in the authors' code. Or an axis or axes, the same for every
        leaf of rank two or more: 0 for columns, -1 for rows of (in, out) kernels.
      norm: ``"rms"`` is the authors' code, to which the published rates belong; ``"l2"`` the
        paper's formula, smaller by sqrt(n).
      eps: floor of the norm, >= 0; 1e-8 is the authors'. Not added: a column above it has norm
        one exactly.
      axis: the same as ``axes`` with a number.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell, or where a
        table is also the output layer and should have one norm a token:
        ``{"embed/embedding": MatrixAxes((), (1,), (0,))}``. Only for ``axes="inputs"``.

    Returns:
      A transformation without state, useful before or behind any other. Vectors and scalars pass
      as they are, and each layer of a stack has its own norms.

    Raises:
      ValueError: if an argument is out of range, the layout of a leaf is ambiguous, or a gradient
        has another shape.

    A zero column stays zero. A non-finite entry makes its own column NaN or zero.

    >>> import jax.numpy as jnp
    >>> tx = normalize_columns(norm="l2")
    >>> updates, _ = tx.update({"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, tx.init(None))
    >>> [[round(float(x), 3) for x in row] for row in updates["kernel"]]
    [[0.6, 0.0], [0.8, 0.0]]

    Reference: Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", 2025,
    arXiv 2506.16659.
    """
    check_choice(("rms", "l2"), norm=norm)
    check_range(eps=eps, ge=0)
    over = axes if axis is None else axis
    if isinstance(over, str):
        check_choice(("inputs",), axes=over)

    def reduced(tree: PyTree) -> PyTree:
        def of_leaf(path: Any, leaf: Any) -> tuple[int, ...]:
            name = layout.path_name(path)
            if isinstance(over, str):
                return column_axes(name, leaf, matrix_axes)
            return checked_axes(name, leaf, over)

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    def init(params: PyTree) -> optax.EmptyState:
        reduced(params)  # an ambiguous layout shows before training starts
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")

        def step(u: Array, axes: tuple[int, ...]) -> Array:
            if not axes or u.size == 0:
                return u
            length = math.prod(u.shape[a] for a in axes) if norm == "rms" else 1
            size = safe_norm(u, axes, keepdims=True) / math.sqrt(length)
            return safe_div(u, jnp.maximum(size, eps))

        return map_leaves(step, updates, reads=(reduced(updates),)), state

    return transformation(init, update)


RECORD = Method(
    factory=normalize_columns,
    kind="piece",
    summary="bring every column of a matrix to norm one",
    traced=("eps",),
    static=("axes", "norm", "axis", "matrix_axes"),
    position="any",
    communication="reduce",
    response="proportional",  # vectors pass as they are
    state_bytes=0,
    moved_bytes=12,
    paper='Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", 2025, '
    "arXiv 2506.16659",
    reference="OptimAI-Lab/Minimalist_LLM_Pretraining@f5bd4e754eb9:"
    "mem_eff_pt/pt_scale/scale_optimizer.py:SCALE",
    licence="",
)
