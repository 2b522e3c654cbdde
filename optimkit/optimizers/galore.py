"""GaLore: AdamW whose moments live in a subspace of each matrix, renewed every so many steps."""

from __future__ import annotations

from typing import Any, Literal

import optax

from optimkit.leaves import recipe
from optimkit.protocols import GradientTransformation, LeafSelector, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.decay_after_step import decay_after_step
from optimkit.wrappers.project_low_rank import project_low_rank
from optimkit.wrappers.projectors import ProjectorFn, ProjType
from optimkit.wrappers.subspace_moments import keep_in_bits


def galore(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    rank: int = 128,
    update_proj_gap: int | None = 200,
    scale: Any = 0.25,
    proj_type: ProjType = "std",
    lowrank_leaves: LeafSelector = None,
    projector: str | ProjectorFn = "svd",
    projector_oversample: int = 8,
    projector_power_iters: int = 1,
    stagger: bool = False,
    moments_on_refresh: Literal["keep", "rotate", "reset"] = "keep",
    state_bits: int | None = None,
    state_block_size: int = 256,
    state_min_size: int = 4096,
) -> GradientTransformation:
    r"""AdamW on the projection of each matrix's gradient; weights stay full rank, moments do not.

    .. math::

        R &= P^T G, \qquad m = b_1 m + (1-b_1) R, \qquad v = b_2 v + (1-b_2) R^2 \\
        W &\leftarrow \Bigl(W - \eta\, s\, \frac{\sqrt{1-b_2^t}}{1-b_1^t}\,
            P\, \frac{m}{\sqrt v + \epsilon}\Bigr)(1 - \eta\lambda)

    P holds the ``rank`` leading singular vectors of the gradient at steps 1, 1 + T, 1 + 2T, ...
    Leaves that are not projected get the same AdamW without s.

    Args:
      learning_rate: step size, or a schedule over the 0-based count; 0.01 is the authors' for
        pretraining.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0: in effect some 32 times as large at the first step.
      weight_decay: lambda, in the full space, on the parameters after the step.
      mask: which leaves are decayed (True = decayed); default all.
      rank: columns of P, >= 1; the authors take a quarter of the width. A rank above the smaller
        side is clamped to it, which still rotates and scales.
      update_proj_gap: T; 200 is the authors' for pretraining. None: see ``refresh_projectors``.
      scale: s, >= 0; 0.25 is the authors' for pretraining, 4 for fine-tuning.
      proj_type: ``"std"`` projects the smaller side; ``"reverse_std"``, ``"left"``, ``"right"`` and
        ``"full"`` as in ``project_low_rank``.
      lowrank_leaves: which leaves are projected: a tree of bools, ``(path, leaf) -> bool``, or
        patterns. Default: all of rank two. The authors project the linear layers of attention and
        MLPs, and not embeddings and the head: ``["*attn*kernel", "*mlp*kernel"]``.
      projector: ``"svd"``, or a faster one: ``"gram"``, ``"subspace"``, ``"random"``,
        ``"gaussian"``; or a function; as in ``project_low_rank``.
      projector_oversample: for ``"subspace"``, random columns beside those that are kept.
      projector_power_iters: for ``"subspace"``, passes over the matrix and back, >= 1.
      stagger: spread the refreshes of the leaves over the T steps, so that none pays for all.
      moments_on_refresh: ``"keep"`` leaves m and v as they are at a refresh, though their
        coordinates then belong to another basis: the authors' way. ``"rotate"`` turns them into the
        new basis, ``"reset"`` forgets them.
      state_bits: 8 or 4: keep m and v in as many bits (``quantize_state``), with ``"keep"`` alone.
        As the authors' 8-bit class does, eps is then added after the bias correction; that class
        takes 1e-8.
      state_block_size: for ``state_bits``, entries that share a scale.
      state_min_size: for ``state_bits``, moments with fewer entries stay as they are.

    Returns:
      An optimizer that needs ``params``. For a projected (d, D) leaf, d the smaller side, it keeps
      4 (d + 2 D) rank bytes where AdamW keeps 8 d D: 3 bytes a parameter for a square one with
      rank d / 4.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a chosen leaf is
        no matrix.

    What is outside the subspace is dropped until a refresh takes it in; ``fira`` keeps it. With
    ``"full"`` the core R is diagonal at a refresh but for rounding, which Adam turns into steps of
    full size: runs on other hardware differ by percents. ``optax.contrib.galore`` projects the
    larger side of a kernel that is not square, adds eps after the bias correction and decays before
    the step. Signs of singular vectors are fixed here (largest entry positive), because the kept
    moments depend on them.

    >>> import jax.numpy as jnp
    >>> tx = galore(0.1, eps=0.0, rank=1, scale=0.5)
    >>> params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(1)}
    >>> grads = {"kernel": jnp.array([[9.0, 9.0, 9.0], [0.0, 0.0, 0.0]]), "bias": jnp.ones(1)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> [[round(float(u), 3) for u in row] for row in updates["kernel"]]
    [[-0.05, -0.05, -0.05], [-0.0, -0.0, -0.0]]
    >>> round(float(updates["bias"][0]), 3)
    -0.1

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    ICML 2024, arXiv 2403.03507.
    """
    if state_bits is not None and moments_on_refresh != "keep":
        raise ValueError(
            f"state_bits={state_bits!r} needs moments_on_refresh='keep', got {moments_on_refresh!r}"
        )
    eps_form = "before_bias_correction" if state_bits is None else "standard"
    adam = scale_by_adam(b1, b2, eps, eps_form=eps_form)
    return recipe(
        project_low_rank(
            keep_in_bits(adam, state_bits, state_block_size, state_min_size),
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            lowrank_leaves=lowrank_leaves,
            projector=projector,
            projector_oversample=projector_oversample,
            projector_power_iters=projector_power_iters,
            stagger=stagger,
            moments_on_refresh=moments_on_refresh,
        ),
        optax.scale_by_learning_rate(learning_rate),
        decay_after_step(weight_decay, learning_rate, mask),
    )


RECORD = Method(
    factory=galore,
    kind="recipe",
    summary="AdamW with its moments in a subspace of each matrix",
    example={"learning_rate": 0.01, "weight_decay": 0.1, "rank": 2, "update_proj_gap": 2},
    traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "scale"),
    static=(
        "mask",
        "rank",
        "update_proj_gap",
        "proj_type",
        "lowrank_leaves",
        "projector",
        "projector_oversample",
        "projector_power_iters",
        "stagger",
        "moments_on_refresh",
        "state_bits",
        "state_block_size",
        "state_min_size",
    ),
    needs=("params",),
    position="alone",
    communication="matrix",
    response="bounded",
    state_bytes=0.1,  # 12 rank / d for a square matrix, here of 256 x 256
    moved_bytes=12,
    paper='Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", '
    "ICML 2024, arXiv 2403.03507",
    reference="jiaweizzhao/GaLore@2cc66f88cce189e505affbb91042a8e77f5bf4e9:galore_torch/adamw.py:"
    "AdamW",
    licence="Apache-2.0",
)
