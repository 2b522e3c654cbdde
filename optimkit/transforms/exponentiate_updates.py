"""Exponentiated gradients: the last link that turns an additive step into a multiplicative one."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, map_leaves, require_params
from optimkit.numerics import check_range
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
    A decay of the weights is no part of u. The exponent is limited where the result would overflow,
    and where the weight would round to zero, from which it could not come back; neither changes a
    step that its dtype can hold. In bfloat16 a step of less than 2^-8 of the weight is lost: keep
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

        def step(u: Array, w: Array, limits: dict[str, float]) -> Array:
            exponent = jnp.sign(w) * u if signed else u
            exponent = jnp.clip(exponent, limits["lowest"], math.log(limits["largest"]))
            if max_log_step is not None:
                exponent = jnp.clip(exponent, -max_log_step, max_log_step)
            return jnp.clip(w * jnp.expm1(exponent), -limits["largest"], limits["largest"])

        return map_leaves(step, updates, reads=(params, jax.tree.map(_limits, updates))), state

    return transformation(init, update)


def _limits(update: Array) -> dict[str, float]:
    """What the dtype of an update can hold beside its weight."""
    info = jnp.finfo(jnp.result_type(update))
    return {"largest": float(info.max) / 2, "lowest": math.log(float(info.eps))}


RECORD = Method(
    factory=exponentiate_updates,
    kind="piece",
    exempt={"fidelity": "its recordings come with the method exponentiated gradient, not here yet"},
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
