"""Muon: momentum, orthogonalised by Newton-Schulz, for matrices; AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import optax

from optimkit.layout import MatrixAxesOverride
from optimkit.matrices.newton_schulz import KELLER, NsCoeffs
from optimkit.matrices.parts import SplitOutputs
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import GradientTransformation, LeafSelector, Mask, Method, ScalarOrSchedule
from optimkit.transforms.matrix_shape import SCALINGS, scale_by_matrix_shape
from optimkit.transforms.normuon import scale_by_normuon
from optimkit.transforms.orthogonalize import scale_by_muon
from optimkit.wrappers.by_kind import matrix_recipe


def muon(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.95,
    nesterov: bool = True,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    ns_steps: int = 5,
    ns_coeffs: NsCoeffs = KELLER,
    eps: Any = 1e-7,
    scaling: Literal["keller", "moonlight", "spectral", "none"] = "keller",
    momentum_form: Literal["ema", "sum"] = "ema",
    ns_dtype: Any = "bfloat16",
    mu_dtype: Any = None,
    bucket: bool = True,
    matrix_leaves: LeafSelector = None,
    matrix_axes: MatrixAxesOverride = None,
    split_outputs: SplitOutputs = None,
    axis_names: Sequence[str] | None = None,
    normuon_b2: Any = None,
    adam_learning_rate: ScalarOrSchedule = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.95,
    adam_eps: Any = 1e-10,
    adam_weight_decay: Any = None,
    adam_eps_form: Literal["standard", "before_bias_correction"] = "standard",
) -> GradientTransformation:
    r"""Steps matrices by their orthogonalised momentum, all directions alike; the rest by AdamW.

    .. math::

        m_t &= b\, m_{t-1} + (1-b)\, G_t, \qquad u_t = b\, m_t + (1-b)\, G_t \\
        W_t &= W_{t-1} - \eta\,(s \operatorname{NS}(u_t) + \lambda W_{t-1})

    NS replaces the singular values of a matrix by numbers close to one (``newton_schulz``). With r
    outputs and c inputs the factor s is :math:`\sqrt{\max(1, r/c)}` (keller),
    :math:`0.2\sqrt{\max(r, c)}` (moonlight), :math:`\sqrt{r/c}` (spectral) or 1 (none).

    Args:
      learning_rate: step size, or a schedule over the 0-based count. 0.02 is the authors' with
        ``"keller"``; with ``"moonlight"`` take AdamW's rate.
      momentum: b, in [0, 1).
      nesterov: as above; otherwise :math:`u_t = m_t`.
      weight_decay: decoupled decay, times the rate but not the factor s. Moonlight takes 0.1.
      mask: which leaves are decayed (True = decayed); default all.
      ns_steps: Newton-Schulz steps, >= 1.
      ns_coeffs: (a, b, c) for all steps, a sequence with a triple a step, ``"keller"``, ``"dion"``,
        ``"polar_express"``, or a function of (smaller side, larger side) that gives one of these.
      eps: added to the norm that NS divides by, >= 0; Polar Express takes 1e-6 at least.
      scaling: the factor s.
      momentum_form: ``"ema"`` as above, or ``"sum"`` without the factor 1 - b: the same step, up to
        ``eps``.
      ns_dtype: dtype of NS's products, which accumulate in f32 at least. The default bfloat16 is
        the authors'; it moves a step by 2 to 3% of its norm. None: f32, or f64 for f64 parameters.
      mu_dtype: dtype of the momentum; default f32.
      bucket: join matrices of one size in one batched product; the numbers are the same without.
      matrix_leaves: which leaves are matrices: a tree of bools, ``(path, leaf) -> bool``, or path
        patterns. Default: rank two or more, no embedding and no output head, by path.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``. Batch axes (scanned layers,
        experts) hold matrices of their own.
      split_outputs: ``{pattern: sizes}`` for kernels that are several matrices side by side, such
        as fused queries, keys and values. (Heads on an axis of their own are a batch: see
        ``matrix_axes``.)
      axis_names: mesh axes among whose devices the matrices are divided; default all.
      normuon_b2: decay of NorMuon's mean square per output channel (``scale_by_normuon``), in
        [0, 1); its authors' is 0.95. None: plain Muon.
      adam_learning_rate: rate of the other leaves, or a schedule; None: ``learning_rate``. The
        authors' is 3e-4.
      adam_b1: decay of Adam's first moment, in [0, 1).
      adam_b2: decay of Adam's second moment, in [0, 1).
      adam_eps: added to Adam's root, >= 0.
      adam_weight_decay: decay of the other leaves; None: ``weight_decay``.
      adam_eps_form: ``"standard"``, or ``"before_bias_correction"`` as Moonlight has it.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter of a matrix, 8 of another
      leaf (AdamW: 8). On a mesh every device orthogonalises its share of the matrices.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, a leaf's layout is
        ambiguous, or ``matrix_leaves`` chooses a vector.

    A zero gradient decays and lets the momentum run on. For a convolution of rank 4 "keller" takes
    height over width of the window, as the authors' code does: 1 for a square one.
    ``optax.contrib.muon`` mixes its Nesterov step with two different bias corrections, adds 1e-8 in
    place of 1e-7, and sends embeddings and heads through NS: its steps differ by some percent.

    >>> import jax.numpy as jnp, optax
    >>> tx = muon(0.1, ns_coeffs="dion", ns_dtype="float32")
    >>> params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    >>> grads = {"kernel": jnp.array([[0.0, 5.0], [-2.0, 0.0]]), "bias": jnp.array([3.0, -1.0])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> round(float(updates["kernel"][0, 1]), 2), round(float(updates["kernel"][1, 0]), 2)
    (-0.1, 0.1)
    >>> [round(float(u), 2) for u in updates["bias"]]
    [-0.1, 0.1]

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024;
    Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982. Agrees with the
    authors' code without its cast to bfloat16 (goldens ``muon__*``).
    """
    check_range(momentum=momentum, ge=0, lt=1)
    check_choice(SCALINGS, scaling=scaling)
    check_choice(("ema", "sum"), momentum_form=momentum_form)
    check_range(normuon_b2=normuon_b2, ge=0, lt=1)
    views: dict[str, Any] = {"matrix_axes": matrix_axes, "split_outputs": split_outputs}
    direction = optax.chain(
        scale_by_muon(
            momentum,
            nesterov,
            ns_steps,
            ns_coeffs,
            eps,
            momentum_form,
            ns_dtype,
            bucket,
            mu_dtype=mu_dtype,
            axis_names=axis_names,
            **views,
        ),
        *(() if normuon_b2 is None else (scale_by_normuon(normuon_b2, **views),)),
        scale_by_matrix_shape(scaling, **views),
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
        adam_weight_decay=adam_weight_decay,
        adam_eps_form=adam_eps_form,
    )


RECORD = Method(
    factory=muon,
    kind="recipe",
    summary="momentum orthogonalised by Newton-Schulz; AdamW for vectors",
    # Full products, so that the contract can compare to rounding.
    example={"learning_rate": 0.02, "weight_decay": 0.1, "ns_dtype": None},
    traced=(
        "learning_rate",
        "momentum",
        "weight_decay",
        "eps",
        "normuon_b2",
        "adam_learning_rate",
        "adam_b1",
        "adam_b2",
        "adam_eps",
        "adam_weight_decay",
    ),
    static=(
        "nesterov",
        "mask",
        "ns_steps",
        "ns_coeffs",
        "scaling",
        "momentum_form",
        "ns_dtype",
        "mu_dtype",
        "bucket",
        "matrix_leaves",
        "matrix_axes",
        "split_outputs",
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
    paper='Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et '
    'al., "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982',
    reference="KellerJordan/Muon@857d1adc15:muon.py:SingleDeviceMuonWithAuxAdam; "
    "MoonshotAI/Moonlight@c2ad5b20c6:examples/toy_train.py:Muon",
    licence="MIT",
)
