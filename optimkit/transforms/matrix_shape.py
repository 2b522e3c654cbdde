"""Scales updates by the shape of their matrices, so that one rate fits all sizes."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
import optax

from optimkit import layout
from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import check_match, check_real
from optimkit.matrices.engine import leaf_axes
from optimkit.matrices.parts import SplitOutputs, check_split, cut_outputs
from optimkit.numerics import check_choice, compute_dtype, narrow
from optimkit.protocols import GradientTransformation, MatrixAxes, Method, PyTree, transformation

SCALINGS = ("keller", "moonlight", "spectral", "none")


def matrix_scale(scaling: str, shape: tuple[int, ...], axes: MatrixAxes) -> float:
    """The factor for the matrices of a leaf of this shape.

    >>> matrix_scale("keller", (2, 8), MatrixAxes((), (0,), (1,)))
    2.0
    """
    _, cols, rows = layout.matrix_shape(shape, axes)
    if scaling == "keller" and not axes.batch and len(axes.inputs) == 3 and len(shape) == 4:
        # The authors take the last two axes of (out, in, h, w): 1 for a square window.
        rows, cols = shape[axes.inputs[0]], shape[axes.inputs[1]]
    if scaling == "none" or rows == 0 or cols == 0:
        return 1.0
    if scaling == "moonlight":
        return 0.2 * math.sqrt(max(rows, cols))
    ratio = rows / cols
    return math.sqrt(ratio if scaling == "spectral" else max(1.0, ratio))


def scale_by_matrix_shape(
    scaling: Literal["keller", "moonlight", "spectral", "none"] = "keller",
    *,
    matrix_axes: MatrixAxesOverride = None,
    split_outputs: SplitOutputs = None,
) -> GradientTransformation:
    r"""Multiplies every matrix by a factor of its outputs (rows) and inputs (columns).

    .. math::

        \text{keller: } \sqrt{\max(1, r/c)} \qquad \text{moonlight: } 0.2\sqrt{\max(r, c)} \qquad
        \text{spectral: } \sqrt{r/c}

    After an orthogonalisation, moonlight gives the step of every matrix the root mean square 0.2,
    about that of an AdamW step; spectral bounds what it changes in the layer's output.

    Args:
      scaling: the rule, or ``"none"``. ``"keller"`` takes height over width of the window for a
        convolution of rank 4, as the authors' code does; the others take outputs over window times
        inputs.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.
      split_outputs: ``{pattern: sizes}`` for kernels that are several matrices side by side, each
        with its own factor.

    Returns:
      A transformation without state; the factors are constants. Vectors and scalars pass as they
      are, and each layer of a stack counts on its own.

    Raises:
      ValueError: for an unknown rule, an ambiguous layout, or sizes that do not add up.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_matrix_shape("spectral")
    >>> updates, _ = tx.update({"kernel": jnp.ones((8, 2))}, tx.init(None))  # 8 inputs, 2 outputs
    >>> float(updates["kernel"][0, 0])
    0.5

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024;
    Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982; microsoft/dion
    (spectral).
    """
    check_choice(SCALINGS, scaling=scaling)

    def init(params: PyTree) -> optax.EmptyState:
        check_split(params, leaf_axes(params, matrix_axes), split_outputs)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        leaves, seen, join = cut_outputs(updates, leaf_axes(updates, matrix_axes), split_outputs)
        for index, axes in enumerate(seen):
            if axes is not None:
                leaf = leaves[index]
                wide = jnp.asarray(leaf, compute_dtype(leaf))
                factor = matrix_scale(scaling, wide.shape, axes)
                leaves[index] = narrow(factor * wide, jnp.result_type(leaf))
        return join(leaves), state

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_matrix_shape,
    kind="piece",
    summary="factor of the outputs and inputs of every matrix",
    static=("scaling", "matrix_axes", "split_outputs"),
    position="middle",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982',
    reference="KellerJordan/Muon@857d1adc15:muon.py:muon_update; "
    "MoonshotAI/Moonlight@c2ad5b20c6:examples/toy_train.py:Muon",
    licence="MIT",
)
