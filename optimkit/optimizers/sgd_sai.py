"""SGD-SaI: momentum SGD with one fixed rate a leaf, measured on the first gradient."""

from __future__ import annotations

import math
from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import (
    GradientTransformation,
    LeafSelector,
    Mask,
    Method,
    ScalarOrSchedule,
)
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.init_snr import scale_by_init_snr
from optimkit.transforms.momentum import dampened_trace


def sgd_sai(
    learning_rate: ScalarOrSchedule = 1e-2,
    momentum: Any = 0.9,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-2,
    mask: Mask = None,
    *,
    normalize: bool = False,
    wait_for_nonzero: bool = False,
    max_factor: Any = math.inf,
    stacked_leaves: LeafSelector = None,
) -> GradientTransformation:
    r"""Momentum SGD whose rate is multiplied, leaf by leaf, by what the first gradient showed.

    For every leaf, with the standard deviation of the entries of its first gradient:

    .. math::

        G &= \frac{\|g_1\|}{\sigma(g_1) + \epsilon}, \qquad m_1 = g_1, \quad
            m_t = \mu\, m_{t-1} + (1-\mu)\, g_t \\
        w_t &= (1 - \eta\lambda)\, w_{t-1} - \eta\, G\, m_t

    Entries with mean zero give G = sqrt(n - 1): the rate of a leaf is mainly the root of its size.

    Args:
      learning_rate: step size, or a schedule over the 0-based count; G does not follow it.
      momentum: mu, in [0, 1]; 0 switches momentum off.
      eps: added to the deviation, > 0.
      weight_decay: lambda, decoupled: times the rate, but not times G. All four defaults are those
        of the authors' code.
      mask: which leaves are decayed (True = decayed); default all.
      normalize: divide the factors by the largest, as the paper's algorithm says and the authors'
        code does not; the rate must then be larger by as much, often a few hundred.
      wait_for_nonzero: measure each leaf at its first gradient that is not zero. By the authors'
        rule a leaf whose first gradient is zero only decays, for ever.
      max_factor: largest G, > 0; infinity, the authors' rule, sets no limit.
      stacked_leaves: leaves whose first axis numbers layers, each of which gets its own G: a tree
        of bools, ``(path, leaf) -> bool``, or path patterns; default none.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter (AdamW: 8), and two
      scalars a leaf. Inside ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    A leaf of one entry, or of equal entries, has no deviation: its G is norm / eps, and it flies
    off at ordinary gradients. Set ``max_factor``, or train such leaves by something else. What is
    one leaf is one block: a fused query-key-value kernel gets one factor, three kernels get three.

    >>> import jax.numpy as jnp, optax
    >>> tx = sgd_sai(0.01, weight_decay=0.0)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    >>> [round(float(x), 4) for x in updates]  # G = 5 / sqrt(1/2)
    [-0.2121, -0.2828]

    Reference: Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need",
    2024, arXiv 2412.11768. Agrees with the authors' code (``sgd_sai__*``), where momentum 0 is an
    error. The paper divides by the root of the variance plus eps, the code by the deviation of the
    sample; this follows the code.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    return recipe(
        scale_by_init_snr(
            eps,
            normalize=normalize,
            wait_for_nonzero=wait_for_nonzero,
            max_factor=max_factor,
            stacked_leaves=stacked_leaves,
        ),
        # The factor is constant, so the momentum of scaled gradients is the scaled momentum.
        dampened_trace(momentum, dampening=momentum, first="copy"),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


RECORD = Method(
    factory=sgd_sai,
    kind="recipe",
    summary="momentum SGD with one fixed rate a leaf, measured on the first gradient",
    example={"max_factor": 100.0},
    traced=("learning_rate", "momentum", "eps", "weight_decay", "max_factor"),
    static=("mask", "normalize", "wait_for_nonzero", "stacked_leaves"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=20,
    paper='Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need", '
    "2024, arXiv 2412.11768",
    reference="AnonymousAlethiometer/SGD_SaI@e21308038ddb46b98b1cc61550bf182fd454de18:"
    "sgd_sai/sgd_sai.py:SGD_sai",
    licence="Apache-2.0",
)
