"""Exponentiated gradients under Dale's law: SGD and AdamW that multiply, and SGD held to signs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import decay_tree, map_leaves, zero_count
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
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.exponentiate_updates import exponentiate_updates
from optimkit.transforms.keep_signs import keep_signs, sign_preserving
from optimkit.transforms.momentum import dampened_trace


class LogStepState(NamedTuple):
    """``count``: int32 scalar, for a rate that is a schedule."""

    count: Array


def exponentiated_gradient(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.0,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    dampening: Any = 0.0,
    signed: bool = True,
    max_log_step: Any = None,
) -> GradientTransformation:
    r"""SGD in the logarithm of each weight's magnitude: weights are multiplied and keep their sign.

    .. math::

        d_t &= g_t + \lambda \operatorname{sign}(w), \qquad
            b_t = \mu\, b_{t-1} + (1-\tau)\, d_t, \quad b_1 = d_1 \\
        w &\leftarrow w \exp(-\eta \operatorname{sign}(w)\,
            (d_t + \mu b_t \text{ with Nesterov, else } b_t))

    Large weights move more than small ones, so weights become log-normal, as those between
    neurons are, and a few relevant inputs among many are found much faster than by SGD.

    Args:
      learning_rate: eta, a number or a schedule over the 0-based count; of the order of 1, for it
        is a relative step. The authors' large runs have 3.5 with warmup and cooldown.
      momentum: mu, in [0, 1]; 0.925 in those runs. It lives in gradient space.
      nesterov: look ahead; PyTorch allows it at dampening 0 only.
      weight_decay: lambda, >= 0; every step shrinks weights by the factor exp(-eta lambda). 1e-6 or
        1e-7 in those runs.
      mask: which leaves are decayed (True = decayed); default all.
      dampening: tau, in [0, 1]; without effect at momentum 0.
      signed: the rule above. False is the authors' ablation without the factor sign(w) and with
        lambda \|sign(w)\|, which climbs for negative weights.
      max_log_step: largest exponent, > 0; ours. None: no limit. Clip gradients to a global norm of
        2 in front, as the authors do.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter, also at momentum 0.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    A weight that is zero stays so for ever. Give biases and norm offsets, which must cross zero, to
    another optimizer with ``optax.partition``, or split each into a positive and a negative part,
    as the authors do. Start from ``optimkit.nn.lognormal_signed_init``. Steps are exponential in
    the gradient: they are limited only where the result would overflow, or round to zero, in the
    dtype of the parameters. In bfloat16 a step of less than 2^-8 of the weight is lost: keep f32
    master weights.

    >>> import jax.numpy as jnp, optax
    >>> tx = exponentiated_gradient(1.0)
    >>> params = jnp.array([1.0, -1.0, 0.0])
    >>> grads = -jnp.log(jnp.array([2.0, 2.0, 2.0]))
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]
    [2.0, -0.5, 0.0]

    Reference: Cornford et al., "Brain-like learning with exponentiated gradients", 2024,
    bioRxiv 10.1101/2024.10.25.620272. Agrees with the authors' code.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return sign_preserving(
        exponentiate_updates(signed=signed, max_log_step=max_log_step),
        _add_sign_decay(weight_decay, mask, signed),
        _torch_trace(momentum, dampening, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw_eg(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-2,
    mask: Mask = None,
) -> GradientTransformation:
    r"""AdamW whose step multiplies: weights keep their sign.

    .. math::

        w \leftarrow w\,(1 - \eta\lambda)\, \exp\!\left(-\eta \operatorname{sign}(w)\,
            \frac{m_t/(1-b_1^t)}{\sqrt{v_t/(1-b_2^t)} + \epsilon}\right)

    Args:
      learning_rate: eta, a number or a schedule over the 0-based count: about the relative change
        of a weight in a step.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      weight_decay: lambda, >= 0, decoupled. Where eta lambda reaches 1, a weight shrinks by the
        precision of its dtype; the authors' code would turn its sign.
      mask: which leaves are decayed (True = decayed); default all.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, like AdamW.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    What ``exponentiated_gradient`` says of zero weights, biases and bfloat16 holds here too.

    >>> import jax.numpy as jnp, optax
    >>> tx = adamw_eg(0.1, weight_decay=0.0)
    >>> params = jnp.array([1.0, -1.0, 0.0])
    >>> updates, state = tx.update(jnp.array([5.0, 5.0, 5.0]), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]  # exp(-0.1), exp(0.1)
    [0.905, -1.105, 0.0]

    Reference: Cornford et al., "Brain-like learning with exponentiated gradients", 2024,
    bioRxiv 10.1101/2024.10.25.620272. Agrees with the authors' code.
    """
    return sign_preserving(
        exponentiate_updates(),
        scale_by_adam(b1, b2, eps),
        _scale_with_log_decay(learning_rate, weight_decay, mask),
    )


def sign_constrained_sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.0,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
    *,
    dampening: Any = 0.0,
    threshold: Any = 1e-18,
) -> GradientTransformation:
    r"""SGD that stops every weight just before zero, so that none changes its sign.

    .. math::

        d_t &= g_t + \lambda w, \qquad b_t = \mu\, b_{t-1} + (1-\tau)\, d_t, \quad b_1 = d_1 \\
        w' &= w - \eta\, (d_t + \mu b_t \text{ with Nesterov, else } b_t), \qquad
            w \leftarrow \operatorname{sign}(w)\,\theta \text{ where the sign changed, else } w'

    The additive counterpart of ``exponentiated_gradient``: many weights end at the threshold.

    Args:
      learning_rate: eta, a number or a schedule over the 0-based count.
      momentum: mu, in [0, 1]; 0.925 in the authors' runs.
      nesterov: look ahead; PyTorch allows it at dampening 0 only.
      weight_decay: lambda, >= 0, added to the gradient.
      dampening: tau, in [0, 1]; without effect at momentum 0.
      threshold: theta, >= 0; the authors' value. Precision may keep a weight further from zero, see
        ``keep_signs``.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter, also at momentum 0. The
      update is proportional to the gradient.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    >>> import jax.numpy as jnp, optax
    >>> tx = sign_constrained_sgd(0.5, threshold=0.25)
    >>> params = jnp.array([1.0, -1.0, 0.0])
    >>> updates, state = tx.update(jnp.array([4.0, 4.0, 4.0]), tx.init(params), params)
    >>> optax.apply_updates(params, updates).tolist()  # zero has no sign to keep
    [0.25, -3.0, -2.0]

    Reference: Cornford et al., "Brain-like learning with exponentiated gradients", 2024,
    bioRxiv 10.1101/2024.10.25.620272. Agrees with the authors' code.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return sign_preserving(
        keep_signs(threshold=threshold),
        decayed_weights(weight_decay),
        _torch_trace(momentum, dampening, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def _torch_trace(momentum: Any, dampening: Any, nesterov: bool) -> GradientTransformation:
    """Momentum as ``torch.optim.SGD`` has it: none, and no dampening either, where it is zero."""
    check_range(momentum=momentum, dampening=dampening, ge=0, le=1)
    return dampened_trace(momentum, dampening * (momentum != 0), nesterov, first="copy")


def _add_sign_decay(weight_decay: Any, mask: Mask, signed: bool) -> GradientTransformation:
    """Adds a pull of constant size towards zero; in the logarithm that is proportional decay."""

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        pull = jax.tree.map(lambda yes: weight_decay if yes else 0.0, decay_tree(mask, params))

        def step(g: Array, w: Array, pull: Any) -> Array:
            sign = jnp.sign(w)
            return g + pull * (sign if signed else jnp.abs(sign))

        return map_leaves(step, updates, reads=(params, pull)), state

    return transformation(init, update)


def _scale_with_log_decay(
    learning_rate: ScalarOrSchedule, weight_decay: Any, mask: Mask
) -> GradientTransformation:
    """The rate and its sign, and ``log(1 - rate * weight_decay)`` as a part of the exponent."""
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)

    def init(params: PyTree) -> LogStepState:
        del params
        return LogStepState(zero_count())

    def update(
        updates: PyTree, state: LogStepState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, LogStepState]:
        del extra
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        # Beyond 1 - eps the exponential meets its own limit: the precision of the weights.
        least = 1 - float(jnp.finfo(jnp.float32).eps)
        shrink = jnp.log1p(-jnp.minimum(rate * weight_decay, least))
        decay = jax.tree.map(lambda yes: shrink if yes else 0.0, decay_tree(mask, params))

        def step(u: Array, w: Array, decay: Any) -> Array:
            return jnp.sign(w) * decay - rate * u

        updates = map_leaves(step, updates, reads=(params, decay))
        return updates, LogStepState(next_count(state.count))

    return transformation(init, update)


_PAPER = (
    'Cornford et al., "Brain-like learning with exponentiated gradients", 2024, '
    "bioRxiv 10.1101/2024.10.25.620272"
)
_REPOSITORY = "jhcornford/exponentiated-gradients@a9aa3f46940478f454f5b83fedeb68841313de3f:"

RECORDS = (
    Method(
        factory=exponentiated_gradient,
        kind="recipe",
        summary="SGD that multiplies weights, which keep their sign",
        example={"learning_rate": 1e-2, "momentum": 0.9, "weight_decay": 1e-2},
        traced=("learning_rate", "momentum", "weight_decay", "dampening", "max_log_step"),
        static=("nesterov", "mask", "signed"),
        needs=("params",),
        position="alone",
        communication="none",
        response="proportional",
        state_bytes=4,
        moved_bytes=20,
        paper=_PAPER,
        reference=_REPOSITORY + "src/eg_utils.py:SGD",
        licence="MIT",
    ),
    Method(
        factory=adamw_eg,
        kind="recipe",
        summary="AdamW that multiplies weights, which keep their sign",
        example={"learning_rate": 1e-2},
        traced=("learning_rate", "b1", "b2", "eps", "weight_decay"),
        static=("mask",),
        needs=("params",),
        position="alone",
        communication="none",
        response="bounded",
        state_bytes=8,
        moved_bytes=28,
        paper=_PAPER,
        reference=_REPOSITORY + "src/adamw_eg.py:AdamWEG",
        licence="MIT",
    ),
    Method(
        factory=sign_constrained_sgd,
        kind="recipe",
        summary="SGD that stops weights before they change their sign",
        example={"learning_rate": 1e-2, "momentum": 0.9, "weight_decay": 1e-2},
        traced=("learning_rate", "momentum", "weight_decay", "dampening", "threshold"),
        static=("nesterov",),
        needs=("params",),
        position="alone",
        communication="none",
        response="proportional",
        state_bytes=4,
        moved_bytes=20,
        paper=_PAPER,
        reference=_REPOSITORY + "src/eg_utils.py:SGD",
        licence="MIT",
    ),
)
