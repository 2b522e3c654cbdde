"""Adam's bias correction as a link of its own, for moments that were left uncorrected."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import check_match, map_leaves, zero_count
from optimkit.numerics import check_range, next_count, one_minus_power
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class ScaleByBiasCorrectionState(NamedTuple):
    """``count``: int32 scalar."""

    count: Array


def scale_by_bias_correction(b1: Any = 0.9, b2: Any = 0.999) -> GradientTransformation:
    r"""Multiplies updates by the factor that corrects Adam's moments for their start at zero.

    .. math:: u \leftarrow \frac{\sqrt{1-b_2^t}}{1-b_1^t}\, u, \qquad t = 1, 2, \ldots

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).

    Returns:
      A transformation whose state is one int32.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    After ``scale_by_adam(bias_correction=False)`` it gives
    ``scale_by_adam(eps_form="before_bias_correction")``. Fira and APOLLO put a limit on the norm
    between the two. At b1 = 0.9 and b2 = 0.999 the factor is 0.32 at the first step, 0.15 at the
    tenth, and 1 after some thousands.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_bias_correction(0.5, 0.75)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(2):  # 0.5 / 0.5, then sqrt(7/16) / (3/4)
    ...     u, state = tx.update(jnp.ones(1), state)
    ...     print(round(float(u[0]), 3))
    1.0
    0.882

    Reference: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv 1412.6980.
    """
    check_range(b1=b1, b2=b2, ge=0, lt=1)

    def init(params: PyTree) -> ScaleByBiasCorrectionState:
        del params
        return ScaleByBiasCorrectionState(zero_count())

    def update(
        updates: PyTree,
        state: ScaleByBiasCorrectionState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByBiasCorrectionState]:
        del extra
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        count = next_count(state.count)
        factor = jnp.sqrt(one_minus_power(b2, count)) / one_minus_power(b1, count)

        def step(u: Array) -> Array:
            return u * factor.astype(u.dtype)

        return map_leaves(step, updates), ScaleByBiasCorrectionState(count)

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_bias_correction,
    kind="piece",
    summary="Adam's bias correction as a link of its own",
    traced=("b1", "b2"),
    position="middle",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv 1412.6980',
    reference="xichen-fy/Fira@5c28b13:optimizer_torch/fira_adamw.py",
    licence="Apache-2.0",
)
