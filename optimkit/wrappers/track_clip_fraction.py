"""Reports how much of a gradient a clip has clipped."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.tracked_max import clip_by_tracked_max


class TrackClipFractionState(NamedTuple):
    """``metrics``: ``clip_fraction``, a f32 scalar. ``inner_state``: state of the clip."""

    metrics: dict[str, Array]
    inner_state: PyTree


def track_clip_fraction(inner: optax.GradientTransformation) -> GradientTransformation:
    """Puts the fraction of entries that ``inner`` changed in the last step into the telemetry.

    Args:
      inner: a transformation that leaves alone what it does not clip, for example
        ``optax.clip(1.0)``, ``optax.clip_by_global_norm(1.0)`` (whose fraction is 0 or 1) or
        ``clip_by_tracked_max()``.

    Returns:
      A transformation that acts as ``inner`` does. ``state.metrics["clip_fraction"]`` is in
      [0, 1], and ``optimkit.diagnostics.metrics`` finds it; it is 0 for an empty tree.

    Raises:
      ValueError: for a gradient of another shape than the parameters, where those are given.
      TypeError: for complex or integer leaves.

    A NaN counts as changed. The count reads the gradient before and after the clip: 8 bytes a f32
    parameter where the compiler does not fuse it with the clip.

    >>> import optax
    >>> tx = track_clip_fraction(optax.clip(1.0))
    >>> updates, state = tx.update(jnp.array([0.5, -3.0]), tx.init(jnp.zeros(2)))
    >>> updates.tolist(), state.metrics["clip_fraction"].item()
    ([0.5, -1.0], 0.5)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> TrackClipFractionState:
        return TrackClipFractionState(
            {"clip_fraction": jnp.zeros((), jnp.float32)}, inner.init(params)
        )

    def update(
        updates: PyTree, state: TrackClipFractionState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, TrackClipFractionState]:
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        clipped, inner_state = inner.update(updates, state.inner_state, params, **extra)

        def changed(before: Array, after: Array) -> Array:
            return jnp.sum(before != after, dtype=jnp.float32)

        counts = jax.tree.leaves(jax.tree.map(changed, updates, clipped))
        total = sum(leaf.size for leaf in jax.tree.leaves(updates))
        fraction = sum(counts, start=jnp.zeros((), jnp.float32)) / max(1, total)
        return clipped, TrackClipFractionState({"clip_fraction": fraction}, inner_state)

    return transformation(init, update)


RECORD = Method(
    factory=track_clip_fraction,
    kind="wrapper",
    summary="report the fraction of entries that a clip has changed",
    example_made={"inner": clip_by_tracked_max},
    static=("inner",),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    exempt={"fidelity": "made here: no other code to compare with"},
)
