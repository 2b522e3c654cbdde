"""Exponentiated gradients: the last link that turns an additive step into a multiplicative one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, map_leaves, require_params
from optimkit.numerics import check_range, compute_dtype
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


def exponentiate_updates(
    *, signed: bool = True, max_log_step: Any = None
) -> GradientTransformation:
    r"""Multiplies every weight by the exponential of its update, so that no sign ever changes.

    .. math::

        w \leftarrow w \exp(\operatorname{sign}(w)\, u), \quad\text{that is}\quad
        u \leftarrow w\,(\exp(\operatorname{sign}(w)\, u) - 1)

    Behind any optimizer it keeps positive weights positive and negative ones negative (Dale's law).
    Large weights move more than small ones, weights become log-normal, and zero stays zero.

    Args:
      signed: the rule above, which descends for weights of both signs. False is the authors'
        ablation, w exp(u), which climbs for negative weights.
      max_log_step: largest |u| that goes into the exponential, > 0; ours. None: no limit, as the
        authors have it, who clip gradients to a global norm of 2 instead.

    Returns:
      A transformation without state for the very end of a chain, after the rate and the sign; it
      needs ``params``.

    Raises:
      ValueError: if an argument is out of range, params are missing, or a gradient has another
        shape.

    Weights that are zero stay so for ever: give biases and fresh norm offsets to another optimizer.
    A decay of the weights is no part of u. A step is limited where the result would overflow, and
    where the weight would round to zero, from which it could not come back; neither changes a step
    that its dtype can hold. In bfloat16 a step of less than 2^-8 of the weight is lost: keep
    f32 master weights. NaN passes.

    >>> import jax.numpy as jnp
    >>> tx = exponentiate_updates()
    >>> w = jnp.array([1.0, -1.0, 0.0])
    >>> u, _ = tx.update(jnp.log(jnp.array([2.0, 2.0, 2.0])), tx.init(w), w)
    >>> [round(float(x), 3) for x in w + u]
    [2.0, -0.5, 0.0]

    Reference: Cornford et al., "Brain-like learning with exponentiated gradients", 2024,
    bioRxiv 10.1101/2024.10.25.620272.
    """
    check_range(max_log_step=max_log_step, gt=0)

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        params = require_params(params, "exponentiate_updates")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")

        def step(u: Array, w: Array, limits: Limits) -> Array:
            exponent = jnp.sign(w) * u if signed else u
            if max_log_step is not None:
                exponent = jnp.clip(exponent, -max_log_step, max_log_step)
            return growth(w, exponent, limits)

        return map_leaves(step, updates, reads=(params, limits_like(updates, params))), state

    return transformation(init, update)


class Limits(NamedTuple):
    """``eps``: relative precision. ``smallest``, ``largest``: of weights that are safe to reach."""

    eps: float
    smallest: float
    largest: float


def limits_like(updates: PyTree, params: PyTree) -> PyTree:
    """What the dtypes of each update and its weight, which may be wider or narrower, can hold."""

    def of_leaf(*arrays: Array) -> Limits:
        infos = [jnp.finfo(jnp.result_type(x)) for x in arrays]
        # Subnormal numbers of the dtype to compute in may be flushed to zero; those of a narrower
        # dtype are normal there.
        normal = float(jnp.finfo(compute_dtype(*arrays)).tiny)
        return Limits(
            eps=max(float(info.eps) for info in infos),
            smallest=max(normal, *(float(info.smallest_subnormal) for info in infos)),
            largest=min(float(info.max) for info in infos) / 2,
        )

    return jax.tree.map(of_leaf, updates, params)


def growth(w: Array, exponent: Array, limits: Limits) -> Array:
    """``w exp(exponent) - w``, finite for every finite exponent, and short of ``-w``."""
    size = jnp.abs(w)
    highest = math.log(float(jnp.finfo(w.dtype).max) / 2)
    grown = size * expm1(jnp.clip(exponent, math.log(limits.eps), highest))
    # A weight at or below the smallest does not shrink.
    grown = jnp.maximum(grown, jnp.minimum(limits.smallest - size, 0))
    return jnp.sign(w) * jnp.minimum(grown, limits.largest)


def expm1(x: Array) -> Array:
    """``exp(x) - 1`` for x in [-87, 88], to two units in the last place.

    In float32 by a polynomial that compilers vectorise: XLA's own takes twice as long as the memory
    traffic of a whole step on CPUs.

    >>> [round(float(expm1(jnp.float32(x))), 12) for x in (0.0, 1e-6, 0.6931472)]
    [0.0, 1e-06, 1.0]
    """
    if x.dtype != jnp.float32:
        return jnp.expm1(x)
    # x = k log 2 + r with |r| <= log(2) / 2, log 2 in two parts, the first exact in 16 bits.
    k = jnp.round(x * (1 / math.log(2)))
    r = (x - k * 0.693359375) - k * (math.log(2) - 0.693359375)
    tail: Any = 1 / 5040
    for factorial in (720, 120, 24, 6, 2):
        tail = tail * r + 1 / factorial
    power = jax.lax.bitcast_convert_type((k.astype(jnp.int32) + 127) << 23, jnp.float32)
    return power * (r + r * r * tail) + (power - 1)


RECORD = Method(
    factory=exponentiate_updates,
    kind="piece",
    summary="multiply weights by the exponential of the update",
    traced=("max_log_step",),
    static=("signed",),
    needs=("params",),
    position="last",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Cornford et al., "Brain-like learning with exponentiated gradients", 2024, '
    "bioRxiv 10.1101/2024.10.25.620272",
    reference="jhcornford/exponentiated-gradients@a9aa3f46940478f454f5b83fedeb68841313de3f:"
    "src/eg_utils.py",
    licence="MIT",
)
