"""FedHyper's client: momentum SGD whose rate is scaled step by step within a round."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Method, ScalarOrSchedule
from optimkit.transforms.fedhyper_client import scale_by_fedhyper_client
from optimkit.transforms.momentum import dampened_trace


def fedhyper_client_local(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: Any = 0.5,
    global_weight: Any,
    max_growth: Any = 1.1,
    min_scale: Any = 0.1,
    max_scale: Any = 10.0,
    steps_per_epoch: int,
) -> GradientTransformation:
    r"""A client's SGD that steps further while it agrees with itself and with the global update.

    With G the last round's change of the global model and :math:`\beta = 1`,
    :math:`u_{last} = G` at the start of a round:

    .. math::

        b_t &= \mu\, b_{t-1} + g_t, \qquad u_t = -\eta \beta\, b_t, \qquad w_t = w_{t-1} + u_t \\
        \gamma &= \min(\gamma_{max},\; 1 + g\langle u_t, G\rangle + \langle u_t, u_{last}\rangle),
        \qquad \beta \leftarrow \operatorname{clip}(\gamma\beta, \beta_{min}, \beta_{max})

    The new beta acts from the next step on. The first step of a local epoch changes neither beta
    nor :math:`u_{last}`.

    Args:
      learning_rate: eta, a rate or a schedule over the 0-based count of the round.
      momentum: mu, in [0, 1].
      global_weight: g, >= 0; the authors use 0.1 over the number of clients in a round.
      max_growth: largest gamma; there is no smallest: a negative one takes beta to its lower bound.
      min_scale: lower bound of beta, > 0.
      max_scale: upper bound of beta.
      steps_per_epoch: steps of a local epoch, >= 1; with 1, beta never changes.

    Returns:
      An optimizer for one client in one round: call ``init`` anew for the next. It needs ``params``
      and the extra argument ``global_update``, zeros in the first round. 8 bytes a f32 parameter.

    Raises:
      ValueError: if an argument is out of range, ``global_update`` is missing, or a shape differs.

    The products are those of parameter changes, with the rate in them, where the paper writes
    gradients: the code is followed. So the method depends on the scale of rate and loss.

    >>> import jax.numpy as jnp
    >>> tx = fedhyper_client_local(0.1, momentum=0.0, global_weight=0.1, steps_per_epoch=9)
    >>> w = jnp.zeros(1); state = tx.init(w)
    >>> for _ in range(3):
    ...     step, state = tx.update(jnp.ones(1), state, w, global_update=jnp.array([-0.5]))
    >>> round(float(step[0]), 6)  # second step: gamma = 1 + 0.1 * 0.05 + 0.05
    -0.1055

    Reference: Wang et al., "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated
    Learning with Hypergradient Descent", ICLR 2024, arXiv 2310.03156. Agrees with the authors'
    code.
    """
    check_range(learning_rate=learning_rate, ge=0)
    return recipe(
        dampened_trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
        scale_by_fedhyper_client(
            global_weight=global_weight,
            max_growth=max_growth,
            min_scale=min_scale,
            max_scale=max_scale,
            steps_per_epoch=steps_per_epoch,
        ),
    )


RECORD = Method(
    factory=fedhyper_client_local,
    kind="recipe",
    summary="FedHyper's client: SGD scaled by agreement with its last step and the global update",
    example={"learning_rate": 1e-2, "global_weight": 0.01, "steps_per_epoch": 4},
    extras=lambda params, grads: {"global_update": grads},
    traced=("learning_rate", "momentum", "global_weight", "max_growth", "min_scale", "max_scale"),
    static=("steps_per_epoch",),
    needs=("params", "global_update"),
    position="alone",
    communication="reduce",
    response="proportional",
    state_bytes=8,
    moved_bytes=44,
    paper='Wang et al., "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated '
    'Learning with Hypergradient Descent", ICLR 2024, arXiv 2310.03156',
    reference="ATP-1010/FedHyper@d6a57c54d7e9293cabedc8f80c7d61d3cc321633:"
    "src/update.py:LocalUpdate.update_weights",
    licence="",
)
