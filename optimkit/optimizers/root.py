"""ROOT: Muon with clipped momentum, and with Newton-Schulz coefficients by matrix size."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import optax

from optimkit.layout import MatrixAxesOverride, matrix_shape, named_leaves
from optimkit.matrices.coefficients import ROOT_COEFFS, CoeffTable, coefficients_by_size
from optimkit.matrices.engine import leaf_axes
from optimkit.matrices.newton_schulz import KELLER, NsCoeffs
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import (
    GradientTransformation,
    LeafSelector,
    Mask,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.matrix_shape import SCALINGS, scale_by_matrix_shape
from optimkit.transforms.momentum import ema_momentum
from optimkit.transforms.orthogonalize import orthogonalize_updates
from optimkit.transforms.suppress_outliers import suppress_outliers
from optimkit.wrappers.by_kind import matrix_recipe


def root(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.95,
    nesterov: bool = True,
    weight_decay: Any = 0.1,
    mask: Mask = None,
    *,
    quantile: Any = 0.9,
    threshold: Any = None,
    ns_steps: int = 5,
    coeff_table: CoeffTable = ROOT_COEFFS,
    fallback_coeffs: NsCoeffs = KELLER,
    eps: Any = 1e-7,
    scaling: Literal["keller", "moonlight", "spectral", "none"] = "moonlight",
    momentum_form: Literal["ema", "sum"] = "sum",
    ns_dtype: Any = None,
    mu_dtype: Any = None,
    matrix_leaves: LeafSelector = None,
    matrix_axes: MatrixAxesOverride = None,
    axis_names: Sequence[str] | None = None,
    adam_learning_rate: ScalarOrSchedule = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.95,
    adam_eps: Any = 1e-8,
    adam_eps_form: Literal["standard", "before_bias_correction"] = "before_bias_correction",
) -> GradientTransformation:
    r"""Muon on momentum whose largest entries are cut back; AdamW for the rest.

    .. math::

        m_t &= b\, m_{t-1} + G_t, \qquad u_t = b\, m_t + G_t, \qquad
        e = \operatorname{quantile}_q(|u_t|) + 10^{-9} \\
        W_t &= W_{t-1} - \eta\,(s \operatorname{NS}(\operatorname{clip}(u_t, -e, e))
        + \lambda W_{t-1})

    NS brings singular values close to one (``newton_schulz``), with a triple that was found for
    the size of the matrix. The factor s is :math:`0.2\sqrt{\max(r, c)}`, or another of
    ``scale_by_matrix_shape``. The momentum that is kept is not clipped.

    Args:
      learning_rate: step size, or a schedule over the 0-based count; 1e-3 is the authors'.
      momentum: b, in [0, 1).
      nesterov: as above, as in the authors' code; otherwise :math:`u_t = m_t`, as in the paper.
      weight_decay: decoupled decay, times the rate but not the factor s.
      mask: which leaves are decayed (True = decayed); default all.
      quantile: q, in [0, 1], of each matrix. A tenth of the entries is clipped at 0.9, always. 1
        clips nothing.
      threshold: a fixed e instead, >= 0, as in the paper.
      ns_steps: Newton-Schulz steps, >= 1.
      coeff_table: ``{(smaller side, larger side): (a, b, c)}``, or a triple a step; keys may be
        text, ``"64x256"``. ``optimkit.matrices.fit_ns_coefficients`` finds a triple. The default
        has what the authors published: 2048 x 2048, 3072, 8192 and 16384.
      fallback_coeffs: for all other sizes, see ``orthogonalize_updates``.
      eps: added to the norm that NS divides by, >= 0.
      scaling: the factor s.
      momentum_form: ``"sum"`` as above, or ``"ema"``, with a factor 1 - b on both gradients.
      ns_dtype: dtype of NS's products. None: f32, or f64 for f64 parameters.
      mu_dtype: dtype of the momentum; default f32.
      matrix_leaves: which leaves are matrices: a tree of bools, ``(path, leaf) -> bool``, or path
        patterns. Default: rank two or more, no embedding and no output head, by path.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``. Each matrix of a stack has its
        own quantile.
      axis_names: mesh axes among whose devices the matrices are divided; default all.
      adam_learning_rate: rate of the other leaves, or a schedule; None: ``learning_rate``.
      adam_b1: decay of Adam's first moment, in [0, 1).
      adam_b2: decay of Adam's second moment, in [0, 1).
      adam_eps: added to Adam's root, >= 0.
      adam_eps_form: ``"before_bias_correction"`` as the authors have it, or ``"standard"``.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter of a matrix, 8 of another
      leaf (AdamW: 8). On a mesh every device orthogonalises its share of the matrices.

    Raises:
      ValueError: if an argument is out of range, coefficients do not fit the steps, a gradient has
        another shape, a leaf's layout is ambiguous, or ``matrix_leaves`` chooses a vector.

    Warns:
      UserWarning: from ``init``, if a matrix is not in the default table. With a table of your own,
        an empty one included, the fallback is silent.

    On the four published sizes the table has 0.84, 0.58, 0.06 and 0.12 of the error that Muon's
    triple leaves on a random matrix (the mean of :math:`(s^2 - 1)^2` over its singular values).

    >>> import jax.numpy as jnp
    >>> tx = root(0.1, weight_decay=0.0, coeff_table={"2x2": "dion"})
    >>> params = {"kernel": jnp.zeros((2, 2))}
    >>> grads = {"kernel": jnp.array([[0.0, 5.0], [-2.0, 0.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)  # 0.1 * 0.2 * sqrt(2)
    >>> round(float(updates["kernel"][0, 1]), 2), round(float(updates["kernel"][1, 0]), 2)
    (-0.03, 0.03)

    Reference: He et al., "ROOT: Robust Orthogonalized Optimizer for Neural Network Training", 2025,
    arXiv 2511.20626. Agrees with the authors' code (goldens ``root__*``).
    """
    check_range(momentum=momentum, ge=0, lt=1)
    check_choice(SCALINGS, scaling=scaling)
    direction = optax.chain(
        ema_momentum(momentum, nesterov=nesterov, form=momentum_form, mu_dtype=mu_dtype),
        suppress_outliers(quantile, threshold, matrix_axes=matrix_axes),
        orthogonalize_updates(
            ns_steps,
            coefficients_by_size(coeff_table, fallback_coeffs, ns_steps),
            eps,
            ns_dtype,
            matrix_axes=matrix_axes,
            axis_names=axis_names,
        ),
        scale_by_matrix_shape(scaling, matrix_axes=matrix_axes),
        *([_warn_of_other_sizes(matrix_axes)] if coeff_table is ROOT_COEFFS else []),
    )
    return matrix_recipe(
        direction,
        learning_rate,
        weight_decay,
        mask,
        matrix_leaves=matrix_leaves,
        matrix_axes=matrix_axes,
        adam_learning_rate=adam_learning_rate,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps=adam_eps,
        adam_weight_decay=None,
        adam_eps_form=adam_eps_form,
    )


def _warn_of_other_sizes(matrix_axes: MatrixAxesOverride) -> GradientTransformation:
    """Changes nothing; ``init`` warns of matrices that the published table does not have."""

    def init(params: PyTree) -> optax.EmptyState:
        missing = {}
        for (name, leaf), axes in zip(
            named_leaves(params), leaf_axes(params, matrix_axes), strict=True
        ):
            if axes is not None and leaf.size:
                size = tuple(sorted(matrix_shape(leaf.shape, axes)[1:]))
                if size not in ROOT_COEFFS:
                    missing.setdefault("x".join(map(str, size)), name)
        if missing:
            listed = ", ".join(f"{size} ({name!r})" for size, name in missing.items())
            warnings.warn(
                f"root: no coefficients were published for matrices of {listed}; these take "
                "fallback_coeffs. optimkit.matrices.fit_ns_coefficients finds some for coeff_table",
                stacklevel=2,
            )
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra
        return updates, state

    return transformation(init, update)


RECORD = Method(
    factory=root,
    kind="recipe",
    summary="Muon with clipped momentum and coefficients by matrix size",
    example={"learning_rate": 0.02, "coeff_table": {"3x4": (2.9794, -3.6674, 1.6207)}},
    traced=(
        "learning_rate",
        "momentum",
        "weight_decay",
        "quantile",
        "threshold",
        "eps",
        "adam_learning_rate",
        "adam_b1",
        "adam_b2",
        "adam_eps",
    ),
    static=(
        "nesterov",
        "mask",
        "ns_steps",
        "coeff_table",
        "fallback_coeffs",
        "scaling",
        "momentum_form",
        "ns_dtype",
        "mu_dtype",
        "matrix_leaves",
        "matrix_axes",
        "axis_names",
        "adam_eps_form",
    ),
    needs=("params",),
    position="alone",
    communication="matrix",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    # Five steps multiply rounding by up to 3.44^5 = 485 where singular values are small.
    tolerance={"sharding": 5e-5, "compose": 2e-4},
    paper='He et al., "ROOT: Robust Orthogonalized Optimizer for Neural Network Training", 2025, '
    "arXiv 2511.20626",
    reference="huawei-noah/noah-research@aa0f80c8ce:ROOT/examples/example_train.py:ROOT",
    licence="MIT",
)
