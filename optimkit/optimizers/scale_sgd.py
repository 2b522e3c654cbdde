"""SCALE: gradients with normalised columns, and momentum for the output layer alone."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

from optimkit import layout
from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import (
    GradientTransformation,
    LeafSelector,
    Mask,
    Method,
    PyTree,
    ScalarOrSchedule,
)
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.last_layer_momentum import last_layer_tree
from optimkit.transforms.momentum import ema_momentum
from optimkit.transforms.normalize_columns import normalize_columns
from optimkit.wrappers.by_kind import by_kind, matrix_tree


def scale_sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.9,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    last_layer: LeafSelector = "head",
    vector_learning_rate: ScalarOrSchedule = None,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    norm: Literal["rms", "l2"] = "rms",
    norm_eps: Any = 1e-8,
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""SGD whose gradient columns are brought to norm one; momentum for the output layer alone.

    .. math::

        u_t &= m_t = b\, m_{t-1} + (1-b)\, G_t \text{ in the output layer, else } G_t \\
        W_t &= W_{t-1} - \eta\left(\frac{u_{:,j}}{\max(r_j, \epsilon)} + \lambda W_{t-1}\right),
        \qquad r_j = \sqrt{\tfrac{1}{n}\textstyle\sum_i u_{ij}^2}

    A column is all inputs of one output unit. Vectors and scalars take AdamW.

    Args:
      learning_rate: step size of matrices, or a schedule over the 0-based count. It has to fall,
        for the step does not shrink with the gradient. The authors take 1e-3 to 350M parameters.
      momentum: b, in [0, 1).
      weight_decay: decoupled decay of all leaves, times the rate of each.
      mask: which leaves are decayed (True = decayed); default all.
      last_layer: which matrices have momentum: a word such as ``"head"``, which matches a component
        of a path or its end after an underscore (``lm_head``); a list of paths or patterns;
        ``(path, leaf) -> bool``; or a tree of bools. None, and ``"head"`` in a tree without one,
        choose nothing. Vectors that it chooses take AdamW like the others.
      vector_learning_rate: rate of vectors, or a schedule; None: ``learning_rate``. The authors
        take 2e-2 with 1e-3 above, and let it follow the same schedule.
      b1: decay of Adam's first moment, in [0, 1).
      b2: decay of Adam's second moment, in [0, 1).
      eps: added to Adam's root before bias correction, >= 0.
      norm: ``"rms"`` is the authors' code, to which their rates belong; ``"l2"`` the paper's
        formula, smaller by :math:`\sqrt n`.
      norm_eps: floor of the norm, >= 0. It is not added.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.

    Returns:
      An optimizer that needs ``params``; a f32 parameter of the output layer has 4 bytes of state,
      one of another matrix none, of a vector 8 (AdamW: 8 everywhere).

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, a leaf's layout is
        ambiguous, or ``last_layer`` names what is not there.

    An embedding table has one norm a feature, over the vocabulary, as in the authors' code. Where
    it is also the output layer (tied), paper and code do not say what to do; one norm a token, and
    momentum, is ``last_layer=["embed/*"], matrix_axes={"embed/*": MatrixAxes((), (1,), (0,))}``.
    In the authors' table SCALE is behind Adam at 60M parameters (perplexity 30.81 against 30.05)
    and ahead from 130M on. Clipping and loss scales do nothing here.

    >>> import jax.numpy as jnp
    >>> tx = scale_sgd(0.1)
    >>> params = {"dense": {"kernel": jnp.zeros((2, 2))}, "bias": jnp.zeros(1)}
    >>> grads = {"dense": {"kernel": jnp.array([[3.0, 3.0], [-3.0, 4.0]])}, "bias": jnp.ones(1)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> [[round(float(u), 3) for u in row] for row in updates["dense"]["kernel"]]
    [[-0.1, -0.085], [0.1, -0.113]]

    Reference: Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", 2025,
    arXiv 2506.16659. Agrees with the authors' code (goldens ``scale_sgd__*``).
    """
    check_range(learning_rate=learning_rate, vector_learning_rate=vector_learning_rate, ge=0)
    check_range(momentum=momentum, b1=b1, b2=b2, ge=0, lt=1)
    check_range(weight_decay=weight_decay, eps=eps, norm_eps=norm_eps, ge=0)

    def is_matrix(name: str, leaf: Any) -> bool:
        return layout.matrix_axes(name, leaf, matrix_axes) is not None

    def has_momentum(tree: PyTree) -> PyTree:
        matrices = matrix_tree(tree, is_matrix, matrix_axes)
        chosen = last_layer_tree(tree, last_layer)
        return jax.tree.map(lambda use, matrix: use and matrix, chosen, matrices)

    def split(
        matrix: optax.GradientTransformation, vector: optax.GradientTransformation
    ) -> GradientTransformation:
        return by_kind(matrix, vector, is_matrix, matrix_axes=matrix_axes)

    rate = optax.scale_by_learning_rate(learning_rate)
    if vector_learning_rate is not None:
        rate = split(rate, optax.scale_by_learning_rate(vector_learning_rate))
    return recipe(
        optax.masked(ema_momentum(momentum), has_momentum),
        split(
            normalize_columns(norm=norm, eps=norm_eps, matrix_axes=matrix_axes),
            scale_by_adam(b1, b2, eps, eps_form="before_bias_correction"),
        ),
        decayed_weights(weight_decay, mask),
        rate,
    )


RECORD = Method(
    factory=scale_sgd,
    kind="recipe",
    summary="SGD with normalised columns, and momentum for the output layer",
    example={"learning_rate": 1e-3, "weight_decay": 0.1},
    traced=(
        "learning_rate",
        "momentum",
        "weight_decay",
        "vector_learning_rate",
        "b1",
        "b2",
        "eps",
        "norm_eps",
    ),
    static=("mask", "last_layer", "norm", "matrix_axes"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=0,
    moved_bytes=12,
    paper='Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", 2025, '
    "arXiv 2506.16659",
    reference="OptimAI-Lab/Minimalist_LLM_Pretraining@f5bd4e754eb9:"
    "mem_eff_pt/pt_scale/scale_optimizer.py:SCALE",
    licence="",
)
