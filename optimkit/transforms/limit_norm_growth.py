"""Fira's norm-growth limiter: a norm may fall freely, but rise by one percent a step only."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, check_real, map_leaves, scalars_like, widen
from optimkit.numerics import check_range, compute_dtype, safe_div, safe_norm, tree_norm
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class LimitNormGrowthState(NamedTuple):
    """``norm``: f32, norm of the last limited update. ``seen``: bool, whether there was one.

    One scalar a leaf each, or one for the whole tree.
    """

    norm: PyTree
    seen: PyTree


def limit_norm_growth(
    gamma: Any = 1.01,
    eps: Any = 1e-8,
    *,
    per_leaf: bool = True,
    reset_on_zero: bool = False,
) -> GradientTransformation:
    r"""Scales an update down whose norm exceeds ``gamma`` times the norm of the last one.

    .. math::

        u \leftarrow \min\Bigl(1, \frac{\gamma (q_{t-1} + \epsilon)}{\|u\|}\Bigr)\, u, \qquad
        q_t = \|u\| \text{ after limiting}

    The first update passes. A spike is held to 1% more than the step before it and leaves nothing
    behind, and a norm that honestly grows needs 70 steps to double.

    Args:
      gamma: largest growth a step, >= 1; 1.01 is a constant of the authors' code. Infinity switches
        the limit off.
      eps: added to the last norm, >= 0; 1e-8 is the authors'. At 0 a leaf whose update was zero
        once stays zero, unless ``reset_on_zero``.
      per_leaf: one norm a leaf, as the authors do; False: one norm for the whole tree.
      reset_on_zero: let the update pass that follows a zero update. The authors' rule limits it to
        ``gamma * eps``, from where growth by 1% takes about 1850 steps back to norm 1: a leaf whose
        gradient is zero once, as of a frozen branch, stands still for that long.

    Returns:
      A transformation for anywhere in a chain. Fira and APOLLO put it before the bias correction
      and the rate. It keeps one f32 scalar and one bool a leaf. Inside ``shard_map`` each device
      must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, or the updates are another tree than before.

    An update whose norm is not finite becomes zero, and the norm before it stays. A layer axis in
    front, as of scanned layers, shares one norm over the layers: apply ``jax.vmap`` to keep them
    apart.

    >>> import jax.numpy as jnp
    >>> tx = limit_norm_growth(2.0, 0.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> for u in ([3.0, 4.0], [30.0, 40.0], [0.3, 0.4]):  # norms 5, 50 -> 10, 0.5
    ...     limited, state = tx.update(jnp.array(u), state)
    ...     print([round(float(x), 3) for x in limited], round(float(state.norm), 3))
    [3.0, 4.0] 5.0
    [6.0, 8.0] 10.0
    [0.3, 0.4] 0.5

    Reference: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint?", 2024, arXiv 2410.01623. The paper's limit has no epsilon.
    """
    check_range(gamma=gamma, ge=1)
    check_range(eps=eps, ge=0)

    def factor(norm: Array, last: Array, seen: Array) -> Array:
        """What an update of this norm is multiplied by; zero if the norm is not finite."""
        limited = seen & (last > 0) if reset_on_zero else seen
        # gamma / max(norm / (last + eps), gamma), without its overflow where last is zero.
        shrink = jnp.minimum(safe_div(gamma * (last + eps), norm, otherwise=1.0), 1)
        return jnp.where(jnp.isfinite(norm), jnp.where(limited, shrink, 1), 0).astype(last.dtype)

    def kept(norm: Array, shrink: Array, last: Array) -> Array:
        return jnp.where(jnp.isfinite(norm), norm * shrink, last).astype(last.dtype)

    def scale(u: Array, shrink: Array) -> Array:
        return jnp.where(shrink > 0, u * shrink.astype(u.dtype), 0)  # 0 * nan is nan

    def init(params: PyTree) -> LimitNormGrowthState:
        if per_leaf:
            unseen = jax.tree.map(lambda _: jnp.zeros((), bool), params)
            return LimitNormGrowthState(scalars_like(params), unseen)
        dtype = compute_dtype(jnp.float32, *jax.tree.leaves(params))
        return LimitNormGrowthState(jnp.zeros((), dtype), jnp.zeros((), bool))

    def update(
        updates: PyTree, state: LimitNormGrowthState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, LimitNormGrowthState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        norms = jax.tree.map(safe_norm, widen(updates)) if per_leaf else tree_norm(updates)
        check_match(norms, state.norm, what="gradient", like="the state")
        factors = jax.tree.map(factor, norms, state.norm, state.seen)
        state = LimitNormGrowthState(
            norm=jax.tree.map(kept, norms, factors, state.norm),
            seen=jax.tree.map(lambda norm, seen: seen | jnp.isfinite(norm), norms, state.seen),
        )
        if not per_leaf:
            factors = jax.tree.map(lambda _: factors, updates)
        return map_leaves(scale, updates, reads=(factors,)), state

    return transformation(init, update)


RECORD = Method(
    factory=limit_norm_growth,
    kind="piece",
    summary="let the norm of a leaf's update grow by 1% a step at most",
    traced=("gamma", "eps"),
    static=("per_leaf", "reset_on_zero"),
    position="any",
    communication="reduce",
    response="proportional",  # the first update passes as it is
    state_bytes=0,
    moved_bytes=12,
    paper='Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank '
    'Constraint?", 2024, arXiv 2410.01623',
    reference="xichen-fy/Fira@5c28b13:optimizer_torch/fira_adamw.py",
    licence="Apache-2.0",
)
