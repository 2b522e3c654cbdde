"""FedHyper's server: its own rate, or the one that it hands to all clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import check_match, check_real, map_leaves, widen, zeros_like
from optimkit.numerics import (
    check_range,
    hyperparameter_dtype,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.alignment import after, alignment


class FedHyperServerState(NamedTuple):
    """``alignment``: sum of the products of successive updates, one f32 scalar.

    ``last_update``: the last mean delta, or its momentum; one array a parameter.
    """

    alignment: Array
    last_update: PyTree


class RateController(NamedTuple):
    """``init(params) -> state``; ``update(mean_delta, state) -> (rate, state)``."""

    init: Callable[[PyTree], Any]
    update: Callable[[PyTree, Any], tuple[Array, Any]]


def _server_state(params: PyTree) -> FedHyperServerState:
    return FedHyperServerState(jnp.zeros((), hyperparameter_dtype()), zeros_like(params))


def checked_delta(delta: PyTree, like: PyTree) -> PyTree:
    """A delta in the dtypes of ``like``; raises where it does not match."""
    check_real(delta, "gradient")
    check_match(delta, like, what="gradient", like="the state")
    return widen(delta, like)


def fedhyper_global(
    *, init_rate: Any = 1.0, min_rate: Any = 0.2, max_rate: Any = 5.0, momentum: Any = 0.0
) -> GradientTransformation:
    r"""The server's rate rises while successive mean deltas of the clients agree (FedHyper-G).

    With the mean delta :math:`D_r` of round r, :math:`A_0 = 0` and :math:`L_0 = 0`:

    .. math::

        A_r &= \operatorname{clip}(A_{r-1} + \langle L_{r-1}, D_r\rangle,\;
            \alpha_{min}-\alpha_0,\; \alpha_{max}-\alpha_0) \\
        \Delta w &= (\alpha_0 + A_r) D_r + \mu A_r L_{r-1}, \qquad L_r = D_r + \mu L_{r-1}

    Args:
      init_rate: alpha_0, the rate of the first round; 1 is the authors'.
      min_rate: lower bound of the rate, in [0, ``init_rate``]. 0.2 is the authors' code.
      max_rate: upper bound, >= ``init_rate``.
      momentum: mu, in [0, 1). The authors recommend 0.9 with ``min_rate=0.8`` (FedHyper-GM). The
        momentum counts A times, not 1 + A times, as in their code.

    Returns:
      A transformation of the mean of (client parameters - server parameters); its output is added
      to the server's parameters, without a sign or a rate. 4 bytes a f32 parameter and a scalar.

    Raises:
      ValueError: if an argument is out of range, or a delta has another shape.

    The product is over all parameters and not normalised, so the method depends on the scale of the
    deltas: where they are long, the rate sits at a bound. A non-finite delta poisons the state for
    good: leave such rounds out (``optax.apply_if_finite``).

    >>> tx = fedhyper_global()
    >>> state = tx.init(jnp.zeros(1))
    >>> for delta in (0.5, 0.8):
    ...     update, state = tx.update(jnp.array([delta]), state)
    >>> round(float(update[0]), 4)  # (1 + 0.5 * 0.8) * 0.8
    1.12

    Reference: Wang et al., "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated
    Learning with Hypergradient Descent", ICLR 2024, arXiv 2310.03156. Agrees with the authors'
    code.
    """
    check_range(init_rate=init_rate, min_rate=min_rate, max_rate=max_rate, ge=0)
    check_range(**{"init_rate - min_rate": init_rate - min_rate}, ge=0)
    check_range(**{"max_rate - init_rate": max_rate - init_rate}, ge=0)
    check_range(momentum=momentum, ge=0, lt=1)

    def update(
        updates: PyTree, state: FedHyperServerState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, FedHyperServerState]:
        del params, extra
        deltas = checked_delta(updates, state.last_update)
        total = state.alignment + alignment(state.last_update, deltas)
        total = jnp.clip(total, min_rate - init_rate, max_rate - init_rate)
        total = total.astype(state.alignment.dtype)

        def step(delta: Array, last: Array) -> tuple[Array, Array]:
            # (a + A) D + m A L_old, written with the new L: the old one need not be kept.
            last = delta + momentum * last
            return init_rate * delta + total.astype(delta.dtype) * last, last

        updates, last = map_leaves(step, after(total, updates), state.last_update)
        return updates, FedHyperServerState(total, last)

    return transformation(_server_state, update)


def fedhyper_server_local(
    local_lr: Any, *, min_lr: Any = 0.001, max_lr: Any = 0.1
) -> RateController:
    r"""The rate that the server hands to all clients for the next round (FedHyper-SL).

    .. math::

        A_r = A_{r-1} + \langle D_{r-1}, D_r\rangle, \qquad
        \eta_{r+1} = \operatorname{clip}(\eta_0 (1 + A_r), \eta_{min}, \eta_{max})

    Args:
      local_lr: eta_0, > 0, the rate of the clients in the first round.
      min_lr: lower bound.
      max_lr: upper bound.

    Returns:
      ``(init, update)``: ``update(mean_delta, state)`` gives the rate of the next round and the new
      state. The server itself applies the mean delta at rate 1.

    Raises:
      ValueError: if an argument is out of range, or a delta has another shape.

    Only the rate is bounded, not the sum. The authors' main program computes these rates and then
    overwrites them; this is the rule as meant, and agrees with the rates that it computes.

    >>> init, update = fedhyper_server_local(0.01)
    >>> state = init(jnp.zeros(1))
    >>> for delta in (1.0, 0.5):
    ...     rate, state = update(jnp.array([delta]), state)
    >>> round(float(rate), 6)  # 0.01 * (1 + 1.0 * 0.5)
    0.015

    Reference: Wang et al., ICLR 2024, arXiv 2310.03156.
    """
    check_range(local_lr=local_lr, min_lr=min_lr, max_lr=max_lr, gt=0)
    check_range(**{"max_lr - min_lr": max_lr - min_lr}, ge=0)

    def update(mean_delta: PyTree, state: FedHyperServerState) -> tuple[Array, FedHyperServerState]:
        deltas = checked_delta(mean_delta, state.last_update)
        total = state.alignment + alignment(state.last_update, deltas)
        total = total.astype(state.alignment.dtype)
        rate = jnp.clip(local_lr * (1 + total), min_lr, max_lr)
        return rate.astype(total.dtype), FedHyperServerState(total, deltas)

    return RateController(_server_state, update)


PAPER = (
    'Wang et al., "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning '
    'with Hypergradient Descent", ICLR 2024, arXiv 2310.03156'
)
RECORD = Method(
    factory=fedhyper_global,
    kind="piece",
    summary="FedHyper's server: a rate that follows the product of successive mean deltas",
    example={"momentum": 0.9, "min_rate": 0.8},
    traced=("init_rate", "min_rate", "max_rate", "momentum"),
    position="alone",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=28,  # 20, and delta and last delta once more for the product
    paper=PAPER,
    reference="ATP-1010/FedHyper@d6a57c54d7e9293cabedc8f80c7d61d3cc321633:src/federated_main.py",
    licence="",
)
