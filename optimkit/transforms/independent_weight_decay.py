"""Weight decay that does not depend on the learning rate, only on its schedule."""

from __future__ import annotations

from typing import Any

from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.decay_after_step import shrink_parameters


def independent_weight_decay(
    weight_decay: Any = 1e-4, schedule: ScalarOrSchedule = 1.0, mask: Mask = None
) -> GradientTransformation:
    r"""Decays the weights by their own amount, however large the learning rate is.

    .. math:: w_t = w_{t-1} - s_t\,(\eta\,\Delta_t + \lambda w_{t-1})

    The usual decay is :math:`s_t \eta \lambda`: whoever tries larger rates decays more as well, and
    a model looks more sensitive to its rate than it is.

    Args:
      weight_decay: lambda, >= 0; the authors' 1e-4 goes with what others call 0.1 at rate 1e-3.
      schedule: s_t, the shape of the learning rate with a peak of 1: a number, or a schedule over
        the 0-based count.
      mask: which leaves are decayed (True = decayed), a tree of bools, a prefix of one, or a
        function of the parameters; default all.

    Returns:
      A transformation for the end of a chain, after the rate :math:`s_t \eta` and the sign. It
      needs ``params``; its state is one int32.

    Raises:
      ValueError: if an argument is out of range, params are missing, or a gradient has another
        shape.

    The paper prints the decay with a minus inside its bracket, which would let weights grow.

    >>> import jax.numpy as jnp
    >>> tx = independent_weight_decay(0.25, lambda count: 1 / (count + 1))
    >>> w = jnp.array([1.0])
    >>> u, _ = tx.update(jnp.array([-0.5]), tx.init(w), w)
    >>> u.tolist()  # -0.5 - 0.25 * 1
    [-0.75]

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", ICLR 2024, arXiv 2309.14322, section 3.2.2.
    """
    check_range(schedule=schedule, ge=0)
    return shrink_parameters(
        lambda u, w, shrink: u - shrink * w,
        weight_decay,
        schedule,
        mask,
        who="independent_weight_decay",
    )


RECORD = Method(
    factory=independent_weight_decay,
    kind="piece",
    summary="weight decay that follows the schedule, but not the size, of the rate",
    example={"weight_decay": 0.01},
    exempt={"fidelity": "the authors published no code; the rule is checked by hand"},
    traced=("weight_decay", "schedule"),
    static=("mask",),
    needs=("params",),
    position="last",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Wortsman et al., "Small-scale proxies for large-scale Transformer training '
    'instabilities", ICLR 2024, arXiv 2309.14322',
)
