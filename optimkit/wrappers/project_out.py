"""Gradients without the directions that earlier tasks need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import named_leaves
from optimkit.leaves import check_match, check_real, check_structure, narrow_like, widen
from optimkit.numerics import check_choice
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.wrappers.projectors import project, project_back

AXES = ("in", "out")


def side_of(projected_axis: str) -> int:
    """The side of an (..., in, out) kernel that an axis names.

    >>> side_of("out")
    1
    """
    check_choice(AXES, projected_axis=projected_axis)
    return AXES.index(projected_axis)


def without_span(x: Array, basis: Array, side: int) -> Array:
    """(..., in, out) without what lies in the span of (..., d, h) orthonormal columns on one side.

    Columns of zeros are none.

    >>> without_span(jnp.array([[1.0, 2.0]]), jnp.array([[0.0], [1.0]]), 1).tolist()
    [[1.0, 0.0]]
    """
    return x - project_back(project(x, [basis], [side]), [basis], [side], x)


def project_out(
    history: PyTree | Callable[[str, Any], Array | None],
    *,
    projected_axis: Literal["in", "out"] = "out",
) -> GradientTransformation:
    r"""Removes from each matrix what lies in the span of given directions.

    .. math:: U = G - G H H^T \quad\text{(outputs)}, \qquad U = G - H H^T G \quad\text{(inputs)}

    Args:
      history: H by leaf: orthonormal columns (d, h), or (..., d, h) for a stack of (..., in, out)
        kernels, d being the size of the projected side; zero columns do nothing. A tree like the
        parameters, with None, or a 0-d array, for a leaf that passes as it is; or
        ``(path, leaf) -> H``.
      projected_axis: the side that H belongs to: ``"out"``, or ``"in"``.

    Returns:
      A transformation without state.

    Raises:
      ValueError: if H is another tree, or does not fit the side of its leaf.

    With the directions that earlier tasks depend on as H, plain gradient steps leave what the layer
    gives along them as it was (``"out"``), or what it does to inputs within them (``"in"``). Decay
    that comes after it does change it, and so do moments from before H.

    >>> tx = project_out({"kernel": jnp.array([[1.0], [0.0]])})
    >>> grads = {"kernel": jnp.array([[3.0, 4.0]])}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> updates["kernel"].tolist()
    [[0.0, 4.0]]

    Reference: Cheng et al., "Continuous Subspace Optimization for Continual Learning",
    NeurIPS 2025, arXiv 2505.11816.
    """
    side = side_of(projected_axis)

    def bases(tree: PyTree) -> list[Array | None]:
        named = named_leaves(tree)
        if callable(history):
            found: list[Any] = [history(name, leaf) for name, leaf in named]
        else:
            # None is no leaf, unless it is told to be one.
            given = jax.tree.map(lambda h: np.zeros(()) if h is None else h, history,
                                 is_leaf=lambda h: h is None)  # fmt: skip
            check_structure(given, tree, what="history", like="the gradient")
            found = jax.tree.leaves(given)
        kept = [None if h is None or not np.ndim(h) else h for h in found]
        for (name, leaf), h in zip(named, kept, strict=True):
            shape = np.shape(leaf)
            if h is None:
                continue
            wanted = (*shape[:-2], shape[side - 2]) if len(shape) > 1 else None
            if np.shape(h)[:-1] != wanted:
                raise ValueError(
                    f"history of leaf {name!r} has shape {np.shape(h)}; for side "
                    f"{projected_axis!r} of a leaf of shape {shape} it must be "
                    f"{'absent' if wanted is None else f'{wanted} and a number of columns'}"
                )
        return kept

    def init(params: PyTree) -> optax.EmptyState:
        check_real(params, "parameter")
        bases(params)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        leaves, structure = jax.tree.flatten(widen(updates))
        new = [
            x if h is None else without_span(x, jnp.asarray(h, x.dtype), side)
            for x, h in zip(leaves, bases(updates), strict=True)
        ]
        return narrow_like(structure.unflatten(new), updates), state

    return transformation(init, update)


def _example_history(path: str, leaf: Any) -> Array | None:
    """The first output of each matrix."""
    del path
    return jnp.eye(leaf.shape[-1], 1) if np.ndim(leaf) == 2 and np.size(leaf) else None


RECORD = Method(
    factory=project_out,
    kind="piece",
    summary="gradients without the span of given directions",
    example={"history": _example_history},
    static=("history", "projected_axis"),
    position="first",
    communication="reduce",
    response="proportional",
    moved_bytes=12,
    paper='Cheng et al., "Continuous Subspace Optimization for Continual Learning", NeurIPS 2025, '
    "arXiv 2505.11816",
    reference="quinn-ch/CoSO@1a50a11000a2d562c71ec201593e789a5db47e39:coso/adamw.py:CoSOAdamW",
    licence="MIT",
)
