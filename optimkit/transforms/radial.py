"""Radial components: what of an update points along the weight itself.

Pure functions of arrays, shared by AdamP, SGDP and perpGrad. ``inputs`` are the axes summed over
for one output channel, ``outputs`` the axes that number the channels of one matrix; any other axis
is batch, and is tested on its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.numerics import safe_div, safe_norm, sums_together
from optimkit.protocols import Array, MatrixAxes


def radial_component(x: Array, w: Array, axis: int | tuple[int, ...] | None, eps: Any) -> Array:
    r"""The part of ``x`` along ``w``: :math:`\hat w \langle\hat w, x\rangle`.

    Here :math:`\hat w = w / (\|w\| + \epsilon)`; norm and product are taken over ``axis``. A zero
    ``w`` has no direction: the component is zero, also at ``eps = 0``.
    """
    unit = safe_div(w, safe_norm(w, axis, keepdims=True) + eps)
    return unit * jnp.sum(unit * x, axis=axis, keepdims=True)


class RadialDecision(NamedTuple):
    """What AdamP decides for one leaf; one value a matrix, or a channel.

    ``factor``: the radial part of the update is ``factor * w``; zero where nothing is projected.
    ``ratio``: factor on the weight decay. ``branch``: 0 none, 1 channel view, 2 layer view.
    """

    factor: Array
    ratio: Array
    branch: Array


def radial_decision(
    g: Array,
    w: Array,
    u: Array,
    *,
    delta: Any,
    eps: Any,
    wd_ratio: Any,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> RadialDecision:
    r"""Whether a weight is scale invariant, and how much of ``u`` then points along it.

    For the channel view (rows = output channels), then for the layer view (the matrix as one row),
    the first hit wins: with n entries a row, if :math:`\max_r |\cos(g_r, w_r)| < \delta/\sqrt n`,
    then :math:`\hat w_r\langle\hat w_r, u_r\rangle` is the radial part. One row above the
    threshold defeats the channel view of its whole matrix.

    Args:
      g: raw gradient, which alone decides.
      w: weight, same shape.
      u: update to project, same shape.
      delta: threshold on the cosine, times sqrt of the row length.
      eps: clamps each norm in the cosine, and is added to the norm in the unit weight.
      wd_ratio: factor on the weight decay of projected matrices.
      inputs: axes summed over for one output channel.
      outputs: axes that number the output channels.
    """

    def matrix(x: Array) -> Array:
        return jnp.sum(x, axis=outputs, keepdims=True)

    # Four sums over rows serve both views: the sums over a matrix are sums of them. Those of a huge
    # gradient may overflow; the cosine is then 0 or NaN, and either way a decision.
    per_row = sums_together([g * w, jnp.square(g), jnp.square(w), w * u], inputs)
    per_matrix = [matrix(x) for x in per_row]
    row_length = max(1, w.size // max(1, per_row[0].size))
    matrix_length = max(1, w.size // max(1, per_matrix[0].size))

    def cosine(sums: list[Array]) -> Array:
        gw, gg, ww, _ = sums
        return jnp.abs(gw) / (jnp.maximum(jnp.sqrt(gg), eps) * jnp.maximum(jnp.sqrt(ww), eps))

    def radial_factor(sums: list[Array]) -> Array:
        _, _, ww, wu = sums
        return safe_div(wu, jnp.square(jnp.sqrt(ww) + eps))

    worst = jnp.max(cosine(per_row), axis=outputs, keepdims=True, initial=0)
    by_channel = worst < delta / jnp.sqrt(row_length)
    by_layer = cosine(per_matrix) < delta / jnp.sqrt(matrix_length)
    layer_factor = jnp.where(by_layer, radial_factor(per_matrix), 0)
    return RadialDecision(
        factor=jnp.where(by_channel, radial_factor(per_row), layer_factor),
        ratio=jnp.where(by_channel | by_layer, wd_ratio, 1),
        branch=jnp.where(by_channel, 1, jnp.where(by_layer, 2, 0)),
    )


def leaf_decision(
    g: Array, w: Array, u: Array, axes: MatrixAxes | None, **settings: Any
) -> RadialDecision:
    """``radial_decision`` for a leaf seen by ``axes``; without them it is never projected."""
    if axes is None:
        return RadialDecision(jnp.zeros((), u.dtype), jnp.ones((), u.dtype), jnp.zeros((), int))
    return radial_decision(g, w, u, inputs=axes.inputs, outputs=axes.outputs, **settings)


class RadialProjection(NamedTuple):
    """``update``: the projected update; ``ratio`` and ``branch`` as in ``RadialDecision``."""

    update: Array
    ratio: Array
    branch: Array


def project_radial_leaf(g: Array, w: Array, u: Array, **settings: Any) -> RadialProjection:
    """AdamP's projection of one leaf: ``u`` without its radial part where ``g`` is tangential.

    Takes the arguments of ``radial_decision``.
    """
    decision = radial_decision(g, w, u, **settings)
    return RadialProjection(u - decision.factor * w, decision.ratio, decision.branch)
