"""Decoupled weight decay on the new parameters: the step first, then the shrinking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optimkit.leaves import check_match, decay_tree, map_leaves, require_params, zero_count
from optimkit.numerics import check_range, next_count
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Mask,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)


class DecayAfterStepState(NamedTuple):
    """``count``: int32 scalar, for a rate that is a schedule."""

    count: Array


def decay_after_step(
    weight_decay: Any, learning_rate: ScalarOrSchedule, mask: Mask = None
) -> GradientTransformation:
    r"""Decays the parameters that the step has made, not those it started from.

    .. math:: w_t = (w_{t-1} + u_t)(1 - \eta\lambda), \quad\text{that is}\quad
        u_t \leftarrow u_t (1 - \eta\lambda) - \eta\lambda\, w_{t-1}

    Hugging Face's AdamW and SPAM decay in this order. ``optax.add_decayed_weights`` before the
    rate decays :math:`w_{t-1}` only; the two differ by :math:`\eta\lambda u_t`.

    Args:
      weight_decay: lambda, >= 0.
      learning_rate: eta, a number or a schedule over the 0-based count: the one that the link
        before has applied.
      mask: which leaves are decayed (True = decayed), a tree of bools, a prefix of one, or a
        function of the parameters; default all.

    Returns:
      A transformation for the end of a chain, after the rate and the sign. It needs ``params``;
      its state is one int32.

    Raises:
      ValueError: if an argument is out of range, params are missing, or a gradient has another
        shape.

    >>> import jax.numpy as jnp
    >>> tx = decay_after_step(0.5, 0.1)
    >>> w = jnp.array([1.0])
    >>> u, _ = tx.update(jnp.array([-0.2]), tx.init(w), w)
    >>> [round(float(x), 3) for x in w + u]  # (1 - 0.2) * (1 - 0.05)
    [0.76]
    """
    return shrink_parameters(
        lambda u, w, shrink: u * (1 - shrink) - shrink * w,
        weight_decay,
        learning_rate,
        mask,
        who="decay_after_step",
    )


def shrink_parameters(
    step: Callable[[Array, Array, Any], Array],
    weight_decay: Any,
    learning_rate: ScalarOrSchedule,
    mask: Mask,
    *,
    who: str,
) -> GradientTransformation:
    """A last link ``(u, w, shrink) -> u`` with rate times decay as ``shrink``, 0 where masked."""
    check_range(weight_decay=weight_decay, learning_rate=learning_rate, ge=0)

    def init(params: PyTree) -> DecayAfterStepState:
        del params
        return DecayAfterStepState(zero_count())

    def update(
        updates: PyTree,
        state: DecayAfterStepState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, DecayAfterStepState]:
        del extra
        params = require_params(params, who)
        check_match(updates, params, what="gradient", like="the parameters")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        shrink = jax.tree.map(
            lambda decayed: rate * weight_decay if decayed else 0.0, decay_tree(mask, params)
        )
        return map_leaves(step, updates, reads=(params, shrink)), DecayAfterStepState(
            next_count(state.count)
        )

    return transformation(init, update)


RECORD = Method(
    factory=decay_after_step,
    kind="piece",
    summary="decoupled weight decay on the new parameters",
    example={"weight_decay": 0.1, "learning_rate": 0.01},
    traced=("weight_decay", "learning_rate"),
    static=("mask",),
    needs=("params",),
    position="last",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, '
    "arXiv 1711.05101",
    reference="TianjinYellow/SPAM-Optimizer@e8185fbe695fdc449953b4a1f96121df5bf0d268:"
    "galore_torch/SPAM.py:AdamW",
    licence="",
)
