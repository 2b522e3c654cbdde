"""SPAM: Adam that clips gradient spikes, resets its moments, and may keep only some of them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optimkit.leaves import map_leaves, recipe
from optimkit.numerics import check_count, check_range, next_count, one_minus_power, saturate
from optimkit.protocols import (
    Array,
    GradientTransformation,
    LeafSelector,
    Mask,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.adam import ScaleByAdamState, scale_by_adam
from optimkit.transforms.clip_spikes import clipping_is_on, second_moment_and_limit
from optimkit.transforms.decay_after_step import decay_after_step
from optimkit.wrappers.momentum_reset import momentum_reset
from optimkit.wrappers.sparse_momentum import SparseMaskFn, sparse_momentum


def _spike_clipping_adam(
    b1: Any, b2: Any, eps: Any, threshold: Any, clip_start: int, interval: int
) -> GradientTransformation:
    """``scale_by_adam(eps_form="before_bias_correction")`` with a clip by its own second moment."""

    def update(
        updates: PyTree, state: ScaleByAdamState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByAdamState]:
        del params, extra
        count = next_count(state.count)
        on = clipping_is_on(count, clip_start, interval) & (threshold > 0)
        correction = jnp.sqrt(one_minus_power(b2, count)) / one_minus_power(b1, count)

        def step(g: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
            v, limit = second_moment_and_limit(g, v, threshold, b2, on)
            m = b1 * m + (1 - b1) * jnp.clip(saturate(g), -limit, limit)
            return m / (jnp.sqrt(v) + eps) * correction, m, v

        updates, mu, nu = map_leaves(step, updates, state.mu, state.nu)
        return updates, ScaleByAdamState(count, mu, nu)

    return transformation(scale_by_adam().init, update)


def scale_by_spam(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    *,
    threshold: Any = 5000.0,
    reset_interval: int = 500,
    warmup_steps: int = 150,
    clip_start: int = 20,
    density: float = 1.0,
    sparse_leaves: LeafSelector = None,
    sparse_mask_fn: SparseMaskFn | None = None,
    seed: int = 0,
) -> GradientTransformation:
    r"""SPAM's direction: spike clipping, Adam, momentum reset with warm-up, sparse momentum.

    At step t (from 1), with :math:`D` = ``reset_interval``, in this order:

    .. math::

        & m, v \leftarrow 0 \text{ and new sparse entries, if } t \bmod D = 0 \\
        & g \leftarrow \operatorname{sign}(g)\sqrt{\theta v} \text{ where } g^2 > \theta v,
            \text{ if } t \ge G \text{ and } t \bmod D \ge G \\
        & m \leftarrow b_1 m + (1-b_1) g, \qquad v \leftarrow b_2 v + (1-b_2) g^2 \\
        & u = f(t) \frac{\sqrt{1-b_2^t}}{1-b_1^t} \frac{m}{\sqrt v + \epsilon}

    The corrections use the step t that no reset restarts; f is ``reset_warmup_factor``.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0. 1e-6 is in the authors' code only.
      threshold: theta, >= 0; 0 switches clipping off. 5000 is the paper's.
      reset_interval: D; 0 switches resets, warm-up and new sparse entries off. 500 is the paper's.
      warmup_steps: N, steps from the factor 0.01 back to 1 after a reset; 0: none. 150 is the
        paper's. With ``N >= D`` the ramp never completes.
      clip_start: G, steps without clipping after a reset; 20 is in the authors' code only. With
        ``G >= D`` nothing is ever clipped.
      density: share of entries of the sparse leaves that are kept and moved, in (0, 1].
      sparse_leaves: which leaves are sparse when ``density < 1``; default: matrices of rank 2
        other than embeddings and heads.
      sparse_mask_fn: ``(params, refresh_index, key) -> tree of bool masks``, None where dense, in
        place of the random draw; see ``sparse_momentum``.
      seed: of the random draws.

    Returns:
      A transformation that gives a direction (no rate, no sign). It keeps 8 bytes a f32 parameter,
      and 12 ``density`` for those of a sparse leaf.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Clipping shares v with Adam, so it costs no state. An entry with v = 0 while clipping is on is
    clipped to zero until the next reset, as in the authors' code: embedding rows of tokens that
    no batch held in the first ``clip_start - 1`` steps of an interval do not move in it.
    Entries above 1e15 (f32) count as 1e15. Sharded sparse leaves are gathered in each step.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_spam(clip_start=2)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 1.0], [1.0, 1e4]):
    ...     u, state = tx.update(jnp.array(g), state)
    >>> [round(float(m), 3) for m in state.inner_state.mu]  # without clipping: 0.19, 1000.09
    [0.19, 0.314]

    Reference: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
    ICLR 2025, arXiv 2501.06842.
    """
    check_range(b1=b1, b2=b2, ge=0, lt=1)
    check_range(eps=eps, threshold=threshold, ge=0)
    check_range(density=density, gt=0, le=1)
    check_count(reset_interval=reset_interval, warmup_steps=warmup_steps, clip_start=clip_start)
    direction = momentum_reset(
        _spike_clipping_adam(b1, b2, eps, threshold, clip_start, reset_interval),
        reset_interval,
        moments="before",
        counts="never",
        warmup_steps=warmup_steps,
    )
    if density == 1:
        return direction
    return sparse_momentum(
        direction,
        density,
        reset_interval,
        sparse_leaves=sparse_leaves,
        sparse_mask_fn=sparse_mask_fn,
        seed=seed,
    )


def spam(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    threshold: Any = 5000.0,
    reset_interval: int = 500,
    warmup_steps: int = 150,
    clip_start: int = 20,
    density: float = 1.0,
    sparse_leaves: LeafSelector = None,
    sparse_mask_fn: SparseMaskFn | None = None,
    seed: int = 0,
) -> GradientTransformation:
    r"""Adam that is not thrown off by gradient spikes: it clips them, and forgets now and then.

    .. math:: w_t = (w_{t-1} - \eta\, u_t)(1 - \eta\lambda)

    with the direction u of ``scale_by_spam``, which has the whole rule. Decay acts on the new
    parameters, times the rate and not times the warm-up factor.

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0. 1e-6 is in the authors' code only.
      weight_decay: decoupled decay, times the rate. All the authors' runs have 0.
      mask: which leaves are decayed (True = decayed); default all.
      threshold: entries whose square exceeds this multiple of their second moment are clipped to
        it; 0 switches clipping off. 5000 is the paper's.
      reset_interval: steps between two resets of the moments; 0 switches them off. 500 is the
        paper's.
      warmup_steps: length of the ramp after a reset; 150 is the paper's. The authors' script at
        its last commit passes the rate's warm-up (1000) instead, so that the ramp never ends.
      clip_start: steps without clipping after a reset; 20 is in the authors' code only.
      density: share of the entries of sparse leaves that have moments and move; the subset is
        drawn anew at each reset.
      sparse_leaves: which leaves are sparse when ``density < 1`` (None, tree of bools,
        ``(path, leaf) -> bool``, or patterns); default: matrices of rank 2 other than embeddings
        and heads.
      sparse_mask_fn: ``(params, refresh_index, key) -> tree of bool masks`` in place of the draw.
      seed: of the random draws.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, like AdamW, and
      12 ``density`` for those of a sparse leaf.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    With a large vocabulary, mind that an embedding row which gets no gradient in the first 19 steps
    of an interval stays put until the next (``scale_by_spam`` says why). The authors' code never
    decays sparse leaves, by a defect; here ``mask`` alone decides, and decay also moves entries
    that are not kept.

    >>> import jax.numpy as jnp, optax
    >>> tx = spam(0.1)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([0.5, -2.0]), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]
    [0.9, 1.1]

    Reference: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
    ICLR 2025, arXiv 2501.06842. Agrees with the authors' class to rounding (goldens ``spam__*``).
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return recipe(
        scale_by_spam(
            b1,
            b2,
            eps,
            threshold=threshold,
            reset_interval=reset_interval,
            warmup_steps=warmup_steps,
            clip_start=clip_start,
            density=density,
            sparse_leaves=sparse_leaves,
            sparse_mask_fn=sparse_mask_fn,
            seed=seed,
        ),
        optax.scale_by_learning_rate(learning_rate),
        decay_after_step(weight_decay, learning_rate, mask),
    )


_STATIC = (
    "reset_interval",
    "warmup_steps",
    "clip_start",
    "density",
    "sparse_leaves",
    "sparse_mask_fn",
    "seed",
)
_PAPER = (
    'Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", '
    "ICLR 2025, arXiv 2501.06842"
)
_REFERENCE = (
    "TianjinYellow/SPAM-Optimizer@e8185fbe695fdc449953b4a1f96121df5bf0d268:"
    "galore_torch/SPAM.py:AdamW"
)

RECORDS = (
    Method(
        factory=scale_by_spam,
        kind="piece",
        summary="SPAM's direction: spike clipping, Adam, momentum reset, sparse momentum",
        example={"reset_interval": 4, "warmup_steps": 2, "clip_start": 1},
        traced=("b1", "b2", "eps", "threshold"),
        static=_STATIC,
        position="middle",
        communication="none",
        response="bounded",
        state_bytes=8,
        moved_bytes=28,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="",
    ),
    Method(
        factory=spam,
        kind="recipe",
        summary="Adam with spike clipping and momentum reset",
        example={
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "reset_interval": 4,
            "warmup_steps": 2,
            "clip_start": 1,
        },
        traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "threshold"),
        static=("mask", *_STATIC),
        needs=("params",),
        position="alone",
        communication="none",
        response="bounded",
        state_bytes=8,
        moved_bytes=28,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="",
    ),
)
