"""GradNormLoRP: GaLore on weight-normalised matrices; and the same without the projection."""

from __future__ import annotations

from typing import Any, Literal

from optimkit.leaves import recipe
from optimkit.protocols import GradientTransformation, LeafSelector, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.wrappers.project_low_rank import project_low_rank
from optimkit.wrappers.projectors import ProjectorFn, ProjType
from optimkit.wrappers.subspace_moments import keep_in_bits
from optimkit.wrappers.weight_normalized import NormAxis, weight_normalized


def gradnormlorp(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    rank: int = 128,
    update_proj_gap: int | None = 200,
    scale: Any = 1.0,
    proj_type: ProjType = "std",
    lowrank_leaves: LeafSelector = None,
    norm_axis: NormAxis = None,
    normalize_vectors: bool = False,
    weight_norm_gradient: Literal["identity", "tangent"] = "identity",
    norm_eps: Any = 1e-12,
    projector: str | ProjectorFn = "svd",
    state_bits: int | None = None,
) -> GradientTransformation:
    r"""GaLore's AdamW on the direction v of each row of the weights, Adam on the row's length.

    .. math::

        d &= \langle G, v/\|v\|\rangle, \qquad R = P^T G, \qquad
            U = s P\,\operatorname{adam}(R) \\
        v' &= (v - \eta c_t U)(1 - \eta\lambda), \qquad
            g = (\|v\| - \eta c_t \operatorname{adam}(d))(1 - \eta\lambda), \qquad
            w' = g\, v'/\|v'\|

    with :math:`\operatorname{adam} = m/(\sqrt v + \epsilon)`,
    :math:`c_t = \sqrt{1-b_2^t}/(1-b_1^t)`, for each row: what feeds one output. P holds the
    ``rank`` leading singular vectors of the gradient at steps 1, 1 + T, 1 + 2T, ... Leaves that are
    not projected take the same step with the gradient itself and without s.

    Args:
      learning_rate: step size, or a schedule over the 0-based count; the authors take 0.01 for
        pretraining and 3e-5 for fine-tuning.
      b1: decay of the first moments, in [0, 1).
      b2: decay of the second moments, in [0, 1).
      eps: added to the uncorrected roots, >= 0.
      weight_decay: lambda, >= 0, in the full space, on v and on g after the step: a row shrinks
        once a step.
      mask: which leaves are decayed (True = decayed); default all.
      rank: columns of P, >= 1; clamped to the smaller side. The authors take 128 at 60M
        parameters, and 4 or 8 for fine-tuning.
      update_proj_gap: T; the authors take 250 for pretraining and 500 for fine-tuning. None: see
        ``refresh_projectors``.
      scale: s, >= 0; the authors take 0.25 for pretraining and 4 for fine-tuning.
      proj_type: ``"std"`` projects the smaller side; others, and ``"full"``, both sides, which is
        the paper's form, as in ``project_low_rank``.
      lowrank_leaves: which leaves are projected: a tree of bools, ``(path, leaf) -> bool``, or
        patterns. Default: all of rank two. The authors project the linear layers of attention and
        MLPs.
      norm_axis: axes of a row's norm; default the inputs, as in ``weight_normalized``.
      normalize_vectors: take each bias or norm scale as one row, as the authors' code does; else
        these get the plain step of AdamW.
      weight_norm_gradient: ``"identity"``, the authors' code, or ``"tangent"``, G without its part
        along v: the gradient of weight normalisation.
      norm_eps: rows of a norm no larger get the plain step, >= 0.
      projector: ``"svd"``, ``"gram"``, ``"subspace"``, ``"random"``, ``"gaussian"``, or a function,
        as in ``project_low_rank``.
      state_bits: 8 or 4: keep the moments of R in as many bits (``quantize_state``).

    Returns:
      An optimizer that needs ``params``. For a projected (d, D) leaf, d the smaller side, it keeps
      4 (d + 2 D) rank bytes and 12 bytes a row; the authors' code keeps a copy of the weights too.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, a chosen leaf is no
        matrix, or a leaf has no such axis.

    This is the authors' program, in which the length starts from :math:`\|v\|` in every step, so
    that Adam's step on it lasts until the next one and never adds up. The paper means another
    thing: train a, b and magnitude of ``optimkit.nn.weight_norm_lora`` with ``galore``. The code
    gives NaN where a row is zero; here such a row begins with a plain step. Scalars, and leaves of
    more than two axes, for which the code stops, always get that. Other options of the projection:
    ``weight_normalized`` around ``project_low_rank``. The published numbers cannot be tied to the
    public code, two of whose three optimizers stop or move nothing.

    >>> import jax.numpy as jnp
    >>> tx = gradnormlorp(0.1, eps=1e-12, rank=1)
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}  # one row, of length 5
    >>> grads = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> new = params["kernel"] + updates["kernel"]  # direction (2.9, 4), length 5 - 0.1
    >>> [round(float(x), 3) for x in new.ravel()], round(float(jnp.linalg.norm(new)), 3)
    ([2.876, 3.967], 4.9)

    Reference: Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM
    Training", AAAI 2025, arXiv 2412.19616.
    """
    directions = project_low_rank(
        keep_in_bits(scale_by_adam(b1, b2, eps, eps_form="before_bias_correction"), state_bits),
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        proj_type=proj_type,
        lowrank_leaves=lowrank_leaves,
        projector=projector,
    )
    return recipe(
        weight_normalized(
            directions,
            scale_by_adam(b1, b2, eps, eps_form="before_bias_correction"),
            learning_rate,
            weight_decay,
            mask,
            norm_axis=norm_axis,
            normalize_vectors=normalize_vectors,
            weight_norm_gradient=weight_norm_gradient,
            norm_eps=norm_eps,
        )
    )


def weight_norm_adam(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    norm_axis: NormAxis = None,
    normalize_vectors: bool = False,
    weight_norm_gradient: Literal["identity", "tangent"] = "identity",
    norm_eps: Any = 1e-12,
    state_bits: int | None = None,
) -> GradientTransformation:
    r"""AdamW on the direction v of each row of the weights, and Adam on the row's length.

    .. math::

        d &= \langle G, v/\|v\|\rangle, \qquad
            v' = (v - \eta c_t \operatorname{adam}(G))(1 - \eta\lambda) \\
        g &= (\|v\| - \eta c_t \operatorname{adam}(d))(1 - \eta\lambda), \qquad
            w' = g\, v'/\|v'\|

    It is ``gradnormlorp`` without the projection; all else is explained there.

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      b1: decay of the first moments, in [0, 1).
      b2: decay of the second moments, in [0, 1).
      eps: added to the uncorrected roots, >= 0.
      weight_decay: lambda, >= 0, after the step, on v and on g.
      mask: which leaves are decayed (True = decayed); default all.
      norm_axis: axes of a row's norm; default the inputs, as in ``weight_normalized``.
      normalize_vectors: take each bias or norm scale as one row; else these get a plain step.
      weight_norm_gradient: ``"identity"``, the authors' code, or ``"tangent"``, G without its part
        along v.
      norm_eps: rows of a norm no larger get the plain step, >= 0.
      state_bits: 8 or 4: keep the moments of G in as many bits (``quantize_state``).

    Returns:
      An optimizer that needs ``params``; 8 bytes a parameter and 12 bytes a row.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a leaf has no
        such axis.

    >>> import jax.numpy as jnp
    >>> tx = weight_norm_adam(0.1, eps=1e-12, weight_norm_gradient="tangent")
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> grads = {"kernel": jnp.array([[3.0], [4.0]])}  # along v: nothing turns, the length falls
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> [round(float(x), 2) for x in (params["kernel"] + updates["kernel"]).ravel()]
    [2.94, 3.92]

    Reference: Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM
    Training", AAAI 2025, arXiv 2412.19616.
    """
    adam = scale_by_adam(b1, b2, eps, eps_form="before_bias_correction")
    return recipe(
        weight_normalized(
            keep_in_bits(adam, state_bits),
            adam,
            learning_rate,
            weight_decay,
            mask,
            norm_axis=norm_axis,
            normalize_vectors=normalize_vectors,
            weight_norm_gradient=weight_norm_gradient,
            norm_eps=norm_eps,
        )
    )


_PAPER = (
    'Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", '
    "AAAI 2025, arXiv 2412.19616"
)
_REFERENCE = (
    "Jhhuangkay/Gradient-Weight-normalized-Low-rank-Projection-for-Efficient-LLM-Training"
    "@66c8e767c04e6e37a68744c2939209417ae5e4e0:GradNormLoRP/LowRankWeightNormAdamW.py:"
    "LowRankWeightNormAdamW"
)

RECORDS = (
    Method(
        factory=gradnormlorp,
        kind="recipe",
        summary="AdamW in a subspace on directions of rows, Adam on their lengths",
        example={
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "rank": 2,
            "update_proj_gap": 2,
            "normalize_vectors": True,
        },
        traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "scale", "norm_eps"),
        static=(
            "mask",
            "rank",
            "update_proj_gap",
            "proj_type",
            "lowrank_leaves",
            "norm_axis",
            "normalize_vectors",
            "weight_norm_gradient",
            "projector",
            "state_bits",
        ),
        needs=("params",),
        position="alone",
        communication="matrix",
        response="bounded",
        tolerance={"sharding": 1e-4},  # rounding of a row's length: see weight_normalized
        state_bytes=0.14,  # 12 rank / d for a square matrix of 256 x 256, and 12 / 256 for the rows
        moved_bytes=24,  # 12; gradient and parameter once more for d, parameter for the new norm
        paper=_PAPER,
        reference=_REFERENCE,
        licence="Apache-2.0",
    ),
    Method(
        factory=weight_norm_adam,
        kind="recipe",
        summary="AdamW on directions of rows, Adam on their lengths",
        example={"learning_rate": 0.01, "weight_decay": 0.1},
        traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "norm_eps"),
        static=("mask", "norm_axis", "normalize_vectors", "weight_norm_gradient", "state_bits"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="bounded",
        tolerance={"sharding": 1e-4},  # rounding of a row's length: see weight_normalized
        state_bytes=8,
        moved_bytes=48,  # 28; gradient and parameter once more for d, and w, m and v for the norm
        paper=_PAPER,
        reference=_REFERENCE,
        licence="Apache-2.0",
    ),
)
