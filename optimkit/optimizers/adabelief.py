"""AdaBelief: large steps where gradients come as foreseen, small ones where they do not."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.belief import scale_by_belief, scale_by_rectified_belief
from optimkit.transforms.decayed_weights import decayed_weights


def adabelief(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-16,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    rectify: bool = True,
    degenerated_to_sgd: bool = True,
    amsgrad: bool = False,
) -> GradientTransformation:
    r"""Steps by momentum over the root of the second moment of g - m.

    .. math::

        m_t &= b_1 m_{t-1} + (1-b_1)\, g_t, \qquad
            s_t = b_2 s_{t-1} + (1-b_2)(g_t - m_t)^2 + \epsilon \\
        w_t &= w_{t-1} - \eta\,\Big(
            \frac{m_t/(1-b_1^t)}{\sqrt{s_t/(1-b_2^t)} + \epsilon} + \lambda w_{t-1}\Big)

    That is the paper, ``rectify=False``. By default, as in the authors' package 0.2.1, RAdam's
    rectification multiplies the step, and until rho reaches 5 (steps 1 to 5 at b2 = 0.999) the
    step is plain momentum: see ``scale_by_rectified_belief``.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. The package has 1e-3.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the second moment, in [0, 1), or in (0, 1) with ``rectify``.
      eps: added to the second moment and to the root, >= 0. It matters more than Adam's, of which
        it is about the square: the authors advise 1e-8 where SGD beats Adam (convolutions), 1e-12
        to 1e-16 for transformers and GANs.
      weight_decay: lambda.
      mask: which leaves are decayed (True = decayed); default all.
      weight_decouple: decay the weights; False adds ``weight_decay * w`` to the gradient.
      fixed_decay: decoupled decay that the rate does not multiply.
      rectify: RAdam's rectification; False for the paper's method.
      degenerated_to_sgd: with ``rectify``, step along the plain momentum while the second moment is
        too young; False: do not move.
      amsgrad: divide by the largest second moment so far; without effect with ``rectify``, where
        the authors' code keeps the maximum and then does not use it.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter (12 with ``amsgrad`` and
      no ``rectify``).

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Where gradients do not change, steps grow to m over the root of eps / (1 - b2), 1e6 m and more
    at the default eps. Never clip entries before it: clipped ones look foreseen. A rate of zero
    still decays under ``fixed_decay``. ``optax.adabelief`` is the case ``rectify=False`` without
    decay; it has no rectification, which is the package's default.

    >>> import jax.numpy as jnp, optax
    >>> tx = adabelief(0.1)  # the first step is that of SGD
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([0.5, -2.0]), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]
    [0.95, 1.2]

    Reference: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients", NeurIPS 2020, arXiv 2010.07468. Agrees with the authors' package to rounding
    (goldens ``adabelief__*``).
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    if rectify:
        direction = scale_by_rectified_belief(b1, b2, eps, degenerated_to_sgd)
    else:
        direction = scale_by_belief(b1, b2, eps, eps, amsgrad)
    rate = optax.scale_by_learning_rate(learning_rate)
    if not weight_decouple:
        return recipe(decayed_weights(weight_decay, mask), direction, rate)
    if fixed_decay:
        return recipe(direction, rate, decayed_weights(-weight_decay, mask))
    return recipe(direction, decayed_weights(weight_decay, mask), rate)


RECORD = Method(
    factory=adabelief,
    kind="recipe",
    summary="momentum over the root of its surprise, rectified",
    example={"learning_rate": 1e-3, "weight_decay": 0.1},
    traced=("learning_rate", "b1", "b2", "eps", "weight_decay"),
    static=(
        "mask",
        "weight_decouple",
        "fixed_decay",
        "rectify",
        "degenerated_to_sgd",
        "amsgrad",
    ),
    needs=("params",),
    position="alone",
    communication="none",
    response="proportional",
    state_bytes=8,
    moved_bytes=28,
    paper='Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed '
    'Gradients", NeurIPS 2020, arXiv 2010.07468',
    reference="juntang-zhuang/Adabelief-Optimizer@2855178eff6776762793f915ce2c615f776a1e4b:"
    "pypi_packages/adabelief_pytorch0.2.1/adabelief_pytorch/AdaBelief.py:AdaBelief",
    licence="BSD-2-Clause",
)
