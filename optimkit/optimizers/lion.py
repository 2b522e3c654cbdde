"""Lion, EvoLved Sign Momentum."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.lion import scale_by_lion


def lion(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    mu_dtype: Any = None,
) -> GradientTransformation:
    r"""Steps by the sign of a mix of momentum and gradient; one buffer, decoupled decay.

    .. math::

        c_t &= b_1 m_{t-1} + (1-b_1) g_t, \qquad m_t = b_2 m_{t-1} + (1-b_2) g_t \\
        w_t &= w_{t-1} - \eta\,(\operatorname{sign}(c_t) + \lambda w_{t-1})

    Every entry moves by exactly the rate, so weight decay bounds the weights: |w| <= 1/lambda.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. The authors take 3 to 10
        times less than for AdamW, and a decay 3 to 10 times larger.
      b1: weight of the momentum in the step, in [0, 1]; 0.95 for language models.
      b2: decay of the momentum, in (0, 1); 0.98 for language models.
      weight_decay: decoupled decay, times the rate. The default 0 is the authors';
        ``optax.lion`` has 1e-3.
      mask: which leaves are decayed (True = decayed); default all.
      mu_dtype: dtype of the momentum; default f32.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter (AdamW: 8).

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    An isolated spike of 300 times the usual gradient rules the sign for 328 steps at the default
    decays: put a clip in front. A zero gradient with zero momentum moves nothing.

    >>> import jax.numpy as jnp, optax
    >>> tx = lion(0.01)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([0.5, -2.0]), tx.init(params), params)
    >>> optax.apply_updates(params, updates).tolist()
    [0.9900000095367432, 1.0099999904632568]

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675.
    Agrees with the authors' PyTorch code to rounding (goldens ``lion__*``).
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return recipe(
        scale_by_lion(b1, b2, mu_dtype=mu_dtype),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


RECORD = Method(
    factory=lion,
    kind="recipe",
    summary="sign momentum with decoupled decay",
    example={"learning_rate": 1e-3, "weight_decay": 0.1},
    traced=("learning_rate", "b1", "b2", "weight_decay"),
    static=("mask", "mu_dtype"),
    needs=("params",),
    position="alone",
    communication="none",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    paper='Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675',
    reference="google/automl@6a54c8741e7c3265d4547c4f35f47a0391122dc5:lion/lion_pytorch.py",
    licence="Apache-2.0",
)
