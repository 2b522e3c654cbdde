"""Matrices go one way, everything else another; and the recipe that most matrix methods share."""

from __future__ import annotations

from typing import Any

import jax
import optax

from optimkit.layout import MatrixAxesOverride
from optimkit.layout import matrix_tree as matrix_tree
from optimkit.leaves import check_match, check_real, decay_tree, recipe
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import (
    GradientTransformation,
    LeafSelector,
    Mask,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.adam import EPS_FORMS, scale_by_adam
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.orthogonalize import scale_by_muon


def by_kind(
    matrix: optax.GradientTransformation,
    vector: optax.GradientTransformation,
    matrix_leaves: LeafSelector = None,
    *,
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    """Sends matrices through one transformation, and all other leaves through another.

    Args:
      matrix: for the chosen leaves.
      vector: for the others: biases, norms, by default also embeddings and the output head.
      matrix_leaves: which leaves are matrices: a tree of bools, ``(path, leaf) -> bool``, or path
        patterns. Default: hidden matrices, by shape and path (see ``matrix_tree``).
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.

    Returns:
      A transformation with the state of ``optax.partition``: one inner state a kind, in which
      ``optax.MaskedNode`` stands for the leaves of the other kind.

    Raises:
      ValueError: for a chosen leaf that is no matrix, an ambiguous layout, or a gradient of
        another shape.

    >>> import jax.numpy as jnp, optax
    >>> tx = by_kind(optax.scale(2.0), optax.scale(-1.0))
    >>> grads = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    >>> updates, _ = tx.update(grads, tx.init(grads), grads)
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([[2.0, 2.0]], [-1.0, -1.0])
    """

    def labels(tree: PyTree) -> PyTree:
        chosen = matrix_tree(tree, matrix_leaves, matrix_axes)
        return jax.tree.map(lambda use: "matrix" if use else "vector", chosen)

    def split(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        # Extras shaped like the tree are divided with it. Every scalar is shaped like a bare array.
        bare = jax.tree.structure(tree) == jax.tree.structure(0)
        return optax.partition(
            {"matrix": matrix, "vector": vector}, labels, mask_compatible_extra_args=not bare
        )

    def init(params: PyTree) -> PyTree:
        return split(params).init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        return split(updates).update(updates, state, params, **extra)

    return transformation(init, update)


def matrix_recipe(
    direction: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: Any,
    mask: Mask,
    *,
    matrix_leaves: LeafSelector,
    matrix_axes: MatrixAxesOverride,
    adam_learning_rate: ScalarOrSchedule,
    adam_b1: Any,
    adam_b2: Any,
    adam_eps: Any,
    adam_weight_decay: Any,
    adam_eps_form: Any = "standard",
) -> GradientTransformation:
    """A direction for matrices with AdamW for the rest, each with its decay and rate.

    Decay is decoupled: it is added after the direction, any shape scale included, so that a step
    decays by rate times ``weight_decay``. ``adam_learning_rate`` and ``adam_weight_decay`` of None
    are those of the matrices.

    Raises:
      ValueError: if an argument is out of range.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    check_range(adam_learning_rate=adam_learning_rate, adam_weight_decay=adam_weight_decay, ge=0)
    check_range(adam_b1=adam_b1, adam_b2=adam_b2, ge=0, lt=1)
    check_range(adam_eps=adam_eps, ge=0)
    check_choice(EPS_FORMS, adam_eps_form=adam_eps_form)

    def split(
        matrix: optax.GradientTransformation, vector: optax.GradientTransformation
    ) -> GradientTransformation:
        return by_kind(matrix, vector, matrix_leaves, matrix_axes=matrix_axes)

    def decayed(kind: bool) -> Any:
        def leaves(params: PyTree) -> PyTree:
            kinds = matrix_tree(params, matrix_leaves, matrix_axes)
            chosen = decay_tree(mask, params)
            return jax.tree.map(
                lambda use, is_matrix: bool(use) and is_matrix == kind, chosen, kinds
            )

        return leaves

    adam = scale_by_adam(adam_b1, adam_b2, adam_eps, eps_form=adam_eps_form)
    links: list[optax.GradientTransformation] = [split(direction, adam)]
    if adam_weight_decay is None:
        links.append(decayed_weights(weight_decay, mask))
    else:
        links.append(decayed_weights(weight_decay, decayed(True)))
        links.append(decayed_weights(adam_weight_decay, decayed(False)))
    rate = optax.scale_by_learning_rate(learning_rate)
    if adam_learning_rate is None:
        return recipe(*links, rate)
    return recipe(*links, split(rate, optax.scale_by_learning_rate(adam_learning_rate)))


def _example_matrix() -> GradientTransformation:
    # Full products, so that the contract can compare to rounding.
    return scale_by_muon(ns_dtype=None)


RECORD = Method(
    factory=by_kind,
    kind="wrapper",
    summary="matrices through one transformation, other leaves through another",
    example_made={"matrix": _example_matrix, "vector": scale_by_adam},
    static=("matrix", "vector", "matrix_leaves", "matrix_axes"),
    position="any",
    communication="matrix",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    # Five steps multiply rounding by up to 3.44^5 = 485 where singular values are small.
    tolerance={"sharding": 5e-5, "compose": 2e-4},
)
