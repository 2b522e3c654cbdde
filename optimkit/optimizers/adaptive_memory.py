"""AM-SGD and AM-AdamW: optimizers with Adaptive Memory momentum."""

from __future__ import annotations

from typing import Any, Literal

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adaptive_memory import bias_corrected_rms, scale_by_adaptive_memory
from optimkit.transforms.decayed_weights import decayed_weights


def am_sgd(
    learning_rate: ScalarOrSchedule,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    lam: Any = 0.1,
    plane_gap: Literal["anchored", "zero", "value"] = "anchored",
    scope: Literal["global", "leaf"] = "global",
) -> GradientTransformation:
    r"""SGD with a momentum coefficient that a model of the loss gives anew at every step.

    With inner products over all leaves, and delta by ``plane_gap``:

    .. math::

        \beta &= \Bigl[\frac{\langle g + \lambda d,\; g - d\rangle + (1+\lambda)\,\delta}
            {\|g - d\|^2}\Bigr]_0^1, \qquad
        d \leftarrow \frac{\beta + \lambda}{1+\lambda}\, d + \frac{1-\beta}{1+\lambda}\, g \\
        w &\leftarrow w - \eta\,(d + \lambda_w w)

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      weight_decay: lambda_w, decoupled: times the rate.
      mask: which leaves are decayed (True = decayed); default all.
      lam: lambda, >= 0, the pull of the memory; 9 with beta = 0 would be an average with 0.9. The
        default 0.1 is ours, the paper's is not known to us.
      plane_gap: ``"anchored"``, ``"zero"`` or ``"value"``, see ``scale_by_adaptive_memory``; with
        ``"value"`` each update needs ``value=loss``. The default is ours.
      scope: one coefficient for the tree, or one a leaf.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Provisional: what is the paper's and what is inferred, and where the method fails, stands in
    ``scale_by_adaptive_memory``.

    >>> import jax.numpy as jnp, optax
    >>> tx = am_sgd(0.1, lam=0.0)
    >>> params = jnp.zeros(2); state = tx.init(params)
    >>> for g in ([1.0, 0.0], [0.0, 2.0]):
    ...     updates, state = tx.update(jnp.array(g), state, params)
    >>> [round(float(u), 3) for u in updates]  # beta is 0.6
    [-0.06, -0.08]

    Reference: Topollai and Choromanska, "Adaptive Memory Momentum via a Model-Based Framework for
    Deep Learning Optimization", AISTATS 2026, arXiv 2510.04988. No public code.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return recipe(
        scale_by_adaptive_memory(lam, plane_gap, scope, learning_rate=learning_rate),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def am_adamw(
    learning_rate: ScalarOrSchedule,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    lam: Any = 0.1,
    plane_gap: Literal["anchored", "zero", "value"] = "anchored",
    scope: Literal["global", "leaf"] = "global",
) -> GradientTransformation:
    r"""AdamW whose first moment has a coefficient that a model of the loss gives at every step.

    .. math::

        v &\leftarrow b_2 v + (1-b_2) g^2, \qquad P = \sqrt{v/(1-b_2^t)} + \epsilon \\
        \beta &= \Bigl[\frac{\langle g + \lambda d,\; g - d\rangle_{P^{-1}} + (1+\lambda)\,\delta}
            {\|g - d\|^2_{P^{-1}}}\Bigr]_0^1, \qquad
        d \leftarrow \frac{\beta + \lambda}{1+\lambda}\, d + \frac{1-\beta}{1+\lambda}\, g \\
        w &\leftarrow w - \eta\,(P^{-1} d + \lambda_w w)

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, > 0.
      weight_decay: lambda_w, decoupled: times the rate.
      mask: which leaves are decayed (True = decayed); default all.
      lam: lambda, >= 0, the pull of the memory. The default 0.1 is ours.
      plane_gap: ``"anchored"``, ``"zero"`` or ``"value"``, see ``scale_by_adaptive_memory``; with
        ``"value"`` each update needs ``value=loss``. The default is ours.
      scope: one coefficient for the tree, or one a leaf.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, like AdamW.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The memory starts from the first gradient and has no bias correction. Provisional: what is the
    paper's and what is inferred, and where the method fails, stands in
    ``scale_by_adaptive_memory``.

    >>> import jax.numpy as jnp, optax
    >>> tx = am_adamw(0.1)
    >>> params = jnp.zeros(2)
    >>> updates, state = tx.update(jnp.array([3.0, -0.1]), tx.init(params), params)
    >>> [round(float(u), 3) for u in updates]
    [-0.1, 0.1]

    Reference: Topollai and Choromanska, "Adaptive Memory Momentum via a Model-Based Framework for
    Deep Learning Optimization", AISTATS 2026, arXiv 2510.04988. No public code.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return recipe(
        scale_by_adaptive_memory(
            lam, plane_gap, scope, bias_corrected_rms(b2, eps), learning_rate=learning_rate
        ),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


_PAPER = (
    'Topollai and Choromanska, "Adaptive Memory Momentum via a Model-Based Framework for Deep '
    'Learning Optimization", AISTATS 2026, arXiv 2510.04988'
)

RECORDS = (
    Method(
        factory=am_sgd,
        kind="recipe",
        summary="SGD with a momentum coefficient from a model of the loss",
        example={"learning_rate": 1e-2, "weight_decay": 1e-2},
        traced=("learning_rate", "weight_decay", "lam"),
        static=("mask", "plane_gap", "scope"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="proportional",
        state_bytes=4,
        moved_bytes=28,  # 20, and gradient and memory once more for the products
        status="provisional",
        paper=_PAPER,
        reference="derived in NumPy from the model; no public code",
    ),
    Method(
        factory=am_adamw,
        kind="recipe",
        summary="AdamW with a momentum coefficient from a model of the loss",
        example={"learning_rate": 1e-3, "weight_decay": 1e-2},
        traced=("learning_rate", "b2", "eps", "weight_decay", "lam"),
        static=("mask", "plane_gap", "scope"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="bounded",
        state_bytes=8,
        moved_bytes=40,  # 28, and gradient, memory and second moment once more for the products
        status="provisional",
        paper=_PAPER,
        reference="derived in NumPy from the model; no public code",
    ),
)
