"""Random directions as large as the parameters, made from their key wherever they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import select_leaves
from optimkit.leaves import check_match
from optimkit.numerics import check_choice, compute_dtype, safe_norm, turn_after
from optimkit.protocols import Array, LeafSelector, PyTree

NoiseKind: TypeAlias = Literal["normal", "rademacher", "sphere"]
KINDS = ("normal", "rademacher", "sphere")


def sample_direction(
    key: Array, params: PyTree, kind: NoiseKind = "normal", mask: LeafSelector = None
) -> PyTree:
    r"""Noise z in the place of every parameter, with :math:`E[z z^T] = I`.

    Args:
      key: a random key. Leaf i takes ``fold_in(key, i)``, in JAX's order of leaves, so that no leaf
        depends on how many others there are.
      params: the tree to be like.
      kind: ``"normal"``; ``"rademacher"``, signs; ``"sphere"``, uniform on the sphere whose radius
        is the root of the number of entries, over all leaves together.
      mask: which leaves are drawn, True = drawn: a tree of bools, ``(path, leaf) -> bool`` or path
        patterns; default all. The others are zero, as integer leaves are.

    Returns:
      A tree like ``params``, in f32 at least.

    Raises:
      ValueError: for another kind, or a mask of another tree.

    >>> z = sample_direction(jax.random.key(0), {"w": jnp.zeros(3), "n": jnp.zeros(2)}, "sphere")
    >>> round(float(jnp.sum(z["w"] ** 2) + jnp.sum(z["n"] ** 2)), 4)
    5.0
    """
    return Direction(key, params, kind, mask).tree()


class Direction:
    """A direction that is never kept: ``leaf(i)`` makes the noise of leaf i anew.

    ``after(value)`` is the same direction, to be made after ``value`` is known: without it the
    compiler would find that two readings are equal, and keep the first for the second.
    """

    def __init__(
        self, key: Array, params: PyTree, kind: NoiseKind = "normal", mask: LeafSelector = None
    ) -> None:
        check_choice(KINDS, noise=kind)
        self._key, self._kind = key, kind
        self._leaves, self._structure = jax.tree.flatten(params)
        chosen = select_leaves(mask, params, default=lambda name, leaf: True, argument="mask")
        self._drawn = [
            bool(c) and jnp.issubdtype(jnp.result_type(w), jnp.floating)
            for c, w in zip(jax.tree.leaves(chosen), self._leaves, strict=True)
        ]
        self._scale = self._sphere_scale() if kind == "sphere" else None

    def _sphere_scale(self) -> Array:
        norms = [safe_norm(self._raw(i)) for i, drawn in enumerate(self._drawn) if drawn]
        size = sum(np.size(w) for w, d in zip(self._leaves, self._drawn, strict=True) if d)
        norm = safe_norm(jnp.stack(norms)) if norms else jnp.ones(())
        return jnp.sqrt(jnp.asarray(float(size), norm.dtype)) / norm

    def _raw(self, index: int) -> Array:
        like = self._leaves[index]
        key, dtype = jax.random.fold_in(self._key, index), compute_dtype(like)
        draw = jax.random.rademacher if self._kind == "rademacher" else jax.random.normal
        return draw(key, np.shape(like), dtype)

    def leaf(self, index: int) -> Array:
        """The noise of one leaf."""
        like = self._leaves[index]
        if not self._drawn[index]:
            return jnp.zeros(np.shape(like), compute_dtype(like))
        z = self._raw(index)
        return z if self._scale is None else z * self._scale.astype(z.dtype)

    def tree(self) -> PyTree:
        """The noise of all leaves."""
        return self._structure.unflatten([self.leaf(i) for i in range(len(self._leaves))])

    def after(self, value: Array) -> Direction:
        """The same direction, made only once a scalar is known."""
        later = object.__new__(Direction)
        later.__dict__.update(self.__dict__)
        later._key = _wait(self._key, value)
        return later

    def map(self, function: Callable[[Array, Array], Array], tree: PyTree) -> PyTree:
        """``function(w, z)`` over the leaves that are drawn, in the dtypes of ``tree``."""
        results, turn, z = [], None, self
        for i, w in enumerate(self._structure.flatten_up_to(tree)):
            if not self._drawn[i]:
                results.append(w)
                continue
            # One after the other, or the noise of all leaves would be there at once.
            z = z if turn is None else self.after(turn)
            new = function(jnp.asarray(w, compute_dtype(w)), z.leaf(i))
            turn = turn_after(new, turn)
            results.append(new.astype(jnp.result_type(w)))
        return self._structure.unflatten(results)


class GivenDirection(Direction):
    """A direction that came from outside."""

    def __init__(self, direction: PyTree, params: PyTree, mask: LeafSelector = None) -> None:
        check_match(direction, params, what="direction", like="the parameters")
        super().__init__(jnp.zeros((2,), jnp.uint32), params, "normal", mask)
        self._given = jax.tree.leaves(direction)

    def _raw(self, index: int) -> Array:
        return jnp.asarray(self._given[index], compute_dtype(self._leaves[index]))

    def after(self, value: Array) -> Direction:
        """Itself: it is there already."""
        del value
        return self


def _wait(key: Array, value: Array) -> Array:
    # Adds a zero that the compiler cannot know to be one.
    zero = (jnp.where(jnp.isfinite(value), value, 0) * 0).astype(jnp.uint32)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(key) + zero
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return key + zero


def directional_derivative(
    loss_fn: Callable[[PyTree], Any],
    params: PyTree,
    direction: PyTree,
    method: Literal["fd", "jvp"] = "jvp",
    *,
    eps: Any = 1e-3,
) -> Array:
    r"""The slope of a loss along a direction: :math:`\langle \nabla L(w), z \rangle`.

    Args:
      loss_fn: from parameters to a scalar.
      params: w.
      direction: z, a tree like them.
      method: ``"jvp"``: exact, by forward mode. ``"fd"``: from two values,
        :math:`(L(w + \epsilon z) - L(w - \epsilon z)) / 2\epsilon`; the loss needs no
        derivative.
      eps: the way, for ``"fd"``.

    Returns:
      A scalar, f32 at least.

    Raises:
      ValueError: for another method, or a direction of another tree.

    >>> w = {"a": jnp.array([1.0, 2.0])}
    >>> z = {"a": jnp.array([1.0, -1.0])}
    >>> float(directional_derivative(lambda w: jnp.sum(w["a"] ** 2), w, z))
    -2.0
    """
    check_choice(("fd", "jvp"), method=method)
    z = GivenDirection(direction, params)
    if method == "jvp":
        return along(loss_fn, params, z)[1]
    plus = loss_fn(z.map(lambda w, z: w + eps * z, params))
    minus = loss_fn(z.map(lambda w, z: w - eps * z, params))
    return difference_quotient(plus, minus, 2 * eps)


def difference_quotient(plus: Any, minus: Any, width: Any) -> Array:
    """``(plus - minus) / width``, in f32 at least."""
    dtype = compute_dtype(plus)
    return (jnp.asarray(plus, dtype) - jnp.asarray(minus, dtype)) / jnp.asarray(width, dtype)


def along(
    loss_fn: Callable[[PyTree], Any], params: PyTree, z: Direction, has_aux: bool = False
) -> tuple[Any, Array]:
    """The loss, with its auxiliary results if it has any, and its slope along z."""
    leaves, structure = jax.tree.flatten(params)
    moving = [i for i, w in enumerate(leaves) if jnp.issubdtype(jnp.result_type(w), jnp.floating)]

    def loss(*few: Array) -> Any:
        whole = list(leaves)
        for i, w in zip(moving, few, strict=True):
            whole[i] = w
        return loss_fn(structure.unflatten(whole))

    primals = tuple(jnp.asarray(leaves[i]) for i in moving)
    tangents = tuple(z.leaf(i).astype(w.dtype) for i, w in zip(moving, primals, strict=True))
    if not moving:
        raise ValueError("params has no floating-point leaf to move")
    out = jax.jvp(loss, primals, tangents, has_aux=has_aux)
    value = (out[0], out[2]) if has_aux else out[0]
    return value, out[1].astype(compute_dtype(out[1]))
