"""Walking over parameter trees: apply a step to every leaf, check what came in, find the state.

A method writes its rule for one array; these functions carry it over a tree, computing in f32 or
better and handing every array back in the dtype in which it came.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import named_leaves, path_name
from optimkit.numerics import compute_dtype, in_turn, narrow, turn_after
from optimkit.protocols import Array, GradientTransformation, Mask, PyTree, transformation

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
    check_structure(tree, reference, what=what, like=like)
    for path, (leaf, wanted) in _paired(tree, reference):
        if np.shape(leaf) != np.shape(wanted):
            raise ValueError(
                f"{what} leaf {path_name(path)!r} has shape {np.shape(leaf)}, "
                f"but {like} has {np.shape(wanted)}"
            )


def check_structure(tree: PyTree, reference: PyTree, *, what: str, like: str) -> None:
    """Raises unless two trees have the same structure; names the leaves that differ."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(reference)
    if structure == expected:
        return
    have, want = dict(named_leaves(tree)), dict(named_leaves(reference))
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    if missing or extra:
        detail = f"missing leaves {missing}, unexpected leaves {extra}"
    else:
        detail = f"{structure} against {expected}"
    raise ValueError(f"{what} and {like} are different trees: {detail}")


def matching_leaves(tree: PyTree, updates: PyTree, *, what: str) -> PyTree:
    """A tree that came as an extra argument, without the leaves that a mask took from the updates.

    ``optax.masked`` and ``optax.partition`` hide leaves of the updates, but hand extra arguments on
    as they are.

    Raises:
      ValueError: if what is left is another tree than the updates.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked))):
        tree = jax.tree.map(
            lambda u, leaf: u if is_masked(u) else leaf, updates, tree, is_leaf=is_masked
        )
    check_match(tree, updates, what=what, like="the gradient")
    return tree


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


def moment_paths(init: Callable[[PyTree], PyTree], state: PyTree, params: PyTree) -> PyTree:
    """Which arrays of a state are kept for every entry of a parameter, and in which field.

    Args:
      init: the transformation's ``init``; it is run on a placeholder.
      state: the state to look at, of arrays or of their shapes.
      params: the parameters, or a tree of the same names and shapes.

    Returns:
      A tree like ``state``: for a floating-point array that stands in a parameter's place and has
      its shape, the path of the field that holds it (``"0/mu"``); the empty string for all else.
    """
    shapes = {name: np.shape(leaf) for name, leaf in named_leaves(params)}

    def owner(name: str, leaf: Any) -> str:
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return name if floating and np.shape(leaf) == shapes.get(name) else ""

    def field(path: Any, name: str) -> str:
        whole = path_name(path)
        inside = "" if name == path_name(()) else "/" + name
        return whole.removesuffix(inside) if name else ""

    owners = map_param_state(init, owner, lambda leaf: "", state)
    return jax.tree_util.tree_map_with_path(field, owners)


# ---------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------


class Storage(Protocol):
    """How a wrapper keeps states otherwise than a step sees them; see ``stored_by``."""

    def decode(self, state: Any, turn: Array | None) -> Any:
        """A state for the step, made once ``turn`` is known; what it does not know, it returns."""
        ...

    def encode(self, old: Any, new: Array) -> Array | None:
        """Keeps a renewed state; returns what the next leaf waits for, if it knows ``old``."""
        ...


_storage: contextvars.ContextVar[Storage | None] = contextvars.ContextVar("storage", default=None)


@contextlib.contextmanager
def stored_by(storage: Storage) -> Iterator[None]:
    """Within it, ``map_leaves`` decodes and encodes states leaf by leaf, as their turn comes.

    So a wrapper that keeps states in fewer bits needs the fresh ones of one leaf at a time only.
    """
    token = _storage.set(storage)
    try:
        yield
    finally:
        _storage.reset(token)


def map_leaves(
    step: Callable[..., Any],
    updates: PyTree,
    *states: PyTree,
    reads: tuple[PyTree, ...] = (),
    take_turns: bool = True,
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
      take_turns: let each large leaf wait on CPUs for the state of the one before (``in_turn``).
        False: an earlier link does so already.

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
    turn: Array | None = None
    storage = _storage.get()
    for index, gradient in enumerate(flat):
        dtype = compute_dtype(gradient)
        others = [column[index] for column in columns]
        _check_shapes(updates, index, gradient, others)
        entry = in_turn(jnp.asarray(gradient, dtype), turn)
        seen = others if storage is None else [storage.decode(x, turn) for x in others]
        out = step(entry, *(_widen(x, dtype) for x in seen))
        out = out if isinstance(out, tuple) else (out,)
        kept = (gradient, *others[: len(states)])
        if any(np.shape(new) != np.shape(old) for new, old in zip(out, kept, strict=True)):
            raise _shape_error(updates, index, others)
        results.append(
            tuple(narrow(new, jnp.result_type(old)) for new, old in zip(out, kept, strict=True))
        )
        last = out[-1]
        if storage is not None:
            for old, new in zip(kept[1:], results[-1][1:], strict=True):
                made = storage.encode(old, new)
                last = last if made is None else made
        turn = turn_after(last, turn) if states and take_turns else None
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
    """A decay mask in any of optax's forms as a full tree of bools: True = decayed.

    Raises:
      ValueError: unless the mask, or what it returns, is a tree of bools like the parameters or a
        prefix of one.
    """
    chosen = mask(params) if callable(mask) else True if mask is None else mask
    wrong = [leaf for leaf in jax.tree.leaves(chosen) if np.shape(leaf) or not _is_flag(leaf)]
    if wrong:
        raise ValueError(f"mask must hold bools, True = decayed, got {wrong[0]!r}")
    try:
        return jax.tree.broadcast(chosen, params)
    except ValueError:
        have, want = dict(named_leaves(chosen)), dict(named_leaves(params))
        raise ValueError(
            "mask must be a tree of bools like the parameters, or a prefix of one: it has the "
            f"leaves {sorted(have)}, the parameters have {sorted(want)}"
        ) from None


def _is_flag(leaf: Any) -> bool:
    # 0 and 1 will do.
    return jnp.issubdtype(jnp.result_type(leaf), jnp.bool_) or isinstance(leaf, int)


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


def recipe(
    *links: optax.GradientTransformation, last: GradientTransformation | None = None
) -> GradientTransformation:
    """A paper's method as a chain: checks the input, computes in f32 or better, casts once, last.

    Every link sees gradients and parameters in ``promote_types(f32, parameter)`` and passes on
    updates in that dtype; the result is cast to the parameter's dtype.

    Args:
      *links: gradient transformations, applied in order; the last one applies the rate.
      last: a link without state behind them that sees the parameters in their own dtype, for what
        has to know how a weight is stored.

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
        if last is not None:
            new, _ = last.update(new, optax.EmptyState(), params)
        return narrow_like(new, params), state

    return transformation(init, update)
