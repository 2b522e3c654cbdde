"""Gradient spikes on purpose: now and then the whole gradient of an array is far too large."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class SpikeState(NamedTuple):
    """``count``: updates made."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride] - optax's states call it so


def _spiked(seed: int, step: Any, leaves: int, rate: float) -> jax.Array:
    """Which of the leaves have a spike in this update; it depends on nothing else."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(lambda leaf: jax.random.fold_in(key, leaf))(jnp.arange(leaves))
    return jax.vmap(lambda k: jax.random.bernoulli(k, rate))(keys)


def spike_steps(seed: int, steps: int, leaves: int, rate: float = 0.02) -> np.ndarray:
    """The spikes of a run, bool ``(steps, leaves)``, leaves in the order of ``jax.tree.leaves``."""
    table = jax.vmap(lambda step: _spiked(seed, step, leaves, rate))
    return np.asarray(table(jnp.arange(steps)))


def spike_gradients(
    rate: float = 0.02, factor: float = 1000.0, seed: int = 0
) -> optax.GradientTransformation:
    """Multiplies the whole gradient of each leaf by ``factor`` in a share ``rate`` of the updates.

    Put it in front of an optimizer with ``optax.chain``. Every leaf is drawn for itself, from the
    seed, the count and its number alone, so that all optimizers see the same spikes.

    Args:
      rate: probability of a spike for each leaf and update, in [0, 1].
      factor: what a spike multiplies by, > 0.
      seed: chooses the spikes.

    Raises:
      ValueError: if an argument is out of range.
    """
    if not 0 <= rate <= 1 or not factor > 0:
        raise ValueError(f"rate must be in [0, 1] and factor above 0, got {rate} and {factor}")

    def init(params: Any) -> SpikeState:
        del params
        return SpikeState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SpikeState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        scale = jnp.where(_spiked(seed, state.count, len(leaves), rate), factor, 1.0)
        leaves = [g * scale[number].astype(g.dtype) for number, g in enumerate(leaves)]
        count = optax.safe_increment(state.count)
        return jax.tree.unflatten(structure, leaves), SpikeState(count)

    return optax.GradientTransformation(init, update)
