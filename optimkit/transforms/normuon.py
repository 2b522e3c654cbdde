"""NorMuon's link after Newton-Schulz: output channels of a matrix get steps of equal size."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import check_match, check_real
from optimkit.matrices.engine import leaf_axes
from optimkit.matrices.parts import SplitOutputs, check_split, cut_outputs
from optimkit.numerics import check_range, compute_dtype, narrow, safe_norm, saturate
from optimkit.protocols import (
    Array,
    GradientTransformation,
    MatrixAxes,
    Method,
    PyTree,
    transformation,
)


class ScaleByNormuonState(NamedTuple):
    """``output_nu``: second moment per output channel: the parameter's shape, inputs of size 1."""

    output_nu: PyTree


def scale_by_normuon(
    b2: Any = 0.95,
    eps: Any = 1e-10,
    *,
    matrix_axes: MatrixAxesOverride = None,
    split_outputs: SplitOutputs = None,
) -> GradientTransformation:
    r"""Divides each output channel by the root of its running mean square; keeps the matrix norm.

    .. math::

        v_t &= b_2 v_{t-1} + (1-b_2)\, \operatorname{mean}_{in} X^2, \qquad
        Y = X / (\sqrt{v_t} + \epsilon) \\
        X &\leftarrow Y\, \|X\|_F / (\|Y\|_F + \epsilon)

    The mean starts at zero and is not corrected: the second line removes a common factor.

    Args:
      b2: decay of the mean, in [0, 1).
      eps: guards both quotients, > 0.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.
      split_outputs: ``{pattern: sizes}`` for kernels that are several matrices side by side, each
        of which keeps its own norm.

    Returns:
      A transformation for the place between ``orthogonalize_updates`` and
      ``scale_by_matrix_shape``. It keeps 4 bytes an output channel; each layer of a stack counts on
      its own. Vectors and scalars pass as they are, with an unused scalar of state. Inside
      ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, a layout is
        ambiguous, or sizes do not add up.

    For a convolution the authors' code takes mean and norm over the last window axes only; this
    takes all inputs of a channel, and the whole matrix. The rule is written from their code; no
    recorded run of it is at hand.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_normuon()
    >>> x = {"kernel": jnp.array([[3.0, 0.0], [0.0, -4.0]])}
    >>> updates, _ = tx.update(x, tx.init(x))
    >>> [round(float(u), 3) for u in jnp.diag(updates["kernel"])]  # equal, and of norm 5
    [3.536, -3.536]

    Reference: Li et al., "NorMuon: Making Muon more efficient and scalable", 2025,
    arXiv 2510.05491.
    """
    check_range(b2=b2, ge=0, lt=1)
    check_range(eps=eps, gt=0)

    def init(params: PyTree) -> ScaleByNormuonState:
        structure = jax.tree.structure(params)
        leaves, axes = jax.tree.leaves(params), leaf_axes(params, matrix_axes)
        check_split(params, axes, split_outputs)
        return ScaleByNormuonState(structure.unflatten(map(_zeros, leaves, axes)))

    def update(
        updates: PyTree,
        state: ScaleByNormuonState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByNormuonState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        axes = leaf_axes(updates, matrix_axes)
        expected = jax.eval_shape(init, updates).output_nu
        check_match(state.output_nu, expected, what="state", like="the gradient's")
        moments, _, join_moments = cut_outputs(state.output_nu, axes, split_outputs)
        leaves, axes, join = cut_outputs(updates, axes, split_outputs)
        for index, seen_as in enumerate(axes):
            if seen_as is not None and jnp.size(leaves[index]):
                leaves[index], moments[index] = step(leaves[index], moments[index], seen_as)
        return join(leaves), ScaleByNormuonState(join_moments(moments))

    def step(leaf: Array, nu: Array, axes: MatrixAxes) -> tuple[Array, Array]:
        x = saturate(jnp.asarray(leaf, compute_dtype(leaf)))
        nu = b2 * nu + (1 - b2) * jnp.mean(jnp.square(x), axis=axes.inputs, keepdims=True)
        y = x / (jnp.sqrt(nu) + eps)
        matrix = (*axes.inputs, *axes.outputs)
        norm, scaled = (safe_norm(z, matrix, keepdims=True) for z in (x, y))
        y = y * (norm / (scaled + eps))
        return narrow(y, jnp.result_type(leaf)), nu.astype(compute_dtype(leaf))

    return transformation(init, update)


def _zeros(param: Array, axes: MatrixAxes | None) -> Array:
    if axes is None:
        return jnp.zeros((), compute_dtype(param))
    # Summed, not made from a shape: the channels lie on the devices where the parameter's do.
    zeros = jnp.zeros_like(param, dtype=compute_dtype(param))
    return jnp.sum(zeros, axis=axes.inputs, keepdims=True)


RECORD = Method(
    factory=scale_by_normuon,
    kind="piece",
    exempt={"fidelity": "no trajectory of the authors' code has been recorded"},
    summary="equal steps for the output channels of a matrix",
    traced=("b2", "eps"),
    static=("matrix_axes", "split_outputs"),
    position="middle",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Li et al., "NorMuon: Making Muon more efficient and scalable", 2025, arXiv 2510.05491',
    reference="zichongli5/NorMuon@d45c9a4280:normuon.py",
    licence="",
    status="provisional",
)
