"""LAMB: Adam with decay, each leaf's step in proportion to its weights."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.trust_ratio import scale_to_weight_norm


def lamb(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    bias_correction: bool = True,
    max_weight_norm: Any = None,
) -> GradientTransformation:
    r"""AdamW's direction, as long as the weights it moves: for very large batches.

    .. math::

        u = \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda w, \qquad
        w \leftarrow w - \eta\, \frac{\min(\|w\|, c)}{\|u\|}\, u

    with m and v as in Adam, and norms of one leaf at a time.

    Args:
      learning_rate: step size relative to the weights, or a schedule over the 0-based count.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      weight_decay: lambda, >= 0.
      mask: which leaves are decayed (True = decayed); default all.
      bias_correction: correct both moments for their start, as NVIDIA's FusedLAMB and
        ``optax.lamb`` do; False: :math:`\hat m = m, \hat v = v`, as in the original BERT code.
      max_weight_norm: c, > 0; 10 in that code. None: no limit.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    A leaf that is zero, or whose direction is, takes Adam's own step. FusedLAMB also clips the
    gradient's global norm to 1: put ``optax.clip_by_global_norm(1.0)`` in front.

    >>> import jax.numpy as jnp
    >>> tx = lamb(0.1)
    >>> w = jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(jnp.array([7.0, 0.0]), tx.init(w), w)
    >>> [round(float(u), 3) for u in updates]  # a tenth of the norm 5
    [-0.5, -0.0]

    Reference: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes", ICLR 2020, arXiv 1904.00962.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return recipe(
        scale_by_adam(b1, b2, eps, bias_correction=bias_correction),
        decayed_weights(weight_decay, mask),
        scale_to_weight_norm(max_weight_norm),
        optax.scale_by_learning_rate(learning_rate),
    )


RECORD = Method(
    factory=lamb,
    kind="recipe",
    summary="AdamW's direction, as long as the weights of its leaf",
    example={"learning_rate": 1e-2, "weight_decay": 0.1, "max_weight_norm": 10.0},
    traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "max_weight_norm"),
    static=("mask", "bias_correction"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=8,
    moved_bytes=36,
    paper='You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", '
    "ICLR 2020, arXiv 1904.00962",
    reference="Mohammad-Mozaffari/mkor@3a0e3bb2df:examples/bert/optimizers/lamb.py:LAMBOptimizer",
    licence="Apache-2.0",
)
