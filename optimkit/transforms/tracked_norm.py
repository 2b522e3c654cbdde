"""AdaGN of Stable-SPAM: bring each leaf's gradient to a steady norm, by running means of norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import map_leaves, scalars_like, zero_count
from optimkit.numerics import (
    check_count,
    check_range,
    in_turn,
    next_count,
    one_minus_power,
    safe_div,
    saturate,
    turn_after,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.tracked_max import restarted_count


class NormalizeByTrackedNormState(NamedTuple):
    """``count``: int32 scalar. ``norm_mean``, ``norm_mean_square``: one f32 scalar a leaf each."""

    count: Array
    norm_mean: PyTree
    norm_mean_square: PyTree


def normalize_by_tracked_norm(
    b1: Any = 0.7,
    b2: Any = 0.9,
    eps: Any = 1e-8,
    *,
    scale: Any = None,
    count_restart: int | None = None,
) -> GradientTransformation:
    r"""Gives each leaf's gradient the norm (running mean of norms) / (running rms of norms).

    .. math::

        n = \|g\|_2, \quad q = b_1 s(t), \quad
        \mu_t = q \mu_{t-1} + (1-q)\, n, \quad \nu_t = b_2 \nu_{t-1} + (1-b_2)\, n^2 \\
        g \leftarrow \frac{g}{n} \cdot
            \frac{\mu_t / (1-q^t)}{\sqrt{\nu_t/(1-b_2^t)} + \epsilon}
            \;\text{ where } n > 0

    That norm is about 1 whatever the size of the gradient or of the leaf: at most 1.41 for the
    default decays, and well below 1 after a burst, which the mean forgets faster than the rms.

    Args:
      b1: decay of the mean of norms, in [0, 1); gamma1 of the paper. Powers use the current q.
      b2: decay of the mean of squared norms, in [0, 1); gamma2 of the paper.
      eps: added to the root, >= 0.
      scale: a schedule over the 0-based count that multiplies b1; default 1.
      count_restart: restart the count of the bias corrections after so many steps, as the published
        class does at its momentum resets (see ``clip_by_tracked_max``). Default: no restart.

    Returns:
      A transformation that works on whole leaves; put ``clip_by_tracked_max`` before it and the
      moments after it. It keeps two f32 scalars a leaf. Inside ``shard_map`` each device must hold
      whole leaves.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    A zero gradient passes and only moves the means; so does one whose squares all vanish (entries
    below about 1e-23 in f32). Entries above 1e15 (f32) count as 1e15. A layer axis in front, as of
    scanned layers, shares one norm over the layers: apply ``jax.vmap`` over it to keep them apart.
    A non-finite gradient poisons the means for good: put a guard in front.

    >>> import jax.numpy as jnp
    >>> tx = normalize_by_tracked_norm()
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([3.0, 4.0], [30.0, 40.0]):
    ...     out, state = tx.update(jnp.array(g), state)
    ...     print([round(float(x), 3) for x in out])
    [0.6, 0.8]
    [0.518, 0.691]

    Reference: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    2025, arXiv 2502.17055. Agrees with the authors' class (``normalized/`` of ``stable_spam__*``).
    """
    check_range(b1=b1, b2=b2, ge=0, lt=1)
    check_range(eps=eps, ge=0)
    check_count(count_restart=count_restart or 0)

    def init(params: PyTree) -> NormalizeByTrackedNormState:
        return NormalizeByTrackedNormState(zero_count(), scalars_like(params), scalars_like(params))

    def update(
        updates: PyTree,
        state: NormalizeByTrackedNormState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, NormalizeByTrackedNormState]:
        del params, extra
        count = next_count(state.count)
        decay = b1 if scale is None else b1 * scale(state.count)
        tracker_count = restarted_count(count, count_restart)
        mean_correction = one_minus_power(decay, tracker_count)
        square_correction = one_minus_power(b2, tracker_count)

        turn: Array | None = None

        def step(g: Array, mean: Array, mean_square: Array) -> tuple[Array, Array, Array]:
            nonlocal turn
            g = in_turn(saturate(g), turn)
            norm = jnp.sqrt(jnp.sum(jnp.square(g)))
            turn = turn_after(g, turn, norm)
            mean = decay * mean + (1 - decay) * norm
            mean_square = b2 * mean_square + (1 - b2) * jnp.square(norm)
            rms = jnp.sqrt(mean_square / square_correction)
            target = safe_div(mean / mean_correction, rms + eps)
            # Scalars first: one product an entry, cheap enough to be fused into the next link.
            return g * safe_div(target, norm, otherwise=1.0), mean, mean_square

        updates, mean, mean_square = map_leaves(
            step, updates, state.norm_mean, state.norm_mean_square
        )
        return updates, NormalizeByTrackedNormState(count, mean, mean_square)

    return transformation(init, update)


RECORD = Method(
    factory=normalize_by_tracked_norm,
    kind="piece",
    summary="bring a leaf's gradient to a steady norm (AdaGN)",
    traced=("b1", "b2", "eps"),
    static=("scale", "count_restart"),
    position="first",
    communication="reduce",
    response="bounded",
    state_bytes=0,
    moved_bytes=12,
    paper='Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025, '
    "arXiv 2502.17055",
    reference="TianjinYellow/StableSPAM@6a66da1ea7005f7fe7bc570b7968144b42163bed:"
    "galore_torch/stablespam.py:StableSPAM",
    licence="",
)
