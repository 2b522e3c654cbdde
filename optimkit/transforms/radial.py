"""Radial components: what of an update points along the weight itself.

Pure functions of arrays, shared by AdamP, SGDP and perpGrad. ``inputs`` are the axes summed over
for one output channel, ``outputs`` the axes that number the channels of one matrix; any other axis
is batch, and is tested on its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.numerics import safe_div, safe_norm, saturate
from optimkit.protocols import Array


def radial_component(x: Array, w: Array, axis: int | tuple[int, ...] | None, eps: Any) -> Array:
    r"""The part of ``x`` along ``w``: :math:`\hat w \langle\hat w, x\rangle` with
    :math:`\hat w = w / (\|w\| + \epsilon)`, the norm and product taken over ``axis``.

    A zero ``w`` has no direction: the component is zero, also at ``eps = 0``.
    """
    unit = safe_div(w, safe_norm(w, axis, keepdims=True) + eps)
    return unit * jnp.sum(unit * x, axis=axis, keepdims=True)


class RadialDecision(NamedTuple):
    """``update``: the projected update. ``ratio``: factor on the weight decay. ``branch``: 0, 1, 2.

    ``ratio`` and ``branch`` have size one along the inputs and outputs: one value a matrix. Branch
    1 is the channel view, 2 the layer view, 0 no projection.
    """

    update: Array
    ratio: Array
    branch: Array


def project_radial_leaf(
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
    r"""AdamP's projection of one leaf: the radial part of ``u`` goes where ``g`` is tangential.

    For the channel view (rows = output channels), then for the layer view (the matrix as one row),
    the first hit wins: with n entries a row, if :math:`\max_r |\cos(g_r, w_r)| < \delta/\sqrt n`,
    then :math:`u_r \leftarrow u_r - \hat w_r\langle\hat w_r, u_r\rangle`. One row above the
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

    def rows(x: Array) -> Array:
        return jnp.sum(x, axis=inputs, keepdims=True)

    def matrix(x: Array) -> Array:
        return jnp.sum(x, axis=outputs, keepdims=True)

    # Four sums over rows serve both views: the sums over a matrix are sums of them.
    g = saturate(g)
    per_row = [rows(g * w), rows(jnp.square(g)), rows(jnp.square(w)), rows(w * u)]
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
    factor = jnp.where(
        by_channel,
        radial_factor(per_row),
        jnp.where(by_layer, radial_factor(per_matrix), 0),
    )
    ratio = jnp.where(by_channel | by_layer, wd_ratio, 1)
    branch = jnp.where(by_channel, 1, jnp.where(by_layer, 2, 0))
    return RadialDecision(u - factor * w, ratio, branch)
