"""Which old task to rehearse next: the longer it has rested, the less likely."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.numerics import check_choice, check_count, check_range, compute_dtype
from optimkit.protocols import Array


def rehearsal_probabilities(
    time_since_last: Array, *, exponent: Any, kind: Literal["power", "exponential"] = "power"
) -> Array:
    r"""How often each task should come, by how long ago it last did.

    .. math:: p_i \propto (1 + \Delta t_i)^{-\lambda} \text{ (power)}, \qquad
        e^{-\lambda \Delta t_i} \text{ (exponential)}

    Args:
      time_since_last: time since each task last came, (tasks,), >= 0; 0 for the current task, inf
        for one that has not come yet and gets probability 0 (if none has come, all are alike).
      exponent: lambda, >= 0; 0 makes all tasks equally likely.
      kind: a power law, as people meet old tasks again, or an exponential for comparison.

    Returns:
      Probabilities, (tasks,).

    Raises:
      ValueError: without a task, or if an argument is out of range.

    Provisional: the offset of 1 and the unit of time are our reading.

    >>> p = rehearsal_probabilities(jnp.array([0.0, 1.0, 3.0]), exponent=1.0)
    >>> [round(float(x), 3) for x in p]  # as 1 to 1/2 to 1/4
    [0.571, 0.286, 0.143]

    Reference: Gandhi et al., "Natural Mitigation of Catastrophic Interference: Continual Learning
    in Power-Law Learning Environments", 2024, arXiv 2401.10393.
    """
    return jnp.exp(_log_probabilities(time_since_last, exponent, kind))


def _log_probabilities(time_since_last: Array, exponent: Any, kind: str) -> Array:
    check_choice(("power", "exponential"), kind=kind)
    check_range(exponent=exponent, ge=0, lt=np.inf)
    check_range(time_since_last=time_since_last, ge=0)
    if np.ndim(time_since_last) != 1 or np.shape(time_since_last)[0] == 0:
        raise ValueError(
            "time_since_last must be a vector with one time a task, at least one, got shape "
            f"{np.shape(time_since_last)}"
        )
    time = jnp.asarray(time_since_last, compute_dtype(time_since_last))
    has_come = jnp.isfinite(time)
    time = jnp.where(has_come, time, 0)
    aged = jnp.log1p(time) if kind == "power" else time
    logits = -jnp.asarray(exponent, time.dtype) * aged
    return jax.nn.log_softmax(jnp.where(has_come | ~jnp.any(has_come), logits, -jnp.inf))


def power_law_sampler(
    time_since_last: Array,
    *,
    exponent: Any,
    key: Array,
    size: int,
    kind: Literal["power", "exponential"] = "power",
) -> Array:
    """Draws tasks for a batch with ``rehearsal_probabilities``.

    Args:
      time_since_last: as there; the current task, at 0, is drawn most often.
      exponent: as there.
      key: a random key.
      size: number of draws, >= 1.
      kind: as there.

    Returns:
      int32 indices of tasks, (size,).

    Raises:
      ValueError: without a task, or if an argument is out of range.

    Provisional, as the probabilities are.

    >>> rested, key = jnp.array([0.0, 1e6]), jax.random.key(0)
    >>> power_law_sampler(rested, exponent=9.0, key=key, size=3).tolist()
    [0, 0, 0]
    """
    check_count(least=1, size=size)
    logits = _log_probabilities(time_since_last, exponent, kind)
    return jax.random.categorical(key, logits, shape=(size,)).astype(jnp.int32)
