"""Sign constraints: the last link after which no weight has changed its sign."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, map_leaves, recipe, require_params
from optimkit.numerics import check_range
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.exponentiate_updates import Limits, limits_like


def keep_signs(*, threshold: Any = 1e-18) -> GradientTransformation:
    r"""Stops every weight that would change its sign just before zero.

    .. math::

        w + u \leftarrow \operatorname{sign}(w)\,\tau
        \quad\text{where}\quad \operatorname{sign}(w)\,(w + u) \le 0

    Behind any optimizer it keeps positive weights positive and negative ones negative (Dale's law),
    by projection; ``exponentiate_updates`` does so by multiplication.

    Args:
      threshold: tau, where a stopped weight waits, >= 0; the authors' value.

    Returns:
      A transformation without state for the very end of a chain, after the rate and the sign; it
      needs ``params``.

    Raises:
      ValueError: if an argument is out of range, params are missing, or a gradient has another
        shape.

    A stopped weight keeps its sign for the next step to see, so it must not round to zero, and the
    sum w + u cannot come closer to zero than the weight's precision allows: f32 gets from 1 to
    1e-7, from there to 1e-14, then to 1e-18. A weight that lands on zero counts as crossing, where
    the authors' code lets it go on with any sign. A weight that is exactly zero has no sign and is
    free for that step, as it is there. NaN passes.

    >>> import jax.numpy as jnp
    >>> tx = keep_signs(threshold=0.25)
    >>> w = jnp.array([1.0, -1.0, 0.0])
    >>> u, _ = tx.update(jnp.array([-3.0, 0.5, -3.0]), tx.init(w), w)
    >>> (w + u).tolist()
    [0.25, -0.5, -3.0]

    Reference: Cornford et al., "Brain-like learning with exponentiated gradients", 2024,
    bioRxiv 10.1101/2024.10.25.620272.
    """
    check_range(threshold=threshold, ge=0)

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        params = require_params(params, "keep_signs")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")

        def step(u: Array, w: Array, limits: Limits) -> Array:
            sign, nearest = jnp.sign(w), limits.eps * jnp.abs(w)
            stop = jnp.maximum(jnp.maximum(threshold, nearest), limits.smallest).astype(u.dtype)
            crossed = (sign * (w + u) <= nearest) & (sign != 0)
            return jnp.where(crossed, sign * stop - w, u)

        return map_leaves(step, updates, reads=(params, limits_like(updates, params))), state

    return transformation(init, update)


def sign_preserving(
    last: GradientTransformation, *links: optax.GradientTransformation
) -> GradientTransformation:
    """A recipe that ends in ``last``, which sees the parameters in their own dtype.

    The other links compute in f32 or better, as in ``recipe``, but what keeps signs must know the
    dtype in which the weights are stored: one that rounds to zero there has lost its sign for good.

    Args:
      last: ``keep_signs`` or ``exponentiate_updates``, without state of its own.
      *links: gradient transformations, applied in order; the last of them applies the rate.
    """
    return recipe(*links, last=last)


RECORD = Method(
    factory=keep_signs,
    kind="piece",
    summary="stop weights that would change their sign just before zero",
    traced=("threshold",),
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
