"""perpGrad: SGD and AdamW on gradients without their component along the weights."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.momentum import dampened_trace
from optimkit.transforms.orthogonal_to_params import orthogonal_to_params


def perp_sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Any = 0.0,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    rescale: bool = True,
    eps: Any = 1e-30,
) -> GradientTransformation:
    r"""SGD whose gradient has lost, leaf by leaf, what of it is parallel to the weights.

    .. math::

        o_t &= g_t - \frac{\langle w, g_t\rangle}{\langle w, w\rangle + \epsilon}\, w, \qquad
            p_t = o_t\, \frac{\|g_t\|}{\|o_t\| + \epsilon} + \lambda w \\
        b_t &= \mu\, b_{t-1} + p_t, \qquad
            w \leftarrow w - \eta\, (p_t + \mu b_t \text{ with Nesterov, else } b_t)

    Once a classifier fits its training set, the gradient of the cross-entropy mostly scales the
    logits up until float softmax rounds the loss to zero. Without that component training goes on,
    and generalises ("groks") without weight decay.

    Args:
      learning_rate: eta, a number or a schedule over the 0-based count.
      momentum: mu, in [0, 1]. The authors' runs have 0.8.
      nesterov: look ahead, as ``torch.optim.SGD`` does.
      weight_decay: lambda, >= 0, added to the gradient after the projection. The default 0 is the
        point of the method.
      mask: which leaves are decayed (True = decayed); default all.
      rescale: give the projected gradient the norm of the gradient, as the authors' code does;
        False is the paper's formula.
      eps: guards the projection's divisions, >= 0; the authors' value.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter, also at momentum 0.
      Inside ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The step is not projected: momentum may still change norms. What is left of a gradient parallel
    to the weights is rounding noise and becomes zero, where the authors' code blows it up to full
    size; leaves of one entry pass as they are. Both guards are ours. The update is proportional to
    the gradient.

    >>> import jax.numpy as jnp, optax
    >>> tx = perp_sgd(0.1)
    >>> params = jnp.array([2.0, 0.0])
    >>> updates, state = tx.update(jnp.array([4.0, 3.0]), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]  # (0, 3), norm 5 again
    [2.0, -0.5]

    Reference: Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025,
    arXiv 2501.04697. Agrees with the authors' class around ``torch.optim.SGD``.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return recipe(
        orthogonal_to_params(rescale=rescale, eps=eps),
        decayed_weights(weight_decay, mask),
        dampened_trace(momentum, nesterov=nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def perp_adamw(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    rescale: bool = True,
) -> GradientTransformation:
    r"""AdamW whose gradient has lost, leaf by leaf, what of it is parallel to the weights.

    .. math::

        o_t &= g_t - \frac{\langle w, g_t\rangle}{\langle w, w\rangle + 10^{-30}}\, w, \qquad
            p_t = o_t\, \frac{\|g_t\|}{\|o_t\| + 10^{-30}} \\
        w &\leftarrow w - \eta\,(\mathrm{Adam}(p_t) + \lambda w)

    Args:
      learning_rate: eta, a number or a schedule over the 0-based count; 0.01 in the authors' runs.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1). Though the authors' flags say 0.99, their script
        runs with 0.999 and an eps of 1e-8.
      eps: Adam's, >= 0; the projection's stays 1e-30.
      weight_decay: lambda, >= 0, decoupled and times the rate. The default 0 is the point of the
        method.
      mask: which leaves are decayed (True = decayed); default all.
      rescale: give the projected gradient the norm of the gradient, as the authors' code does;
        False is the paper's formula. Adam is invariant to a constant factor, not to this one.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, like AdamW. Inside
      ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The moments are built from projected gradients; the step is not projected. The guards are those
    of ``orthogonal_to_params``.

    >>> import jax.numpy as jnp, optax
    >>> tx = perp_adamw(0.1)
    >>> params = jnp.array([2.0, 0.0])
    >>> updates, state = tx.update(jnp.array([4.0, 3.0]), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]  # along w: no step
    [2.0, -0.1]

    Reference: Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025,
    arXiv 2501.04697. Agrees with the authors' class around ``torch.optim.AdamW``.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return recipe(
        orthogonal_to_params(rescale=rescale),
        scale_by_adam(b1, b2, eps),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


_PAPER = 'Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697'
_REFERENCE = (
    "LucasPrietoAl/grokking-at-the-edge-of-numerical-stability@"
    "0cc9e8dc62ce5ed66d29d80eebbaf14da2f71c67:orthograd.py:OrthoGrad"
)

RECORDS = (
    Method(
        factory=perp_sgd,
        kind="recipe",
        summary="SGD on gradients orthogonal to the weights",
        example={"learning_rate": 1e-2, "momentum": 0.9, "weight_decay": 1e-2},
        traced=("learning_rate", "momentum", "weight_decay", "eps"),
        static=("nesterov", "mask", "rescale"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="proportional",
        state_bytes=4,
        moved_bytes=36,  # 20, and gradient and parameter twice more: for <w, g>, then for |o|
        paper=_PAPER,
        reference=_REFERENCE,
        licence="MIT",
    ),
    Method(
        factory=perp_adamw,
        kind="recipe",
        summary="AdamW on gradients orthogonal to the weights",
        example={"learning_rate": 1e-3, "weight_decay": 1e-2},
        traced=("learning_rate", "b1", "b2", "eps", "weight_decay"),
        static=("mask", "rescale"),
        needs=("params",),
        position="alone",
        communication="reduce",
        response="bounded",
        state_bytes=8,
        moved_bytes=44,  # 28, and gradient and parameter twice more: for <w, g>, then for |o|
        paper=_PAPER,
        reference=_REFERENCE,
        licence="MIT",
    ),
)
