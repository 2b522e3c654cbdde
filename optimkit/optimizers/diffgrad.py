"""diffGrad: Adam with friction, entry by entry, where the gradient has hardly changed."""

from __future__ import annotations

from typing import Any, Literal

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.diffgrad import Friction, scale_by_diffgrad


def diffgrad(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    decoupled: bool = False,
    friction: Friction | Literal["normalized"] = "sigmoid_abs",
) -> GradientTransformation:
    r"""Adam whose step is multiplied by the sigmoid of the gradient's change.

    .. math::

        g_t &\leftarrow g_t + \lambda w_{t-1} \\
        m_t &= b_1 m_{t-1} + (1-b_1)\, g_t, \qquad v_t = b_2 v_{t-1} + (1-b_2)\, g_t^2, \qquad
            \xi_t = \frac{1}{1 + e^{-|g_{t-1} - g_t|}} \\
        w_t &= w_{t-1} - \eta\, \frac{\sqrt{1-b_2^t}}{1-b_1^t} \cdot
            \frac{\xi_t m_t}{\sqrt{v_t} + \epsilon}

    In the first step the old gradient is zero.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. The authors' code has 1e-3.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the uncorrected root, >= 0.
      weight_decay: lambda; added to the gradient, as above and in the authors' code.
      mask: which leaves are decayed (True = decayed); default all.
      decoupled: decay the weights instead, times the rate, as AdamW does: for methods of Adam's
        kind the better choice.
      friction: the coefficient; see ``scale_by_diffgrad``. ``"sigmoid_abs"`` is the paper's.

    Returns:
      An optimizer that needs ``params``; 12 bytes of state a f32 parameter (AdamW: 8).

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The change is compared with 1, so the scale of the loss decides what this method is: with
    gradients below 0.1, usual in large models, the coefficient is 0.5 to 0.525 and the method Adam
    at half the rate; with gradients of 10 it is 1 and the method Adam. Compare with both. The
    coefficient does not dampen a spike: it is 1 at the spike and in the step after.

    The authors' first file compared each gradient with itself, which halves Adam's rate; they call
    it wrong, and this is their second.

    >>> import jax.numpy as jnp, optax
    >>> tx = diffgrad(0.1)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([0.01, -20.0]), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]
    [0.95, 1.1]

    Reference: Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks",
    IEEE TNNLS 2020, arXiv 1909.11015. Agrees with the authors' code to rounding (goldens
    ``diffgrad__*``).
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    direction = scale_by_diffgrad(b1, b2, eps, friction)
    decay = decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)
    return recipe(direction, decay, rate) if decoupled else recipe(decay, direction, rate)


RECORD = Method(
    factory=diffgrad,
    kind="recipe",
    summary="Adam with friction where the gradient has hardly changed",
    example={"learning_rate": 1e-3, "weight_decay": 0.1, "decoupled": True},
    traced=("learning_rate", "b1", "b2", "eps", "weight_decay"),
    static=("mask", "decoupled", "friction"),
    needs=("params",),
    position="alone",
    communication="none",
    response="bounded",
    state_bytes=12,
    moved_bytes=36,
    paper='Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks", '
    "IEEE TNNLS 2020, arXiv 1909.11015",
    reference="shivram1987/diffGrad@73233ba4708701cf552bcecb1f065d46d2d77164:diffGrad_v2.py:"
    "diffgrad",
    licence="MIT",
)
