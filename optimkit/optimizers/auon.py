"""AuON and Hybrid-AuON: momentum scaled by its norm and the cosh of its entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import optax

from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import recipe
from optimkit.matrices.newton_schulz import KELLER, NsCoeffs
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import GradientTransformation, LeafSelector, Mask, Method, ScalarOrSchedule
from optimkit.transforms.cosh_rms import scale_by_cosh_rms
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.matrix_shape import SCALINGS, scale_by_matrix_shape
from optimkit.transforms.momentum import ema_momentum
from optimkit.transforms.orthogonalize import orthogonalize_updates
from optimkit.wrappers.by_kind import matrix_recipe


def auon(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.95,
    nesterov: bool = True,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    gamma: Any = 1.0,
    normalize: bool = True,
    scaling: Literal["keller", "moonlight", "spectral", "none"] = "keller",
    norm_eps: Any = 1e-7,
    eps: Any = 1e-8,
    matrix_leaves: LeafSelector = None,
    matrix_axes: MatrixAxesOverride = None,
    adam_learning_rate: ScalarOrSchedule = None,
    adam_b1: Any = 0.8,
    adam_b2: Any = 0.95,
    adam_eps: Any = 1e-10,
) -> GradientTransformation:
    r"""Steps every matrix along its momentum, by a step of a fixed norm that spikes shorten.

    .. math::

        m_t &= b\, m_{t-1} + (1-b)\, G_t, \qquad u_t = b\, m_t + (1-b)\, G_t \\
        x &= \frac{u_t}{\|u_t\|_F + \epsilon_n}, \qquad
        r = \sqrt{\operatorname{mean}(\cosh^2(\gamma x))} \\
        W_t &= W_{t-1} - \eta\left(s\, \frac{x}{r + \epsilon} + \lambda W_{t-1}\right)

    With R outputs and C inputs the factor s is :math:`\sqrt{\max(1, R/C)}` (keller), or as in
    ``scale_by_matrix_shape``. Nothing is multiplied: the cost is that of a norm.

    Args:
      learning_rate: step size, or a schedule over the 0-based count; 0.24 is the authors' for
        matrices, 0.08 with decay 0.01 for their package's form.
      momentum: b, in [0, 1).
      nesterov: as above; otherwise :math:`u_t = m_t`.
      weight_decay: decoupled decay, times the rate but not the factor s.
      mask: which leaves are decayed (True = decayed); default all.
      gamma: factor inside cosh, >= 0.
      normalize: as above. False: the numerator is :math:`u_t` itself, as in the authors' package,
        so that the step grows with the gradient.
      scaling: the factor s.
      norm_eps: added to the norm, >= 0.
      eps: added to r, >= 0.
      matrix_leaves: which leaves take this step: a tree of bools, ``(path, leaf) -> bool``, or path
        patterns; the rest takes AdamW. Default: with ``adam_learning_rate``, the hidden matrices
        by path; without, every leaf, as in the package.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.
      adam_learning_rate: rate of the other leaves, or a schedule; the authors' is 0.008. None with
        ``matrix_leaves``: ``learning_rate``. None without: no leaf takes AdamW.
      adam_b1: decay of Adam's first moment, in [0, 1).
      adam_b2: decay of Adam's second moment, in [0, 1).
      adam_eps: added to Adam's root, >= 0.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter, 8 where AdamW steps.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, a leaf's layout is
        ambiguous, or ``matrix_leaves`` chooses a vector.

    Directions keep their proportions, so this is no orthogonalisation. r is 1.000 for matrices of
    any size unless a few entries carry nearly all of the norm: in between it is normalised momentum
    SGD. In the authors' table of a 41M model, AuON ends at a loss of 0.43, Muon at 0.04. The
    defaults are the paper's; the authors' current package is ``normalize=False, gamma=1.5,
    scaling="none"``, which depends on the size of the gradient.

    >>> import jax.numpy as jnp
    >>> tx = auon(0.1)
    >>> params = {"kernel": jnp.zeros((2, 2))}
    >>> grads = {"kernel": jnp.array([[0.0, 3.0], [-4.0, 0.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> round(float(updates["kernel"][0, 1]), 4), round(float(updates["kernel"][1, 0]), 4)
    (-0.0527, 0.0702)

    Reference: Maity, "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", 2025, arXiv
    2509.24320. Agrees with the authors' script and package (goldens ``auon__*``).
    """
    check_range(momentum=momentum, ge=0, lt=1)
    check_range(gamma=gamma, norm_eps=norm_eps, eps=eps, ge=0)
    check_choice(SCALINGS, scaling=scaling)
    direction = optax.chain(
        ema_momentum(momentum, nesterov=nesterov),
        scale_by_cosh_rms(gamma, normalize, norm_eps, eps, matrix_axes=matrix_axes),
        scale_by_matrix_shape(scaling, matrix_axes=matrix_axes),
    )
    return _stepped(
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
    )


def hybrid_auon(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.95,
    nesterov: bool = True,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    ns_steps: int = 1,
    gamma: Any = 1.0,
    ns_coeffs: NsCoeffs = KELLER,
    scaling: Literal["keller", "moonlight", "spectral", "none"] = "none",
    norm_eps: Any = 1e-7,
    eps: Any = 1e-8,
    ns_dtype: Any = None,
    matrix_leaves: LeafSelector = None,
    matrix_axes: MatrixAxesOverride = None,
    axis_names: Sequence[str] | None = None,
    adam_learning_rate: ScalarOrSchedule = None,
    adam_b1: Any = 0.8,
    adam_b2: Any = 0.95,
    adam_eps: Any = 1e-10,
) -> GradientTransformation:
    r"""AuON behind a few Newton-Schulz steps.

    .. math::

        m_t &= b\, m_{t-1} + (1-b)\, G_t, \qquad
        u_t = \operatorname{NS}(b\, m_t + (1-b)\, G_t) \\
        r &= \sqrt{\operatorname{mean}(\cosh^2(\gamma u_t / (\|u_t\|_F + \epsilon_n)))}, \qquad
        W_t = W_{t-1} - \eta\left(\frac{s\, u_t}{r + \epsilon} + \lambda W_{t-1}\right)

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      momentum: b, in [0, 1).
      nesterov: as above; otherwise NS acts on :math:`m_t`.
      weight_decay: decoupled decay, times the rate but not the factor s.
      mask: which leaves are decayed (True = decayed); default all.
      ns_steps: Newton-Schulz steps, >= 1; the paper takes 1, the authors' package 5.
      gamma: factor inside cosh, >= 0; 1 is the paper's, 1.5 the package's.
      ns_coeffs: their coefficients, see ``orthogonalize_updates``.
      scaling: the factor s, see ``scale_by_matrix_shape``.
      norm_eps: added to the norm, here and in NS, >= 0.
      eps: added to r, >= 0.
      ns_dtype: dtype of NS's products. None: f32, or f64 for f64 parameters.
      matrix_leaves: which leaves take this step, as in ``auon``; vectors among them skip NS.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.
      axis_names: mesh axes among whose devices the matrices are divided; default all.
      adam_learning_rate: rate of the other leaves, or a schedule, as in ``auon``.
      adam_b1: decay of Adam's first moment, in [0, 1).
      adam_b2: decay of Adam's second moment, in [0, 1).
      adam_eps: added to Adam's root, >= 0.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter, 8 where AdamW steps.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, a leaf's layout is
        ambiguous, or ``matrix_leaves`` chooses a vector.

    One NS step evens out little. A vector's step grows with its gradient, as in the package, which
    is a reason to give vectors to AdamW (``adam_learning_rate``). For a convolution the package
    runs NS on the last two axes of its window; this flattens it to (window times inputs, outputs).

    >>> import jax.numpy as jnp
    >>> tx = hybrid_auon(0.1, ns_coeffs=(1.5, -0.5, 0.0), gamma=0.0)
    >>> params = {"kernel": jnp.zeros((2, 2))}
    >>> grads = {"kernel": jnp.array([[0.0, 3.0], [-4.0, 0.0]])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)  # 1.5 s - 0.5 s^3 of 0.6 and 0.8
    >>> round(float(updates["kernel"][0, 1]), 4), round(float(updates["kernel"][1, 0]), 4)
    (-0.0792, 0.0944)

    Reference: Maity, "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", 2025, arXiv
    2509.24320. Agrees with the authors' package (goldens ``auon__hybrid*``).
    """
    check_range(momentum=momentum, ge=0, lt=1)
    check_range(gamma=gamma, norm_eps=norm_eps, eps=eps, ge=0)
    check_choice(SCALINGS, scaling=scaling)
    direction = optax.chain(
        ema_momentum(momentum, nesterov=nesterov),
        orthogonalize_updates(
            ns_steps,
            ns_coeffs,
            norm_eps,
            ns_dtype,
            matrix_axes=matrix_axes,
            axis_names=axis_names,
        ),
        scale_by_cosh_rms(gamma, False, norm_eps, eps, matrix_axes=matrix_axes),
        scale_by_matrix_shape(scaling, matrix_axes=matrix_axes),
    )
    return _stepped(
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
    )


def _stepped(
    direction: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: Any,
    mask: Mask,
    *,
    matrix_leaves: LeafSelector,
    adam_learning_rate: ScalarOrSchedule,
    **rest: Any,
) -> GradientTransformation:
    """The direction with decay and rate: for every leaf, or for matrices beside AdamW."""
    split = matrix_recipe(
        direction,
        learning_rate,
        weight_decay,
        mask,
        matrix_leaves=matrix_leaves,
        adam_learning_rate=adam_learning_rate,
        adam_weight_decay=None,
        **rest,
    )
    if matrix_leaves is not None or adam_learning_rate is not None:
        return split
    return recipe(
        direction,
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


_TRACED = (
    "learning_rate",
    "momentum",
    "weight_decay",
    "gamma",
    "norm_eps",
    "eps",
    "adam_learning_rate",
    "adam_b1",
    "adam_b2",
    "adam_eps",
)

RECORDS = (
    Method(
        factory=auon,
        kind="recipe",
        summary="momentum over its norm and the root mean square of its cosh",
        example={"learning_rate": 0.1, "weight_decay": 0.1},
        traced=_TRACED,
        static=("nesterov", "mask", "normalize", "scaling", "matrix_leaves", "matrix_axes"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="bounded",
        state_bytes=4,
        moved_bytes=20,
        paper='Maity, "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", 2025, '
        "arXiv 2509.24320",
        reference="ryyzn9/AuON@bba2e82200:auon/optimizer.py:AuON; "
        "ryyzn9/AuON@c87b862:Auon_Adam_train.py:auon",
        licence="Apache-2.0",
    ),
    Method(
        factory=hybrid_auon,
        kind="recipe",
        summary="AuON behind a few Newton-Schulz steps",
        example={"learning_rate": 0.02, "weight_decay": 0.1, "adam_learning_rate": 1e-3},
        traced=_TRACED,
        static=(
            "nesterov",
            "mask",
            "ns_steps",
            "ns_coeffs",
            "scaling",
            "ns_dtype",
            "matrix_leaves",
            "matrix_axes",
            "axis_names",
        ),
        needs=("params",),
        position="alone",
        communication="matrix",
        response="bounded",
        state_bytes=4,
        moved_bytes=20,
        paper='Maity, "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", 2025, '
        "arXiv 2509.24320",
        reference="ryyzn9/AuON@bba2e82200:auon/optimizer.py:HybridAuON",
        licence="Apache-2.0",
    ),
)
