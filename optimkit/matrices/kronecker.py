"""Two-sided preconditioning of layers: a kernel and its bias between two symmetric factors.

A factor of the inputs has a row and a column more where the layer has a bias, whose input is 1.
That row is kept apart, ``corner`` last, so that the square part divides evenly among devices. On a
mesh each device holds some rows of every factor and does its share of the products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding

from optimkit.matrices import placement
from optimkit.protocols import Array, MatrixAxes

HIGHEST = lax.Precision.HIGHEST


class Factor(NamedTuple):
    """A symmetric factor, or a stack of them.

    ``square``: (..., n, n). ``border``: None, or (..., n + 1), the row of the bias and last its
    corner.
    """

    square: Array
    border: Array | None


# ---------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------


def _mesh_of(like: Array) -> tuple[Any, tuple[str, ...], bool]:
    """The mesh of an array, the axes to divide work over, and whether types say where it lies."""
    mesh = jax.typeof(like).sharding.mesh
    explicit = placement.explicit_axes(like)
    names = explicit or placement.axes_of_kind(mesh, AxisType.Auto)
    return mesh, names, bool(explicit)


def _dividing(like: Array, size: int) -> tuple[str, ...]:
    """Mesh axes that divide ``size`` rows evenly, taken in order."""
    mesh, names, _ = _mesh_of(like)
    chosen: list[str] = []
    for name in names:
        if size % math.prod(mesh.shape[n] for n in (*chosen, name)) == 0:
            chosen.append(name)
    return tuple(chosen)


def _lay(x: Array, like: Array, last: tuple[tuple[str, ...], ...]) -> Array:
    """Lays the last axes of ``x`` on the mesh of ``like``; the leading ones are whole."""
    mesh, names, explicit = _mesh_of(like)
    if not names:
        return x
    spec = (((),) * (x.ndim - len(last))) + last
    if explicit:
        return placement.walk(x, spec)
    return lax.with_sharding_constraint(x, placement.sharding(mesh, spec))


def whole(x: Array, like: Array) -> Array:
    """``x`` on every device of the mesh of ``like``."""
    return _lay(x, like, ((),) * x.ndim)


def _rows(x: Array, like: Array) -> Array:
    return _lay(x, like, (_dividing(like, x.shape[-2]), ()))


def divided(x: Array) -> Array:
    """A matrix that lies whole on each device of an automatic mesh, for a share of work on it."""
    _, names, explicit = _mesh_of(x)
    return x if explicit or not names else _rows(x, x)


def identity(batch: tuple[int, ...], size: int, border: bool, like: Array, dtype: Any) -> Factor:
    """An identity, or a stack of them, its rows divided among the devices of ``like``."""
    shape = (*batch, size, size)
    mesh, _, explicit = _mesh_of(like)
    sharding = None
    if explicit:
        spec = (*(() for _ in batch), _dividing(like, size), ())
        sharding = placement.sharding(mesh, spec)
    row, column = (
        lax.broadcasted_iota(jnp.int32, shape, len(batch) + axis, out_sharding=sharding)
        for axis in range(2)
    )
    square = (row == column).astype(dtype)
    edge = jnp.broadcast_to((jnp.arange(size + 1) == size).astype(dtype), (*batch, size + 1))
    return Factor(
        square if explicit else _rows(square, like), whole(edge, like) if border else None
    )


# ---------------------------------------------------------------------------------------------
# A factor and a vector
# ---------------------------------------------------------------------------------------------


class Image(NamedTuple):
    """What a factor M makes of a vector v: ``M v``, that of the bias apart, and ``v . M v``."""

    vector: Array
    bias: Array | None
    form: Array


def image(factor: Factor, v: Array) -> Image:
    """``M v`` and ``v . M v`` of a vector (..., n), to which 1 is added where M has a border."""
    square, border = factor
    u = jnp.einsum("...ij,...j->...i", square, v, precision=HIGHEST)
    u = whole(u, square)
    bias = None
    if border is not None:
        u = u + border[..., :-1]
        bias = jnp.sum(border[..., :-1] * v, axis=-1) + border[..., -1]
    form = jnp.sum(v * u, axis=-1)
    return Image(u, bias, form if bias is None else form + bias)


def rank_one(factor: Factor, keep: Array, of: Image, weight: Array) -> Factor:
    """``keep M + weight (M v)(M v)^T``; ``keep`` and ``weight`` are one number a matrix."""
    square, border = factor
    left = _lay(of.vector[..., None], square, (_dividing(square, square.shape[-1]), ()))
    keep, weight = jnp.asarray(keep, square.dtype), jnp.asarray(weight, square.dtype)

    def over(x: Array, axes: int) -> Array:
        return jnp.expand_dims(x, tuple(range(-axes, 0)))

    new = over(keep, 2) * square + over(weight, 2) * left * of.vector[..., None, :]
    if border is None or of.bias is None:
        return Factor(_rows(new, square), None)
    edge = jnp.concatenate([of.vector, of.bias[..., None]], axis=-1) * of.bias[..., None]
    return Factor(_rows(new, square), over(keep, 1) * border + over(weight, 1) * edge)


def blend(factor: Factor, share: Array) -> Factor:
    """``(1 - share) M + share I``; share 1 is the identity whatever M holds."""
    square, border = factor
    shape = square.shape
    one = identity(shape[:-2], shape[-1], border is not None, square, square.dtype)

    share = jnp.broadcast_to(jnp.asarray(share, square.dtype), shape[:-2])

    def mix(m: Array, i: Array) -> Array:
        s = jnp.expand_dims(share, tuple(range(share.ndim, m.ndim)))
        return jnp.where(s == 1, i, (1 - s) * m + s * i)

    return Factor(
        mix(square, one.square),
        None if border is None or one.border is None else mix(border, one.border),
    )


def largest(factor: Factor) -> Array:
    """The largest magnitude in each matrix, shape (...)."""
    square, border = factor
    most = jnp.max(jnp.abs(square), axis=(-2, -1), initial=0)
    if border is not None:
        most = jnp.maximum(most, jnp.max(jnp.abs(border), axis=-1))
    return most


def choose(condition: Array, yes: Factor, no: Factor) -> Factor:
    """One of two factors, matrix by matrix; ``condition`` has shape (...)."""

    def pick(a: Array, b: Array) -> Array:
        shaped = jnp.expand_dims(condition, tuple(range(condition.ndim, a.ndim)))
        return jnp.where(shaped, a, b)

    return jax.tree.map(pick, yes, no)


# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------


def layer_shape(kernel: Any, axes: MatrixAxes) -> tuple[tuple[int, ...], int, int]:
    """``(batch shape, inputs, outputs)`` of a kernel."""
    batch, inputs, outputs = (tuple(kernel.shape[a] for a in group) for group in axes)
    return batch, math.prod(inputs), math.prod(outputs)


def _order(axes: MatrixAxes) -> tuple[int, ...]:
    return (*axes.batch, *axes.inputs, *axes.outputs)


def as_matrix(kernel: Array, axes: MatrixAxes) -> Array:
    """A kernel as (*batch, inputs, outputs)."""
    batch, inputs, outputs = layer_shape(kernel, axes)
    order = _order(axes)
    if placement.explicit_axes(kernel):
        ends = placement.mergeable(kernel, axes)
        kernel = placement.walk(kernel, ends)
        spec = (*(ends[a] for a in axes.batch), ends[axes.inputs[0]], ends[axes.outputs[0]])
        turned = kernel if order == tuple(range(kernel.ndim)) else jnp.transpose(kernel, order)
        return placement.reshape(turned, (*batch, inputs, outputs), spec)
    turned = kernel if order == tuple(range(kernel.ndim)) else jnp.transpose(kernel, order)
    return turned.reshape(*batch, inputs, outputs)


def from_matrix(matrix: Array, kernel: Array, axes: MatrixAxes) -> Array:
    """The inverse of ``as_matrix``: the shape of ``kernel``, and its place."""
    order = _order(axes)
    shape = [kernel.shape[a] for a in order]
    if placement.explicit_axes(kernel):
        ends = placement.mergeable(kernel, axes)
        spec = (*(ends[a] for a in axes.batch), ends[axes.inputs[0]], ends[axes.outputs[0]])
        matrix = placement.walk(matrix, spec)
        split = placement.reshape(matrix, shape, tuple(ends[a] for a in order))
    else:
        split = matrix.reshape(shape)
    if order != tuple(range(kernel.ndim)):
        split = jnp.transpose(split, [order.index(a) for a in range(kernel.ndim)])
    return placement.place_like(split, kernel)


def bias_like(x: Array, bias: Array) -> Array:
    """A bias (*batch, outputs), whole on every device, in the shape and place of ``bias``."""
    return placement.place_like(x.reshape(bias.shape), bias)


def two_sided(
    left: Factor, right: Factor, matrix: Array, bias: Array | None
) -> tuple[Array, Array | None]:
    """``left [matrix; bias] right`` for symmetric factors.

    Args:
      left: of the inputs, with a border where there is a bias.
      right: of the outputs, without border.
      matrix: (..., inputs, outputs).
      bias: (..., outputs), or None.

    Both products contract the rows that a device holds; sums travel once between the two products
    and once after them.
    """
    inputs, outputs = _dividing(matrix, matrix.shape[-2]), _dividing(matrix, matrix.shape[-1])
    back = placement.spec_of(matrix)[-2:] if placement.explicit_axes(matrix) else ((), ())
    middle = _product(_lay(matrix, matrix, ((), outputs)), right.square, matrix, (inputs, ()))
    # The factor is symmetric: its rows are its columns.
    new = _product(left.square, middle, matrix, back, transposed=True)
    if bias is None or left.border is None:
        return new, None
    row, corner = left.border[..., :-1], left.border[..., -1:]
    beside = _product(_lay(bias[..., None, :], bias, ((), outputs)), right.square, matrix, ((), ()))
    new = new + _lay(row[..., None] * beside, matrix, back)
    laid = _lay(row[..., None], matrix, (inputs, ()))
    below = whole(jnp.sum(laid * middle, axis=-2), matrix)
    return new, below + corner * beside[..., 0, :]


def _product(
    left: Array,
    right: Array,
    like: Array,
    place: tuple[tuple[str, ...], ...],
    *,
    transposed: bool = False,
) -> Array:
    """A batched product, left as it is or transposed, laid on the mesh of ``like``."""
    mesh, _, explicit = _mesh_of(like)
    lead = tuple(range(left.ndim - 2))
    spec = (*(() for _ in lead), *place)
    contract = left.ndim - 2 if transposed else left.ndim - 1
    sharding = NamedSharding(mesh, placement.sharding(mesh, spec).spec) if explicit else None
    out = lax.dot_general(
        left,
        right,
        (((contract,), (right.ndim - 2,)), (lead, lead)),
        precision=HIGHEST,
        out_sharding=sharding,
    )
    return out if explicit else _lay(out, like, place)


def is_finite(factor: Factor) -> Array:
    """Whether each matrix is finite, shape (...)."""
    return jnp.isfinite(largest(factor))
