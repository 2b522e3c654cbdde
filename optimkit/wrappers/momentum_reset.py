"""Momentum reset: forget the moments every so many steps, then ramp the update up again."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.layout import path_parts
from optimkit.leaves import check_match, check_real, moment_paths, zero_count
from optimkit.numerics import as_float, check_choice, check_count, check_range, due, next_count
from optimkit.protocols import (
    COUNT_FIELDS,
    PARAMETER_FIELDS,
    Array,
    GradientTransformation,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam


class MomentumResetState(NamedTuple):
    """``count``: int32 scalar, never restarted. ``inner_state``: state of the wrapped one."""

    count: Array
    inner_state: PyTree


def reset_warmup_factor(step: Array, interval: int, warmup_steps: int, floor: Any = 0.01) -> Array:
    r"""The factor on the update at a 1-based step: 1 before the first reset, then a cosine ramp.

    With :math:`c = t \bmod D`: :math:`f = 1` if t < D or c >= N, else
    :math:`1 - (1 - f_0)\,(1 + \cos(\pi c/(N+1)))/2`. So :math:`f = f_0` at each reset step.

    >>> [round(float(reset_warmup_factor(t, interval=10, warmup_steps=4)), 3) for t in (9, 10, 12)]
    [1.0, 0.01, 0.352]
    """
    if interval == 0 or warmup_steps == 0:
        return jnp.ones((), jnp.float32)
    since = as_float(step % interval)
    ramp = 1 - (1 - floor) * (1 + jnp.cos(jnp.pi * since / (warmup_steps + 1))) / 2
    return jnp.where((step < interval) | (since >= warmup_steps), 1, ramp)


def _is_count(path: Any, siblings: set[tuple[Any, ...]]) -> bool:
    """Whether a state leaf is a step count, and not one that drives injected hyperparameters."""
    parts = path_parts(path)
    injected = "hyperparams_states" in parts or (*parts[:-1], "hyperparams") in siblings
    return parts[-1] in COUNT_FIELDS and not injected


def _reset_marks(inner: optax.GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """Per state leaf ``"moment"`` (float, a parameter's place and shape), ``"count"`` or ``""``."""

    def mark_of(where: str) -> str:
        return "moment" if where and PARAMETER_FIELDS.isdisjoint(where.split("/")) else ""

    marks = jax.tree.map(mark_of, moment_paths(inner.init, state, params))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    prefixes = {path_parts(path)[:end] for path in paths for end in range(1, len(path) + 1)}
    return jax.tree_util.tree_map_with_path(
        lambda path, mark: mark or ("count" if _is_count(path, prefixes) else ""), marks
    )


def momentum_reset(
    inner: optax.GradientTransformation,
    interval: int = 500,
    *,
    moments: Literal["before", "after"] = "before",
    counts: Literal["before", "after", "never"] = "before",
    warmup_steps: int = 0,
    warmup_floor: Any = 0.01,
) -> GradientTransformation:
    """Returns the inner moments to their initial value at every ``interval``-th step.

    A gradient spike stays in Adam's moments for a long time; forgetting them now and then limits
    the harm. What is reset: floating-point arrays of the inner state that stand in a parameter's
    place and have its shape, and step counts. What never is: copies of parameters such as ``z`` and
    averages, rates, injected hyperparameters and the counts that drive them, seeds, and statistics
    of whole leaves.

    Args:
      inner: any transformation; its state is searched, however deep.
      interval: D; steps D, 2D, ... (from 1) are reset steps. 0 switches resets off.
      moments: reset them before the inner update of a reset step, or after it. What is due after
        step D is carried out on entry to step D + 1: the state between the two still holds it.
      counts: the same for step counts, or never.
      warmup_steps: N; after a reset, multiply the updates by a cosine ramp over N steps (see
        ``reset_warmup_factor``). 0: no ramp.
      warmup_floor: the ramp's first factor, in [0, 1].

    Returns:
      A transformation whose state adds one int32. The inner one receives the un-reset 0-based
      count as the extra argument ``global_count``, for a schedule that must not restart.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Four published methods are this wrapper around an Adam core, by (moments, counts): SPAM is
    (before, never) with warm-up 150; Stable-SPAM's paper (before, before); its published code
    (after, before); weight refactorization (after, after).

    >>> import optax, jax.numpy as jnp
    >>> tx = momentum_reset(optax.trace(0.9), interval=3)
    >>> params = jnp.zeros(1); state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.ones(1), state, params)
    >>> updates.tolist()  # the third step starts anew
    [1.0]

    Reference: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
    ICLR 2025, arXiv 2501.06842.
    """
    check_count(interval=interval, warmup_steps=warmup_steps)
    check_choice(("before", "after"), moments=moments)
    check_choice(("before", "after", "never"), counts=counts)
    check_range(warmup_floor=warmup_floor, ge=0, le=1)
    inner = optax.with_extra_args_support(inner)
    when = {"moment": moments, "count": counts}

    def init(params: PyTree) -> MomentumResetState:
        return MomentumResetState(zero_count(), inner.init(params))

    def update(
        updates: PyTree,
        state: MomentumResetState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MomentumResetState]:
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        like = updates if params is None else params
        step = next_count(state.count)
        # What is due after step D is done on entry to step D + 1: the updates are the same, and
        # moments that an update used and that are then stored otherwise would cost a copy.
        now = {
            "before": due(step, interval),
            "after": due(state.count, interval) & (state.count > 0),
        }

        inner_state = state.inner_state
        if interval:
            # Fresh arrays cost nothing: they are constants that fuse into the selection.
            inner_state = jax.tree.map(
                lambda mark, new, old: (
                    jnp.where(now[when[mark]], new, old).astype(old.dtype)
                    if when.get(mark) in now
                    else old
                ),
                _reset_marks(inner, inner_state, like),
                inner.init(like),
                inner_state,
            )

        extra.setdefault("global_count", state.count)
        updates, inner_state = inner.update(updates, inner_state, params, **extra)
        if warmup_steps:
            factor = reset_warmup_factor(step, interval, warmup_steps, warmup_floor)
            updates = jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates)
        return updates, MomentumResetState(step, inner_state)

    return transformation(init, update)


RECORD = Method(
    factory=momentum_reset,
    kind="wrapper",
    summary="return the inner moments to their start every so many steps",
    example={"interval": 3, "warmup_steps": 2},
    example_made={"inner": scale_by_adam},
    traced=("warmup_floor",),
    static=("inner", "interval", "moments", "counts", "warmup_steps"),
    position="any",
    communication="none",
    response="bounded",
    state_bytes=8,
    moved_bytes=28,
    paper='Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", '
    "ICLR 2025, arXiv 2501.06842",
    reference="TianjinYellow/SPAM-Optimizer@e8185fbe695fdc449953b4a1f96121df5bf0d268:"
    "galore_torch/SPAM.py:AdamW",
    licence="",
)
