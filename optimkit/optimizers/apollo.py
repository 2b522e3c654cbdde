"""APOLLO: the raw gradient, with the step sizes that Adam takes in a random sketch of it."""

from __future__ import annotations

from typing import Any, Literal

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import GradientTransformation, LeafSelector, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.bias_correction import scale_by_bias_correction
from optimkit.transforms.decay_after_step import decay_after_step
from optimkit.transforms.limit_norm_growth import limit_norm_growth
from optimkit.transforms.norm_based_scaling import SCALE_TYPES, norm_based_scaling
from optimkit.wrappers.project_low_rank import project_low_rank
from optimkit.wrappers.projectors import ONE_SIDED, OneSided, ProjectorFn

SCALING_EPS = 1e-8

SKETCHES = ("random", "svd")


def scale_by_apollo(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    *,
    rank: int = 256,
    scale: Any = 1.0,
    scale_type: Literal["channel", "tensor"] = "channel",
    update_proj_gap: int | None = 200,
    proj: Literal["random", "svd"] | ProjectorFn = "random",
    proj_type: OneSided = "std",
    lowrank_leaves: LeafSelector = None,
    scale_front: bool = False,
    limit_growth: bool = True,
    gamma: Any = 1.01,
    seed: int = 0,
    store_projection: bool = True,
) -> GradientTransformation:
    """APOLLO's direction: no rate, no sign, no decay.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0.
      rank: as in ``apollo``, and so are all that follow.
      scale: enters as its square root.
      scale_type: ``"channel"`` or ``"tensor"``.
      update_proj_gap: steps between two sketches.
      proj: ``"random"``, ``"svd"`` or a function.
      proj_type: which side is projected.
      lowrank_leaves: which leaves are.
      scale_front: scale before the limit on growth.
      limit_growth: whether there is that limit.
      gamma: the limit, >= 1.
      seed: of the random sketches.
      store_projection: keep the sketch, or draw it anew in every step.

    Returns:
      A transformation for the place before the rate; its state is ``apollo``'s.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a chosen leaf is
        no matrix.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_apollo(eps=0.0, rank=1, scale=4.0, scale_type="tensor")
    >>> g = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    >>> updates, _ = tx.update(g, tx.init(g), g)  # along the gradient, 2 x the norm of Adam's step
    >>> bool(jnp.allclose(updates["kernel"] / updates["kernel"][0, 0] * 3, g["kernel"]))
    True

    Reference: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025,
    arXiv 2412.05270.
    """
    check_choice(ONE_SIDED, proj_type=proj_type)
    check_choice(SCALE_TYPES, scale_type=scale_type)
    check_range(scale=scale, ge=0)
    if not callable(proj):
        check_choice(SKETCHES, proj=proj)
    times = optax.scale(scale**0.5)
    limit = (limit_norm_growth(gamma),) if limit_growth else ()
    return optax.chain(
        project_low_rank(
            scale_by_adam(b1, b2, eps, bias_correction=False),
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=0,
            proj_type=proj_type,
            lowrank_leaves=lowrank_leaves,
            projector="gaussian" if proj == "random" else proj,
            residual=norm_based_scaling(SCALING_EPS, scale_type),
            residual_transform=optax.chain(times, *limit)
            if scale_front
            else (optax.chain(*limit, times)),
            residual_scale=0,
            store_projector=store_projection,
            seed=seed,
        ),
        scale_by_bias_correction(b1, b2),
    )


def apollo(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    rank: int = 256,
    scale: Any = 1.0,
    scale_type: Literal["channel", "tensor"] = "channel",
    update_proj_gap: int | None = 200,
    proj: Literal["random", "svd"] | ProjectorFn = "random",
    proj_type: OneSided = "std",
    lowrank_leaves: LeafSelector = None,
    scale_front: bool = False,
    limit_growth: bool = True,
    gamma: Any = 1.01,
    seed: int = 0,
    store_projection: bool = True,
) -> GradientTransformation:
    r"""The gradient, each channel of a matrix scaled as Adam scales it in a sketch of few rows.

    .. math::

        R &= P^T G, \qquad N = m_t / (\sqrt{v_t} + \epsilon), \qquad
            m_t, v_t \text{ Adam's moments of } R \\
        S &= \sqrt s\; G\,\operatorname{diag}(\phi), \qquad \phi_i = \|N_i\| / (\|R_i\| + 10^{-8})

    S then passes ``limit_norm_growth(gamma)``, and

    .. math::

        W \leftarrow \Bigl(W - \eta \frac{\sqrt{1-b_2^t}}{1-b_1^t} S\Bigr)(1 - \eta\lambda)

    P has independent normal entries of variance 1 / rank; no singular vectors are needed. Leaves
    that are not projected get AdamW without s.

    Args:
      learning_rate: step size, or a schedule over the 0-based count; 0.01 is the authors'.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0.
      weight_decay: lambda, on the parameters after the step.
      mask: which leaves are decayed (True = decayed); default all.
      rank: rows of the sketch, >= 1; a random one may have more than the smaller side.
      scale: s, >= 0, which enters as its square root.
      scale_type: ``"channel"``: one factor for each channel of the side that is not projected;
        ``"tensor"``: one a matrix.
      update_proj_gap: T, steps between two sketches; None: the first one for the whole run.
      proj: ``"random"``, ``"svd"`` (the subspace of ``galore``), or a function, as in
        ``project_low_rank``.
      proj_type: ``"std"`` projects the smaller side, as the authors do; ``"reverse_std"`` the
        larger, ``"right"`` the inputs and ``"left"`` the outputs of (in, out) kernels.
      lowrank_leaves: which leaves are projected: a tree of bools, ``(path, leaf) -> bool``, or
        patterns. Default: all of rank two; the authors take the linear layers of attention and
        MLPs.
      scale_front: multiply by the root of s before the limit on growth instead of after it: the
        limit starts with the first step, so that s then counts from the first step on.
      limit_growth: whether there is that limit.
      gamma: largest growth of the norm of S a step, >= 1.
      seed: of the random sketches; each leaf and each refresh draws afresh.
      store_projection: False draws the sketch anew in every step from the seed, which saves
        4 d rank bytes a matrix; for ``"random"``.

    Returns:
      An optimizer that needs ``params``. For a projected (d, D) leaf, d the smaller side, it keeps
      8 D rank bytes, 4 d rank for a stored sketch, one norm and one flag.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a chosen leaf is
        no matrix.

    A refresh changes the sketch and leaves m and v as they are, though their coordinates then
    belong to another one: the authors' way. A leaf whose gradient is zero once stands still for
    some thousand steps, because its whole step is limited (see ``limit_norm_growth``). Random
    sketches are JAX's (threefry unless it is told otherwise) and not those of the authors' torch
    generator; the recorded trajectories are reproduced with the recorded sketches.

    >>> import jax.numpy as jnp
    >>> tx = apollo(0.1, rank=4)
    >>> params = {"kernel": jnp.zeros((2, 3))}
    >>> grads = {"kernel": jnp.array([[3.0, 0.0, 0.0], [-1.0, 0.0, 2.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> column = updates["kernel"][:, 0]
    >>> round(float(column[0] / column[1]), 3), updates["kernel"][:, 1].tolist()
    (-3.0, [-0.0, -0.0])

    Reference: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025,
    arXiv 2412.05270.
    """
    return recipe(
        scale_by_apollo(
            b1,
            b2,
            eps,
            rank=rank,
            scale=scale,
            scale_type=scale_type,
            update_proj_gap=update_proj_gap,
            proj=proj,
            proj_type=proj_type,
            lowrank_leaves=lowrank_leaves,
            scale_front=scale_front,
            limit_growth=limit_growth,
            gamma=gamma,
            seed=seed,
            store_projection=store_projection,
        ),
        optax.scale_by_learning_rate(learning_rate),
        decay_after_step(weight_decay, learning_rate, mask),
    )


def apollo_mini(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    rank: int = 1,
    scale: Any = 128.0,
    scale_type: Literal["channel", "tensor"] = "tensor",
    update_proj_gap: int | None = 200,
    proj: Literal["random", "svd"] | ProjectorFn = "random",
    proj_type: OneSided = "std",
    lowrank_leaves: LeafSelector = None,
    scale_front: bool = False,
    limit_growth: bool = True,
    gamma: Any = 1.01,
    seed: int = 0,
    store_projection: bool = True,
) -> GradientTransformation:
    """APOLLO-Mini: ``apollo`` with a sketch of rank one and one factor a matrix.

    Args:
      learning_rate: step size, or a schedule over the 0-based count; 0.01 is the authors'.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0.
      weight_decay: decoupled decay, on the parameters after the step.
      mask: which leaves are decayed (True = decayed); default all.
      rank: rows of the sketch, >= 1.
      scale: enters as its square root: 128 is a factor of 11.3.
      scale_type: ``"channel"`` or ``"tensor"``; channels are noisy at rank one.
      update_proj_gap: steps between two sketches.
      proj: ``"random"``, ``"svd"``, or a function.
      proj_type: which side is projected.
      lowrank_leaves: which leaves are.
      scale_front: scale before the limit on growth; the authors do at 60M and 130M parameters.
      limit_growth: whether there is that limit.
      gamma: the limit, >= 1.
      seed: of the random sketches.
      store_projection: keep the sketch, or draw it anew in every step.

    Returns:
      An optimizer that needs ``params``; for a projected (d, D) leaf it keeps 8 D bytes, and 4 d
      for a stored sketch: about as little as SGD.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a chosen leaf is
        no matrix.

    A refresh leaves the moments as they are; see ``apollo`` for that and for what to expect.

    >>> import jax, jax.numpy as jnp
    >>> state = apollo_mini(0.01, store_projection=False).init({"kernel": jnp.zeros((100, 100))})
    >>> sum(x.size for x in jax.tree.leaves(state))  # two moments of 100, and scalars
    207

    Reference: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025,
    arXiv 2412.05270.
    """
    return apollo(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        mask,
        rank=rank,
        scale=scale,
        scale_type=scale_type,
        update_proj_gap=update_proj_gap,
        proj=proj,
        proj_type=proj_type,
        lowrank_leaves=lowrank_leaves,
        scale_front=scale_front,
        limit_growth=limit_growth,
        gamma=gamma,
        seed=seed,
        store_projection=store_projection,
    )


TRACED = ("b1", "b2", "eps", "scale", "gamma")
STATIC = (
    "rank",
    "scale_type",
    "update_proj_gap",
    "proj",
    "proj_type",
    "lowrank_leaves",
    "scale_front",
    "limit_growth",
    "seed",
    "store_projection",
)
PAPER = (
    'Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, arXiv 2412.05270'
)
REFERENCE = (
    "zhuhanqing/APOLLO@76b34725abcbd45aa47d8fdf831c8b5ba6d34dde:apollo_torch/apollo.py:AdamW"
)

RECORDS = (
    Method(
        factory=scale_by_apollo,
        kind="piece",
        summary="the gradient, scaled as Adam scales a random sketch of it",
        example={"rank": 2, "update_proj_gap": 2},
        traced=TRACED,
        static=STATIC,
        position="middle",
        communication="reduce",
        response="proportional",  # channels that the sketch hardly sees pass at first
        state_bytes=0.1,  # 12 rank / d for a square matrix, here of 256 x 256
        moved_bytes=12,
        paper=PAPER,
        reference=REFERENCE,
        licence="Apache-2.0",
    ),
    Method(
        factory=apollo,
        kind="recipe",
        summary="SGD with the step sizes that Adam takes in a random sketch",
        example={"learning_rate": 0.01, "weight_decay": 0.1, "rank": 2, "update_proj_gap": 2},
        traced=("learning_rate", "weight_decay", *TRACED),
        static=("mask", *STATIC),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="proportional",
        state_bytes=0.1,
        moved_bytes=12,
        paper=PAPER,
        reference=REFERENCE,
        licence="Apache-2.0",
    ),
    Method(
        factory=apollo_mini,
        kind="recipe",
        summary="APOLLO with a sketch of rank one and one factor a matrix",
        example={"learning_rate": 0.01, "weight_decay": 0.1, "update_proj_gap": 2},
        traced=("learning_rate", "weight_decay", *TRACED),
        static=("mask", *STATIC),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="proportional",
        state_bytes=0.05,
        moved_bytes=12,
        paper=PAPER,
        reference=REFERENCE,
        licence="Apache-2.0",
    ),
)
