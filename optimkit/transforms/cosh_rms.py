"""AuON's scale: a matrix over its norm, and over the root mean square of its cosh."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import optax

from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import check_match, map_leaves
from optimkit.matrices.engine import axes_tree
from optimkit.numerics import check_range, in_turn, safe_div, safe_norm, turn_after
from optimkit.protocols import (
    Array,
    GradientTransformation,
    MatrixAxes,
    Method,
    PyTree,
    transformation,
)


def scale_by_cosh_rms(
    gamma: Any = 1.0,
    normalize: bool = True,
    norm_eps: Any = 1e-7,
    eps: Any = 1e-8,
    *,
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""Divides every matrix by its norm, and by a number that grows when few entries carry it.

    .. math::

        x = \frac{u}{\|u\|_F + \epsilon_n}, \qquad
        r = \sqrt{\tfrac{1}{N} \textstyle\sum_i \cosh^2(\gamma x_i)}, \qquad
        u \leftarrow \frac{x}{r + \epsilon} \quad\text{or}\quad \frac{u}{r + \epsilon}

    Every matrix is scaled as a whole: the ratios between its entries stay.

    Args:
      gamma: factor inside cosh, >= 0; 1 is the paper's, 1.5 the authors' package's. 0 makes r one.
      normalize: divide by the norm (the paper), or by r alone (the package).
      norm_eps: added to the norm, >= 0.
      eps: added to r, >= 0.
      matrix_axes: which axes are batches of matrices, where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.

    Returns:
      A transformation without state, for any leaf: a vector or scalar counts as one matrix, and
      each layer of a stack on its own. Inside ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, the layout of a leaf is ambiguous, or a gradient
        has another shape.

    r lies between 1 and cosh(gamma). It is about :math:`\sqrt{1 + \gamma^2/N}`, hence one, unless a
    handful of entries carry nearly all of the norm: then, and only then, it brakes. A zero matrix
    stays zero; a non-finite entry makes its matrix NaN or zero.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_cosh_rms()
    >>> updates, _ = tx.update({"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}, tx.init(None))
    >>> [round(float(x), 3) for x in jnp.diag(updates["kernel"])]  # r = 1.140
    [0.527, 0.702]

    Reference: Maity, "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", 2025, arXiv
    2509.24320.
    """
    check_range(gamma=gamma, norm_eps=norm_eps, eps=eps, ge=0)

    def init(params: PyTree) -> optax.EmptyState:
        axes_tree(params, matrix_axes)  # an ambiguous layout shows before training starts
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")

        turn: Array | None = None

        def step(u: Array, axes: MatrixAxes | None) -> Array:
            nonlocal turn
            if u.size == 0:
                return u
            u = in_turn(u, turn)
            over = (*axes.inputs, *axes.outputs) if axes else tuple(range(u.ndim))
            number = math.prod(u.shape[axis] for axis in over)
            one = jnp.ones((), u.dtype)
            inverse = safe_div(one, safe_norm(u, over, keepdims=True) + norm_eps)
            # (exp(2y) + exp(-2y)) / 4 + 1/2 is cosh(y)^2.
            power = jnp.exp(2 * gamma * inverse * u)
            total = jnp.sum(power + 1 / power, axis=over, keepdims=True)
            root = jnp.sqrt(total / (4 * number) + 0.5)
            done = u * ((inverse if normalize else one) / (root + eps))
            turn = turn_after(done, turn)
            return done

        return map_leaves(step, updates, reads=(axes_tree(updates, matrix_axes),)), state

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_cosh_rms,
    kind="piece",
    summary="a matrix over its norm and the root mean square of its cosh",
    traced=("gamma", "norm_eps", "eps"),
    static=("normalize", "matrix_axes"),
    position="middle",
    communication="reduce",
    response="bounded",
    state_bytes=0,
    moved_bytes=12,
    paper='Maity, "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", 2025, arXiv '
    "2509.24320",
    reference="ryyzn9/AuON@bba2e82200:auon/optimizer.py:AuON",
    licence="Apache-2.0",
)
