"""Fira: GaLore, and what its subspace leaves out as a rescaled plain gradient beside it."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import GradientTransformation, LeafSelector, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.bias_correction import scale_by_bias_correction
from optimkit.transforms.decay_after_step import decay_after_step
from optimkit.transforms.limit_norm_growth import limit_norm_growth
from optimkit.transforms.norm_based_scaling import norm_based_scaling
from optimkit.wrappers.project_low_rank import project_low_rank
from optimkit.wrappers.projectors import ONE_SIDED, OneSided, ProjectorFn
from optimkit.wrappers.subspace_moments import keep_in_bits


def fira(
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
    proj_type: OneSided = "std",
    lowrank_leaves: LeafSelector = None,
    gamma: Any = 1.01,
    limiter_eps: Any = 1e-8,
    scaling_eps: Any = 1e-8,
    residual_uses_scale: bool = True,
    projector: str | ProjectorFn = "svd",
    stagger: bool = False,
    state_bits: int | None = None,
) -> GradientTransformation:
    r"""AdamW in a subspace, as ``galore``; outside it the gradient, as strongly scaled as inside.

    .. math::

        R &= P^T G, \qquad N = m_t / (\sqrt{v_t} + \epsilon), \qquad
            m_t, v_t \text{ Adam's moments of } R \\
        S &= (G - s P R)\,\operatorname{diag}(\phi), \qquad
            \phi_i = \|N_i\| / (\|R_i\| + \epsilon_\phi) \\
        S &\leftarrow S\,\min\bigl(1, \gamma(q_{t-1} + \epsilon_q)/\|S\|\bigr), \qquad
            q_t = \|S\| \\
        W &\leftarrow (W - \eta c_t (s P N + S))(1 - \eta\lambda), \qquad
            c_t = \sqrt{1-b_2^t} / (1-b_1^t)

    Leaves that are not projected get AdamW without s.

    Args:
      learning_rate: step size, or a schedule over the 0-based count; 0.01 is the authors' for
        pretraining.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0.
      weight_decay: lambda, in the full space, on the parameters after the step.
      mask: which leaves are decayed (True = decayed); default all.
      rank: columns of P, >= 1; the authors take 128 at 60M parameters. Clamped to the smaller side.
      update_proj_gap: T, steps between two refreshes of P; None: see ``refresh_projectors``.
      scale: s, >= 0; the authors take 0.25 for pretraining.
      proj_type: ``"std"`` projects the smaller side, ``"reverse_std"`` the larger, ``"right"`` the
        inputs and ``"left"`` the outputs of (in, out) kernels.
      lowrank_leaves: which leaves are projected: a tree of bools, ``(path, leaf) -> bool``, or
        patterns. Default: all of rank two; the authors take the linear layers of attention and
        MLPs.
      gamma: largest growth of the norm of S a step, >= 1; infinity switches the limit off.
      limiter_eps: added to the last norm, >= 0.
      scaling_eps: added to the norm of R's channels, >= 0.
      residual_uses_scale: subtract s P R, as the authors' code does, so that with s = 0.25 three
        quarters of the gradient in the subspace stay in S; False subtracts P R, the paper's form.
      projector: ``"svd"``, ``"gram"``, ``"subspace"``, ``"random"``, or a function, as in
        ``project_low_rank``.
      stagger: spread the refreshes of the leaves over the T steps, so that none pays for all.
      state_bits: 8 or 4: keep m and v of at least 4096 entries in as many bits
        (``quantize_state``).

    Returns:
      An optimizer that needs ``params``. It keeps what ``galore`` keeps, and one norm and one flag
      a projected leaf.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a chosen leaf is
        no matrix.

    A refresh leaves m, v and q as they are, though m and v then belong to another basis. A leaf
    whose gradient is zero once has q = 0, from where S grows by 1% a step: in effect it is
    ``galore`` for some thousand steps (see ``limit_norm_growth``). At a rank that fills the smaller
    side S is rounding, rescaled.

    >>> import jax.numpy as jnp
    >>> tx = fira(0.1, eps=1e-12, rank=1)
    >>> params = {"kernel": jnp.zeros((2, 2))}
    >>> grads = {"kernel": jnp.array([[8.0, 0.0], [0.0, 2.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> [round(float(u), 3) for u in updates["kernel"][0]]  # the subspace is the first row
    [-0.1, -0.0]

    Reference: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint?", 2024, arXiv 2410.01623.
    """
    check_choice(ONE_SIDED, proj_type=proj_type)
    check_range(limiter_eps=limiter_eps, scaling_eps=scaling_eps, ge=0)
    return recipe(
        project_low_rank(
            keep_in_bits(scale_by_adam(b1, b2, eps, bias_correction=False), state_bits),
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            lowrank_leaves=lowrank_leaves,
            projector=projector,
            stagger=stagger,
            residual=norm_based_scaling(scaling_eps),
            residual_transform=limit_norm_growth(gamma, limiter_eps),
            residual_scale=scale if residual_uses_scale else 1.0,
        ),
        scale_by_bias_correction(b1, b2),
        optax.scale_by_learning_rate(learning_rate),
        decay_after_step(weight_decay, learning_rate, mask),
    )


RECORD = Method(
    factory=fira,
    kind="recipe",
    summary="low-rank AdamW, and the rest of the gradient as strongly scaled",
    example={"learning_rate": 0.01, "weight_decay": 0.1, "rank": 2, "update_proj_gap": 2},
    traced=(
        "learning_rate",
        "b1",
        "b2",
        "eps",
        "weight_decay",
        "scale",
        "gamma",
        "limiter_eps",
        "scaling_eps",
    ),
    static=(
        "mask",
        "rank",
        "update_proj_gap",
        "proj_type",
        "lowrank_leaves",
        "residual_uses_scale",
        "projector",
        "stagger",
        "state_bits",
    ),
    needs=("params",),
    position="alone",
    communication="matrix",
    response="proportional",  # a residual far above the projected gradient passes at first
    state_bytes=0.1,  # 12 rank / d for a square matrix, here of 256 x 256
    moved_bytes=12,
    paper='Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank '
    'Constraint?", 2024, arXiv 2410.01623',
    reference="xichen-fy/Fira@5c28b13408282b3ee65386b110318659412ddad9:optimizer_torch/"
    "fira_adamw.py:AdamW",
    licence="Apache-2.0",
)
