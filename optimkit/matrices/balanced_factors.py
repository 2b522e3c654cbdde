"""Balanced factors of a product: other factors of the same matrix, of equal size and orthogonal.

Factors are in Flax layout: ``a`` (in, r) and ``b`` (r, out), the weight is ``a @ b``; leading axes
number the layers of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import named_leaves
from optimkit.leaves import check_real
from optimkit.matrices.decompositions import qr, svd
from optimkit.matrices.engine import gather, map_matrices, place_like
from optimkit.matrices.statistics import frobenius_norm
from optimkit.matrices.subspace import canonical_signs, product
from optimkit.numerics import compute_dtype, narrow, safe_div
from optimkit.protocols import Array, MatrixAxes, PyTree

PairPredicate = Callable[[str, str], bool]
"""``(path of a, path of b) -> bool``: whether two leaves are the factors of one weight."""

LORA_PARTNERS: Mapping[str, str] = {"lora_a": "lora_b", "lora_A": "lora_B"}
"""Names of first factors, as any component of a path, and what stands there for the second."""

PLAIN_PARTNERS: Mapping[str, str] = {"a": "b"}
"""The same for the last component of a path alone."""


def refactorize(a: Array, b: Array) -> tuple[jax.Array, jax.Array]:
    r"""The balanced factors of a product: it stays the same, and they share its singular values.

    .. math::

        a\, b = U S V^T, \qquad a' = U \sqrt{S}, \quad b' = \sqrt{S}\, V^T, \qquad
        a'^T a' = b' b'^T = S

    Of all factors of a product, these have the smallest :math:`\|a\|^2 + \|b\|^2`.

    Args:
      a: first factor, (..., in, r).
      b: second factor, (..., r, out).

    Returns:
      ``(a', b')`` in the shapes and dtypes of ``a`` and ``b``, computed in f32 at least and cast
      once. Both are unchanged where the product is zero, is lost in rounding (its largest singular
      value is below 1e-6 of the product of the factors' norms in f32), or is not finite.

    Raises:
      ValueError: if the shapes do not fit.
      TypeError: for complex or integer factors.

    The product itself is never made: QR of ``a`` and of :math:`b^T`, then the singular values of
    an (r, r) matrix; that is O((in + out) r^2). A product of rank below r, such as one with r above
    ``in`` or ``out``, gets columns of ``a'`` and rows of ``b'`` that are zero, or of the size of
    rounding errors. The gradients of such a pair are zero too: training by gradients alone never
    brings that rank back. Signs: in each column of ``a'`` over that of ``b'^T`` the largest entry
    is positive.

    >>> import jax.numpy as jnp
    >>> a, b = refactorize(jnp.array([[30.0], [40.0]]), jnp.array([[0.5]]))
    >>> [round(x, 3) for x in a.ravel().tolist()], round(b.item(), 3)  # norm 5 both
    ([3.0, 4.0], 5.0)
    """
    check_real((a, b), "factor")
    a, b = jnp.asarray(a), jnp.asarray(b)
    _check_fit(a, b, "a", "b")
    if 0 in (*a.shape, *b.shape):
        return a, b
    return _apart(_balanced(_together(a, b), a.shape[-2]), a, b)


def refactorize_params(params: PyTree, is_pair: PairPredicate | None = None) -> PyTree:
    """``refactorize`` for all pairs of factors in a tree; the other leaves are handed back.

    Args:
      params: a tree of any kind: dicts, tuples, ``nnx.State``, modules.
      is_pair: ``(path of a, path of b) -> bool``, asked for every two leaves, with paths as
        ``a/b/c``. Default: paths that are equal up to one component, which is ``lora_a`` in one and
        ``lora_b`` in the other (or ``lora_A`` and ``lora_B``), or up to their last, which is ``a``
        and ``b``.

    Returns:
      A tree like ``params``, on an explicit mesh each leaf where it was.

    Raises:
      ValueError: naming the leaves, if the shapes of a pair do not fit, a leaf is in two pairs, a
        ``lora_a`` or ``lora_b`` of rank two is alone, or no pair has the default names.
      TypeError: for a complex or integer leaf.

    For loops: call it after every so many updates, and make the state of the optimizer anew.
    ``optimkit.refactorized`` does it inside a transformation. Pairs of equal sizes are decomposed
    together, and divided among the devices of a mesh.

    >>> import jax.numpy as jnp
    >>> params = {"lora_a": jnp.array([[8.0]]), "lora_b": jnp.array([[0.5]])}
    >>> [round(x.item(), 3) for x in refactorize_params(params).values()]
    [2.0, 2.0]
    """
    check_real(params, "parameter")
    pairs = factor_pairs(params, is_pair)
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(refactorize_pairs(leaves, pairs))


def refactorize_pairs(leaves: list[Any], pairs: list[tuple[int, int]]) -> list[Any]:
    """The leaves with every pair of places balanced; what ``factor_pairs`` found is fine."""
    leaves = list(leaves)
    groups: dict[Any, list[tuple[int, int]]] = {}
    for place_a, place_b in pairs:
        a, b = jnp.asarray(leaves[place_a]), jnp.asarray(leaves[place_b])
        if 0 not in (*a.shape, *b.shape):
            key = (a.shape[-2:], b.shape[-1], compute_dtype(a, b))
            groups.setdefault(key, []).append((place_a, place_b))
    for ((inputs, rank), outputs, _), members in groups.items():
        factors = [(jnp.asarray(leaves[i]), jnp.asarray(leaves[j])) for i, j in members]
        tall = inputs + outputs > rank

        def kernel(stack: Array, inputs: int = inputs, tall: bool = tall) -> Array:
            # The engine hands out matrices that are not taller than wide.
            turned = _transposed(stack) if tall else stack
            done = _balanced(turned, inputs)
            return _transposed(done) if tall else done

        joined = [_together(a, b) for a, b in factors]
        axes = [MatrixAxes(tuple(range(x.ndim - 2)), (x.ndim - 2,), (x.ndim - 1,)) for x in joined]
        done = map_matrices(kernel, joined, axes)
        for (place_a, place_b), (a, b), x in zip(members, factors, done, strict=True):
            leaves[place_a], leaves[place_b] = _apart(x, a, b)
    return leaves


# ---------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------


def factor_pairs(params: PyTree, is_pair: PairPredicate | None = None) -> list[tuple[int, int]]:
    """The places of the two factors of every pair, in the order of ``jax.tree.leaves``.

    Raises:
      ValueError: as ``refactorize_params`` does.
    """
    named = named_leaves(params)
    if is_pair is None:
        pairs = _pairs_by_name(named)
        if named and not pairs:
            raise ValueError(
                "no pair of factors found: call them lora_a and lora_b, or a and b, or say with "
                f"is_pair which they are; the leaves are {[name for name, _ in named]}"
            )
    else:
        places = range(len(named))
        pairs = [
            (i, j) for i in places for j in places if i != j and is_pair(named[i][0], named[j][0])
        ]
    seen: dict[int, tuple[int, int]] = {}
    for pair in pairs:
        (name_a, a), (name_b, b) = named[pair[0]], named[pair[1]]
        for place in pair:
            if place in seen:
                other = [named[i][0] for i in seen[place]]
                raise ValueError(
                    f"leaf {named[place][0]!r} is in two pairs of factors, {[name_a, name_b]} and "
                    f"{other}"
                )
            seen[place] = pair
        _check_fit(a, b, name_a, name_b)
    return pairs


def _pairs_by_name(named: list[tuple[str, Any]]) -> list[tuple[int, int]]:
    places = {name: index for index, (name, leaf) in enumerate(named) if np.ndim(leaf) >= 2}
    second_to_first = {second: first for first, second in LORA_PARTNERS.items()}
    pairs = []
    for name, place in places.items():
        partner = _renamed(name, LORA_PARTNERS)
        if partner in places:
            pairs.append((place, places[partner]))
        elif partner is not None:
            raise ValueError(f"factor {name!r} has no partner: there is no matrix {partner!r}")
        elif (first := _renamed(name, second_to_first)) is not None and first not in places:
            raise ValueError(f"factor {name!r} has no partner: there is no matrix {first!r}")
        elif (second := _renamed(name, PLAIN_PARTNERS, last=True)) in places:
            pairs.append((place, places[second]))
    return pairs


def _renamed(name: str, names: Mapping[str, str], *, last: bool = False) -> str | None:
    """The path with the last component that is in ``names`` renamed; None where none is."""
    parts = name.split("/")
    found = [place for place, part in enumerate(parts) if part in names]
    if not found or (last and found[-1] != len(parts) - 1):
        return None
    parts[found[-1]] = names[parts[found[-1]]]
    return "/".join(parts)


def _check_fit(a: Any, b: Any, name_a: str, name_b: str) -> None:
    first, second = np.shape(a), np.shape(b)
    fit = len(first) >= 2 and first[:-2] == second[:-2] and first[-1:] == second[-2:-1]
    if not fit:
        raise ValueError(
            f"factors {name_a!r} of shape {first} and {name_b!r} of shape {second} do not fit: "
            "they must be (..., in, r) and (..., r, out)"
        )


# ---------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------


def _together(a: Array, b: Array) -> jax.Array:
    """``a`` over the transpose of ``b``, (..., in + out, r), in f32 at least."""
    dtype = compute_dtype(a, b)
    rows = gather(a), _transposed(gather(b))
    return jnp.concatenate([x.astype(dtype) for x in rows], axis=-2)


def _apart(joined: Array, a: Array, b: Array) -> tuple[jax.Array, jax.Array]:
    """The inverse: factors in the shapes, dtypes and places of ``a`` and ``b``."""
    first, second = jnp.split(joined, [a.shape[-2]], axis=-2)
    second = _transposed(second)
    return place_like(narrow(first, a.dtype), a), place_like(narrow(second, b.dtype), b)


def _transposed(x: Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)


def _q_and_r(x: Array) -> tuple[jax.Array, jax.Array]:
    """Orthonormal columns, as many as the smaller side of ``x``, and x in terms of them."""
    q, _ = qr(x)
    return q, product(_transposed(q), x)


def _balanced(joined: Array, inputs: int) -> jax.Array:
    """Balances each matrix ``(a over b^T)`` of a stack, or hands it back; a has ``inputs`` rows."""
    a, b = jnp.split(joined, [inputs], axis=-2)
    norm_a, norm_b = frobenius_norm(a), frobenius_norm(b)
    finite = jnp.isfinite(norm_a) & jnp.isfinite(norm_b)

    q_a, r_a = _q_and_r(jnp.where(finite, safe_div(a, norm_a), 0))
    q_b, r_b = _q_and_r(jnp.where(finite, safe_div(b, norm_b), 0))
    left, values, right = svd(product(r_a, _transposed(r_b)))
    vectors = canonical_signs(
        jnp.concatenate([product(q_a, left), product(q_b, _transposed(right))], axis=-2)
    )
    # Not the root of the product, which may overflow.
    roots = jnp.sqrt(values)[..., None, :] * jnp.sqrt(norm_a) * jnp.sqrt(norm_b)
    new = vectors * roots
    missing = joined.shape[-1] - new.shape[-1]
    new = jnp.pad(new, [(0, 0)] * (new.ndim - 1) + [(0, missing)])
    largest = values[..., :1, None]
    real = largest > 8 * float(jnp.finfo(joined.dtype).eps)  # else the product is rounding error
    return jnp.where(finite & real, new, joined)
