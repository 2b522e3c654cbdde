"""Proximal weight decay: the step first, then a division of what it has made."""

from __future__ import annotations

from typing import Any

from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.decay_after_step import shrink_parameters


def apply_proximal_decay(
    learning_rate: ScalarOrSchedule, weight_decay: Any, mask: Mask = None
) -> GradientTransformation:
    r"""Divides the parameters that the step has made by 1 + rate * decay.

    .. math:: w_t = \frac{w_{t-1} + u_t}{1 + \eta\lambda}, \quad\text{that is}\quad
        u_t \leftarrow \frac{u_t - \eta\lambda\, w_{t-1}}{1 + \eta\lambda}

    This is the exact minimum of the step's quadratic model plus :math:`\lambda |w|^2/2`, so no
    product of rate and decay, however large, turns a weight round. For small ones it is
    ``decay_after_step`` to second order.

    Args:
      learning_rate: eta, a number or a schedule over the 0-based count: the one that the link
        before has applied.
      weight_decay: lambda, >= 0.
      mask: which leaves are decayed (True = decayed), a tree of bools, a prefix of one, or a
        function of the parameters; default all.

    Returns:
      A transformation for the end of a chain, after the rate and the sign. It needs ``params``;
      its state is one int32.

    Raises:
      ValueError: if an argument is out of range, params are missing, or a gradient has another
        shape.

    >>> import jax.numpy as jnp
    >>> tx = apply_proximal_decay(0.5, 0.5)
    >>> w = jnp.array([1.0])
    >>> u, _ = tx.update(jnp.array([-0.5]), tx.init(w), w)
    >>> [round(float(x), 3) for x in w + u]  # (1 - 0.5) / 1.25
    [0.4]

    Reference: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models", 2022, arXiv 2208.06677.
    """
    return shrink_parameters(
        lambda u, w, shrink: (u - shrink * w) / (1 + shrink),
        weight_decay,
        learning_rate,
        mask,
        who="apply_proximal_decay",
    )


RECORD = Method(
    factory=apply_proximal_decay,
    kind="piece",
    summary="weight decay by division of the new parameters",
    example={"learning_rate": 0.01, "weight_decay": 0.1},
    traced=("learning_rate", "weight_decay"),
    static=("mask",),
    needs=("params",),
    position="last",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep '
    'Models", 2022, arXiv 2208.06677',
    reference="sail-sg/Adan@2c65beaf400775753b155da4082c3819fea689b9:adan.py:Adan",
    licence="Apache-2.0",
)
