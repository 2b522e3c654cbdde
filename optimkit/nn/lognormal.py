"""Initial weights for sign-preserving training: log-normal magnitudes with random signs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.numerics import check_choice, check_range, compute_dtype
from optimkit.protocols import Array

MODES = ("fan_in", "fan_out", "fan_avg")


def lognormal_signed_init(
    gain: float = 1.0,
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in",
    mean_std_ratio: float = 1.5,
    *,
    in_axis: int | tuple[int, ...] = -2,
    out_axis: int | tuple[int, ...] = -1,
) -> Callable[..., Array]:
    r"""Draws weights of either sign, equally often, whose magnitudes are log-normal.

    The variance is :math:`\text{gain}^2 / \text{fan}`; the magnitudes have mean
    :math:`r` times their standard deviation. No weight is zero, where a multiplicative optimizer
    such as ``exponentiated_gradient`` could never move it.

    Args:
      gain: standard deviation of a weight times the root of its fan, > 0.
      mode: which fan: ``"fan_in"``, ``"fan_out"`` or ``"fan_avg"``. The authors take ``"fan_out"``
        for recurrent kernels.
      mean_std_ratio: r, > 0: mean over standard deviation of the magnitudes; 1.5 in the authors'
        final runs. The smaller, the heavier the tail.
      in_axis: axis or axes of the inputs, as in ``jax.nn.initializers``.
      out_axis: axis or axes of the outputs. All others count as receptive field.

    Returns:
      An initializer ``(key, shape, dtype) -> array`` for Flax's ``kernel_init``.

    Raises:
      ValueError: if an argument is out of range.

    >>> import jax, jax.numpy as jnp
    >>> w = lognormal_signed_init()(jax.random.key(0), (64, 1000))
    >>> abs(float(jnp.std(w)) * 8 - 1) < 0.02, abs(float(jnp.mean(w > 0)) - 0.5) < 0.01
    (True, True)

    Reference: Cornford et al., "Brain-like learning with exponentiated gradients", 2024,
    bioRxiv 10.1101/2024.10.25.620272; the authors' ``lognormal_``.
    """
    check_range(gain=gain, mean_std_ratio=mean_std_ratio, gt=0)
    check_choice(MODES, mode=mode)

    def axes(axis: int | tuple[int, ...], rank: int) -> set[int]:
        given = (axis,) if isinstance(axis, int) else axis
        if any(not -rank <= a < rank for a in given):
            raise ValueError(f"axis {axis} does not exist in a shape of rank {rank}")
        return {a % rank for a in given}

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> Array:
        rank = len(shape)
        inputs, outputs = axes(in_axis, rank), axes(out_axis, rank)
        field = math.prod(n for a, n in enumerate(shape) if a not in inputs | outputs)
        fan_in = field * math.prod(shape[a] for a in inputs)
        fan_out = field * math.prod(shape[a] for a in outputs)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        # The signs turn the magnitudes' mean m and deviation s into a variance of m^2 + s^2.
        deviation = gain / math.sqrt(max(fan, 1)) / math.sqrt(1 + mean_std_ratio**2)
        width = math.sqrt(math.log1p(1 / mean_std_ratio**2))
        centre = math.log(deviation * mean_std_ratio) - width**2 / 2
        magnitude, sign = jax.random.split(key)
        wide = compute_dtype(jnp.zeros((), dtype))
        drawn = jnp.exp(centre + width * jax.random.normal(magnitude, shape, wide))
        return (drawn * jax.random.rademacher(sign, shape, wide)).astype(dtype)

    return init
