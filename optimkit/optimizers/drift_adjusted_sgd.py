"""DAL: gradient descent with a rate set by the drift from the gradient flow."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

from optimkit.leaves import recipe
from optimkit.protocols import GradientTransformation, Method, PyTree
from optimkit.transforms.drift import scale_by_drift


def drift_adjusted_sgd(
    *,
    power: Any = 1.0,
    static_learning_rate: Any = 0.1,
    max_learning_rate: Any = 5.0,
    start: int | None = None,
    stop: int | None = None,
    hvp: Literal["exact", "finite_difference"] = "exact",
) -> GradientTransformation:
    r"""Gradient descent whose rate follows the curvature along the gradient: needs no tuning.

    .. math:: w_t = w_{t-1} - \eta_t g_t, \qquad
        \eta_t = \min\Bigl(2 \Bigl(\frac{\|g_t\|}{\|H_t g_t\|}\Bigr)^{p},\; \eta_{max}\Bigr)

    with norms over all leaves: one rate for the tree. No momentum, no decay.

    Args:
      power: p, >= 0; 1 is the plain method. Smaller ones step further where the curvature is above
        1, and can diverge; 0 is the static rate.
      static_learning_rate: rate outside the interval, and for power 0. The default is ours.
      max_learning_rate: largest rate, > 0; 5 is the authors' code.
      start: the rule rests at counts (from 0) up to and including this one; None and 0: no limit.
      stop: the rule rests from this count on; None and 0: never.
      hvp: ``"exact"`` or ``"finite_difference"``, see ``optimkit.gradients.hessian_gradient``.

    Returns:
      An optimizer that needs ``params`` and, in each update, ``value_fn``, the loss on the same
      batch as a function of the parameters (``loss_fn`` is taken as well), or ``hg``, the tree
      H g. It keeps no state per parameter.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or ``value_fn``
        and ``hg`` are both missing.

    ``value_fn`` is called with parameters in f32 or better. Costs about one more forward and
    backward pass a step. At power 1 the rate can reach two over the largest curvature, the edge of
    stability, where the loss oscillates rather than falls; put a falling schedule behind it.

    >>> import jax, jax.numpy as jnp, optax
    >>> def loss(w): return jnp.sum(jnp.array([1.0, 4.0]) * w**2) / 2
    >>> tx = drift_adjusted_sgd()
    >>> w = jnp.array([4.0, 0.0])
    >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    >>> updates.tolist()  # curvature 1 along the gradient: rate 2
    [-8.0, -0.0]

    Reference: Rosca et al., "On a continuous time model of gradient descent dynamics and
    instability in deep learning", TMLR 2023, arXiv 2302.01952. Agrees with the authors' code
    (``drift_adjusted__*``).
    """
    return recipe(
        scale_by_drift(
            power,
            max_learning_rate,
            static_learning_rate=static_learning_rate,
            start=start,
            stop=stop,
            hvp=hvp,
        ),
        optax.scale(-1),
    )


def _half(params: PyTree, grads: PyTree) -> dict[str, PyTree]:
    """A Hessian of one half."""
    return {"hg": jax.tree.map(lambda g: g / 2, grads)}


RECORD = Method(
    factory=drift_adjusted_sgd,
    kind="recipe",
    summary="gradient descent with a rate set by the drift from the gradient flow",
    extras=_half,
    example={"start": 1},
    traced=("power", "static_learning_rate", "max_learning_rate"),
    static=("start", "stop", "hvp"),
    needs=("params", "value_fn"),
    position="alone",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=20,  # 12, and the gradient and its product with the Hessian for the norms
    paper='Rosca et al., "On a continuous time model of gradient descent dynamics and instability '
    'in deep learning", TMLR 2023, arXiv 2302.01952',
    reference="google-deepmind/discretisation_drift@e5c5623981e2e8206c29c3e97c3a443bfc4b4061:"
    "principal_flow_instability_single_objective/dal.py",
    licence="Apache-2.0",
)
