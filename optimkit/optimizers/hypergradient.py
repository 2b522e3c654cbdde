"""SGD and Adam with hypergradient descent on their rate."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Method
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.momentum import dampened_trace
from optimkit.wrappers.hypergradient import hypergradient_decayed


def sgd_hd(
    learning_rate: Any,
    *,
    hyper_lr: Any = 1e-6,
    momentum: float = 0.0,
    dampening: Any = 0.0,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
) -> GradientTransformation:
    r"""SGD whose rate rises while gradient and last step agree, and falls when they do not.

    With decay lambda, momentum mu and dampening tau:

    .. math::

        g_t &\leftarrow g_t + \lambda w_{t-1}, \qquad
        \eta_t = \eta_{t-1} + \beta \langle g_t, u_{t-1} \rangle \\
        b_t &= \mu\, b_{t-1} + (1-\tau)\, g_t \;(b_1 = g_1), \qquad
        u_t = g_t + \mu\, b_t \text{ with Nesterov, else } b_t \\
        w_t &= w_{t-1} - \eta_t\, u_t

    Args:
      learning_rate: the first rate, >= 0; 0 works. A number, no schedule.
      hyper_lr: beta, >= 0, the rate of the rate. 1e-6 is the authors' default; it must fit the
        loss: at a mean loss over 10 classes 0.1 was right in our trial, and 1e-6 did nothing.
      momentum: mu, in [0, 1]; fixed at construction. 0 keeps no momentum.
      dampening: tau, in [0, 1]; the first gradient is not dampened, as in ``torch.optim.SGD``.
      nesterov: look ahead; needs momentum > 0 and dampening 0.
      weight_decay: lambda, coupled: it is part of the gradient, in the product too.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter, 8 with momentum.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.
      TypeError: if ``learning_rate`` is a schedule.

    No bounds, as in the authors' code: gradients that turn back hard, or a spike, can make the rate
    negative or huge. ``hypergradient(inner, ..., min_lr=0)`` has bounds.

    >>> import jax.numpy as jnp, optax, optimkit as ok
    >>> tx = sgd_hd(0.0, hyper_lr=0.01)
    >>> w = jnp.array([1.0]); state = tx.init(w)
    >>> for _ in range(2):  # the first step moves nothing
    ...     updates, state = tx.update(jnp.array([3.0]), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> round(float(ok.get_learning_rate(state)), 6), round(float(w[0]), 6)  # 0.01 * 3 * 3
    (0.09, 0.73)

    Reference: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR
    2018, arXiv 1703.04782. Agrees with the authors' PyTorch code.
    """
    check_range(momentum=momentum, dampening=dampening, ge=0, le=1)
    check_range(weight_decay=weight_decay, ge=0)
    if nesterov:
        check_range(**{"momentum (with nesterov=True)": momentum}, gt=0)
        check_range(**{"dampening (with nesterov=True)": dampening}, le=0)
    inner = (
        dampened_trace(momentum, dampening, nesterov, first="copy")
        if momentum
        else optax.identity()
    )
    return recipe(hypergradient_decayed(inner, learning_rate, weight_decay, hyper_lr=hyper_lr))


def adam_hd(
    learning_rate: Any = 1e-3,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    hyper_lr: Any = 1e-8,
) -> GradientTransformation:
    r"""Adam whose rate rises while gradient and last step agree, and falls when they do not.

    .. math::

        g_t &\leftarrow g_t + \lambda w_{t-1}, \qquad
        \eta_t = \eta_{t-1} + \beta \langle g_t, u_{t-1} \rangle \\
        u_t &= \frac{\sqrt{1-b_2^t}}{1-b_1^t}\,\frac{m_t}{\sqrt{v_t}+\epsilon}, \qquad
        w_t = w_{t-1} - \eta_t\, u_t

    Args:
      learning_rate: the first rate, >= 0; 0 works. A number, no schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root before its bias correction, as in the authors' code, >= 0.
      weight_decay: lambda, coupled: it is part of the gradient, in moments and product too.
      hyper_lr: beta, >= 0, the rate of the rate; 1e-8 is the authors' default.

    Returns:
      An optimizer that needs ``params``; 12 bytes of state a f32 parameter (AdamW: 8). The authors
      keep 8 and make the last direction anew from the moments.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.
      TypeError: if ``learning_rate`` is a schedule.

    No bounds, as in the authors' code, so the rate can become negative; the product has the
    gradient unscaled, so a spike moves the rate far. The product is taken over all leaves before
    any of them moves, as in the paper; the authors' code adds it up leaf by leaf.

    >>> import jax.numpy as jnp, optimkit as ok
    >>> tx = adam_hd(0.1, hyper_lr=0.01)
    >>> w = jnp.array([1.0]); state = tx.init(w)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([3.0]), state, w)
    >>> round(float(ok.get_learning_rate(state)), 4)  # 0.1 + 0.01 * 3 * 1
    0.13

    Reference: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR
    2018, arXiv 1703.04782. Agrees with the authors' PyTorch code on a single leaf.
    """
    check_range(weight_decay=weight_decay, ge=0)
    inner = scale_by_adam(b1, b2, eps, eps_form="before_bias_correction")
    return recipe(hypergradient_decayed(inner, learning_rate, weight_decay, hyper_lr=hyper_lr))


_PAPER = (
    'Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, '
    "arXiv 1703.04782"
)
_REFERENCE = "gbaydin/hypergradient-descent@020d6080c4cedfbc88d5cdb7a2a53f92b34c2b16:hypergrad/"

RECORDS = (
    Method(
        factory=sgd_hd,
        kind="recipe",
        summary="SGD with hypergradient descent on its rate",
        example={
            "learning_rate": 1e-2,
            "hyper_lr": 1e-4,
            "momentum": 0.9,
            "weight_decay": 1e-2,
        },
        traced=("learning_rate", "hyper_lr", "dampening", "weight_decay"),
        static=("momentum", "nesterov"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="proportional",
        state_bytes=8,
        moved_bytes=36,  # 28, and gradient and last direction once more for the product
        paper=_PAPER,
        reference=_REFERENCE + "sgd_hd.py:SGDHD",
        licence="MIT",
    ),
    Method(
        factory=adam_hd,
        kind="recipe",
        summary="Adam with hypergradient descent on its rate",
        example={"weight_decay": 1e-2, "hyper_lr": 1e-5},
        traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "hyper_lr"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="proportional",
        state_bytes=12,
        moved_bytes=44,  # 36, and gradient and last direction once more for the product
        paper=_PAPER,
        reference=_REFERENCE + "adam_hd.py:AdamHD",
        licence="MIT",
    ),
)
