"""CLASSP: weights that earlier tasks needed take ever smaller steps."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Method, ScalarOrSchedule
from optimkit.transforms.classp import Accumulate, scale_by_classp
from optimkit.transforms.gate_small_gradients import Gate


def classp(
    learning_rate: ScalarOrSchedule = 0.2,
    threshold: Any = 0.5,
    eps: Any = 1e-5,
    power: Any = 1,
    *,
    apply_scaling: bool = True,
    gate: Gate = "any",
    accumulate: Accumulate = "abs",
    initial_accumulator: Any = 0.0,
) -> GradientTransformation:
    r"""A generalised AdaGrad for one task after another: suppressed steps, and sparse ones.

    .. math::

        g \leftarrow \operatorname{gate}(g), \qquad s \leftarrow s + |g|^p, \qquad
        w \leftarrow w - \eta\, g / (s + \epsilon)^{1/p}

    What was pushed often holds what was learnt, and moves little from then on. What need not move
    is left as it is, free for later tasks. No copy of old weights and no Fisher matrix is kept.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. First steps are about this
        large for every weight, as in signed descent: 0.2 is much.
      threshold: theta, >= 0; what it means depends on ``gate``.
      eps: inside the root, >= 0.
      power: p, >= 1; the authors have 1.
      apply_scaling: False: plain steps, while s is gathered; so the authors train their first task
        on MNIST. Build it anew with True and threshold 0 for the next task, and keep the state.
      gate: ``"any"`` is the authors' code: below threshold 1 every leaf passes, from 1 on none
        does. ``"element"`` is the paper: entries with g^2 <= theta stay where they are; then 1e-6
        to 1e-4 suits small networks.
      accumulate: ``"abs"`` is the authors' code, which adds |g| whatever p is; ``"power"`` is the
        paper.
      initial_accumulator: s at the start, >= 0.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter (AdamW: 8).

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The default is what the authors ran, since their thresholds of 0.5 and 0.99 stop learning with
    the paper's gate: hardly any squared gradient is that large. The paper's displayed equation
    leaves the current gradient out of s; its algorithm and its code have it in, as here. A spike
    suppresses its weights for good. Much of what CLASSP gains over SGD, AdaGrad gains too.
    With ``apply_scaling=False``, or with ``"abs"`` and p > 1, steps grow with the gradient.

    >>> import jax.numpy as jnp, optax
    >>> tx = classp(0.5, eps=0.0)
    >>> params = jnp.array([1.0, 1.0])
    >>> state = tx.init(params)
    >>> for g in ([4.0, -1.0], [4.0, 0.0]):
    ...     updates, state = tx.update(jnp.array(g), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params.tolist())
    [0.5, 1.5]
    [0.25, 1.5]

    Reference: Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through
    Adjustment Suppression and Sparsity Promotion", 2024, arXiv 2405.09637. Agrees with the authors'
    code, and with the paper's algorithm, to rounding (goldens ``classp__*``); their code takes the
    arguments of the first parameter group for all groups, which is not copied.
    """
    check_range(learning_rate=learning_rate, ge=0)
    return recipe(
        scale_by_classp(
            threshold, eps, power, apply_scaling, gate, accumulate, initial_accumulator
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


RECORD = Method(
    factory=classp,
    kind="recipe",
    summary="AdaGrad with a gate, against forgetting",
    traced=("learning_rate", "threshold", "eps", "power", "initial_accumulator"),
    static=("apply_scaling", "gate", "accumulate"),
    needs=("params",),
    position="alone",
    communication="none",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    paper='Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through '
    'Adjustment Suppression and Sparsity Promotion", 2024, arXiv 2405.09637',
    reference="oswaldoludwig/CLASSP@ea3fe3c67279e27db8edea73d5f3ad522bb15dc1:CLASSP.py:"
    "CLASSP_optimizer",
    licence="Apache-2.0",
)
