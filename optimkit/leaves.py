"""Walking over parameter trees: apply a step to every leaf, check what came in, find the state.

A method writes its rule for one array; these functions carry it over a tree, computing in f32 or
better and handing every array back in the dtype in which it came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import named_leaves, path_name
from optimkit.numerics import compute_dtype, narrow
from optimkit.protocols import GradientTransformation, Mask, PyTree, transformation

# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


def check_real(tree: PyTree, what: str) -> None:
    """Raises unless every leaf is a real floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            continue
        if jnp.issubdtype(dtype, jnp.complexfloating):
            hint = "wrap the optimizer in optax.contrib.split_real_and_imaginary"
        else:
            hint = (
                "leave it out, with optax.masked or by differentiating only floating-point leaves"
            )
        raise TypeError(f"{what} leaf {path_name(path)!r} has dtype {dtype}: {hint}")


def check_match(tree: PyTree, reference: PyTree, *, what: str, like: str) -> None:
    """Raises unless two trees have the same structure and leaf shapes; names the first difference.

    A gradient of shape (1, 3) for a parameter of shape (2, 3) would broadcast in silence.
    """
    structure, expected = jax.tree.structure(tree), jax.tree.structure(reference)
    if structure != expected:
        have = dict(named_leaves(tree))
        want = dict(named_leaves(reference))
        missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
        if missing or extra:
            detail = f"missing leaves {missing}, unexpected leaves {extra}"
        else:
            detail = f"{structure} against {expected}"
        raise ValueError(f"{what} and {like} are different trees: {detail}")
    for path, (leaf, wanted) in _paired(tree, reference):
        if np.shape(leaf) != np.shape(wanted):
            raise ValueError(
                f"{what} leaf {path_name(path)!r} has shape {np.shape(leaf)}, "
                f"but {like} has {np.shape(wanted)}"
            )


def _paired(tree: PyTree, reference: PyTree) -> list[tuple[Any, tuple[Any, Any]]]:
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    others = jax.tree.leaves(reference)
    return [(path, (leaf, other)) for (path, leaf), other in zip(with_path, others, strict=True)]


def require_params(params: PyTree | None, who: str) -> PyTree:
    """Raises a clear error when ``update`` was called without the parameters."""
    if params is None:
        raise ValueError(f"{who} needs the parameters: call update(gradients, state, params)")
    return params


# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------


def zeros_like(params: PyTree, dtype: Any = None) -> PyTree:
    """Zeros in the place of every parameter, f32 at least unless a dtype is asked for."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or compute_dtype(p)), params)


def scalars_like(params: PyTree, value: float = 0.0) -> PyTree:
    """One scalar in the place of every parameter: the running statistics of a leaf."""
    return jax.tree.map(lambda p: jnp.asarray(value, compute_dtype(p)), params)


def zero_count() -> jax.Array:
    """A step count at zero."""
    return jnp.zeros((), jnp.int32)


def map_param_state(
    init: Callable[[PyTree], PyTree],
    at_param: Callable[[str, Any], Any],
    elsewhere: Callable[[Any], Any],
    state: PyTree,
) -> PyTree:
    """Maps a state, telling apart what stands in a parameter's place.

    Args:
      init: the transformation's ``init``; it is run on a placeholder.
      at_param: ``(name of the parameter, leaf) -> value`` for leaves in a parameter's place.
      elsewhere: ``leaf -> value`` for all other leaves.
      state: the state to map.
    """

    def in_place(subtree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: at_param(path_name(path), leaf), subtree
        )

    # optax's own placeholder: optax.masked with a tree of bools knows no other.
    return optax.tree_map_params(
        init, in_place, state, transform_non_params=elsewhere, is_leaf=lambda _: True
    )


# ---------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------


def map_leaves(
    step: Callable[..., Any], updates: PyTree, *states: PyTree, reads: tuple[PyTree, ...] = ()
) -> Any:
    """Applies one method's rule to every leaf.

    ``step(gradient, *states, *reads)`` receives arrays in ``promote_types(f32, gradient)`` and
    returns the update followed by the new states. The update goes back in the gradient's dtype,
    every state in the dtype in which it is kept.

    Args:
      step: the rule for one leaf.
      updates: the incoming gradients or updates.
      *states: trees like ``updates`` that the rule reads and renews.
      reads: trees like ``updates`` that the rule only reads.

    Returns:
      ``(updates, *states)``, or ``updates`` alone when there are no states.

    Raises:
      TypeError: for a complex or integer leaf.
      ValueError: for a tree or leaf shape that does not match, naming the leaf.
    """
    check_real(updates, "gradient")
    flat, structure = jax.tree.flatten(updates)
    columns = []
    for index, tree in enumerate((*states, *reads)):
        try:
            columns.append(structure.flatten_up_to(tree))
        except ValueError:
            like = "the state" if index < len(states) else "the parameters"
            check_match(updates, tree, what="gradient", like=like)
            raise
    results = []
    for index, gradient in enumerate(flat):
        dtype = compute_dtype(gradient)
        others = [column[index] for column in columns]
        _check_shapes(updates, index, gradient, others)
        out = step(jnp.asarray(gradient, dtype), *(_widen(x, dtype) for x in others))
        out = out if isinstance(out, tuple) else (out,)
        kept = (gradient, *others[: len(states)])
        if any(np.shape(new) != np.shape(old) for new, old in zip(out, kept, strict=True)):
            raise _shape_error(updates, index, others)
        results.append(
            tuple(narrow(new, jnp.result_type(old)) for new, old in zip(out, kept, strict=True))
        )
    trees = tuple(structure.unflatten(column) for column in zip(*results, strict=True)) or (
        updates,
        *states,
    )
    return trees if states else trees[0]


def _widen(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) else x


def _check_shapes(updates: PyTree, index: int, gradient: Any, others: list[Any]) -> None:
    # A 0-d entry may be a statistic of the leaf, which stands beside a leaf of any shape.
    allowed = (np.shape(gradient), ())
    if any(hasattr(other, "shape") and other.shape not in allowed for other in others):
        raise _shape_error(updates, index, others)


def _shape_error(updates: PyTree, index: int, others: list[Any]) -> ValueError:
    path, gradient = jax.tree_util.tree_leaves_with_path(updates)[index]
    shapes = sorted({np.shape(other) for other in others} - {np.shape(gradient)})
    return ValueError(
        f"gradient leaf {path_name(path)!r} has shape {np.shape(gradient)}, "
        f"but its parameter or state has {', '.join(map(str, shapes))}"
    )


def decay_tree(mask: Mask, params: PyTree) -> PyTree:
    """A decay mask in any of optax's forms as a full tree of bools: True = decayed."""
    chosen = mask(params) if callable(mask) else True if mask is None else mask
    return jax.tree.broadcast(chosen, params)


# ---------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------


def widen(tree: PyTree, like: PyTree | None = None) -> PyTree:
    """Every leaf in f32 at least, or in the compute dtype of the matching leaf of ``like``."""
    if like is None:
        like = tree
    return jax.tree.map(lambda x, p: jnp.asarray(x, compute_dtype(p)), tree, like)


def narrow_like(tree: PyTree, like: PyTree) -> PyTree:
    """Every leaf in the dtype of the matching leaf of ``like``; finite entries stay finite."""
    return jax.tree.map(lambda x, p: narrow(x, jnp.result_type(p)), tree, like)


def recipe(*links: optax.GradientTransformation) -> GradientTransformation:
    """A paper's method as a chain: checks the input, computes in f32 or better, casts once, last.

    Every link sees gradients and parameters in ``promote_types(f32, parameter)`` and passes on
    updates in that dtype; the result is cast to the parameter's dtype.

    Args:
      *links: gradient transformations, applied in order; the last one applies the rate.

    Returns:
      A transformation whose ``update`` needs the parameters, and ignores extra arguments that no
      link knows. Its state is the tuple of the links' states.

    Raises:
      ValueError: from ``update``, without parameters or for gradients of another tree or shape.
      TypeError: for complex or integer leaves, naming the leaf.
    """
    inner = optax.with_extra_args_support(optax.chain(*links))

    def init(params: PyTree) -> PyTree:
        check_real(params, "parameter")
        return inner.init(widen(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        params = require_params(params, "this optimizer")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        new, state = inner.update(widen(updates, params), state, widen(params), **extra)
        return narrow_like(new, params), state

    return transformation(init, update)
