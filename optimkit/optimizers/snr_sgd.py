"""SGD whose rate is multiplied by the share of signal in the gradient."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Method, ScalarOrSchedule
from optimkit.transforms.snr import scale_by_snr


def snr_sgd(
    learning_rate: ScalarOrSchedule, *, decay: Any = 0.9, min_scale: Any = 0.01
) -> GradientTransformation:
    r"""SGD with the rate times signal / (signal + noise), estimated over all leaves.

    .. math:: w_t = w_{t-1} - \eta\, s_t\, g_t, \qquad
        s_t = \operatorname{clip}\Bigl(\frac{S_t}{S_t + V_t},\ s_{min},\ 1\Bigr)

    ``scale_by_snr`` has the estimate. The rate falls by itself when noise takes over.

    Args:
      learning_rate: step size, or a schedule over the 0-based count: what would be right for
        gradients without noise, one over the largest curvature.
      decay: of the running means, in [0, 1).
      min_scale: least factor on the rate, >= 0. All defaults are this library's.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter. With ``snr_scale``, as
      from ``gradient_snr``, an update uses that in place of the own estimate.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Provisional: in the spirit of the paper, whose formulas could not be read.

    >>> import jax.numpy as jnp, optax
    >>> tx = snr_sgd(0.1)
    >>> params = jnp.zeros(1); state = tx.init(params)
    >>> for g in ([1.0], [-1.0]):  # nothing but noise: the least factor
    ...     updates, state = tx.update(jnp.array(g), state, params)
    ...     print(round(float(updates[0]), 4))
    -0.1
    0.001

    Reference: Huang et al., "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning",
    2025, arXiv 2511.23310.
    """
    check_range(learning_rate=learning_rate, ge=0)
    return recipe(
        scale_by_snr(decay=decay, min_scale=min_scale),
        optax.scale_by_learning_rate(learning_rate),
    )


RECORD = Method(
    factory=snr_sgd,
    kind="recipe",
    summary="SGD with the rate times the share of signal in the gradient",
    example={"learning_rate": 1e-2},
    traced=("learning_rate", "decay", "min_scale"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=24,  # 20, and the gradient once more
    status="provisional",
    paper='Huang et al., "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning", '
    "2025, arXiv 2511.23310",
    reference="derived in NumPy from the abstract; no public code",
)
