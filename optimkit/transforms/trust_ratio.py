"""Steps in proportion to the parameters: LAMB's trust ratio."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, map_leaves, require_params
from optimkit.numerics import check_range, safe_div, safe_norm
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


def scale_to_weight_norm(max_weight_norm: Any = None) -> GradientTransformation:
    r"""Gives each leaf's update the norm of its parameter.

    .. math:: u \leftarrow \frac{\min(\|w\|, c)}{\|u\|}\, u

    Args:
      max_weight_norm: c, > 0; the authors of BERT's LAMB have 10. None: no limit.

    Returns:
      A transformation without state that needs ``params``. A leaf whose parameter or update is zero
      passes as it is.

    Raises:
      ValueError: if an argument is out of range, ``params`` are missing, or a gradient has another
        shape.

    Differs from ``optax.scale_by_trust_ratio`` by the limit, and in that no norm overflows.

    >>> import jax.numpy as jnp
    >>> tx = scale_to_weight_norm(10.0)
    >>> w = jnp.array([30.0, 40.0])
    >>> tx.update(jnp.array([2.0, 0.0]), tx.init(w), w)[0].tolist()  # of norm 50, held at 10
    [10.0, 0.0]

    Reference: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes", ICLR 2020, arXiv 1904.00962.
    """
    check_range(max_weight_norm=max_weight_norm, gt=0)

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        params = require_params(params, "scale_to_weight_norm")
        check_match(updates, params, what="gradient", like="the parameters")

        def step(u: Array, w: Array) -> Array:
            wanted = safe_norm(w)
            if max_weight_norm is not None:
                wanted = jnp.minimum(wanted, max_weight_norm)
            ratio = safe_div(wanted, safe_norm(u), 1.0)
            return jnp.where(wanted == 0, 1, ratio) * u

        return map_leaves(step, updates, reads=(params,)), state

    return transformation(init, update)


RECORD = Method(
    factory=scale_to_weight_norm,
    kind="piece",
    summary="the trust ratio of LAMB and LARS: each update as long as its parameter",
    example={"max_weight_norm": 10.0},
    traced=("max_weight_norm",),
    needs=("params",),
    position="middle",
    communication="reduce",
    response="bounded",
    state_bytes=0,
    moved_bytes=12,
    paper='You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", '
    "ICLR 2020, arXiv 1904.00962",
    reference="Mohammad-Mozaffari/mkor@3a0e3bb2df:examples/bert/optimizers/lamb.py",
    licence="Apache-2.0",
)
