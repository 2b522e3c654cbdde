"""Acceleration between rounds of preference optimization: move on along the last round's change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.controllers.predictors import extrapolate_parameters
from optimkit.controllers.run import copy_tree
from optimkit.leaves import check_match, check_real, zero_count
from optimkit.numerics import check_choice, check_range, compute_dtype, narrow, next_count
from optimkit.protocols import Array, PyTree, ScalarOrSchedule


class OuterState(NamedTuple):
    """``prev_hat``: the last round's solution, before extrapolation. ``round``: int32 scalar."""

    prev_hat: PyTree
    round: Array


class OuterAccelerator(NamedTuple):
    """``init(params) -> state``; ``update(solution, state, *, last=False) -> (params, state)``."""

    init: Callable[[PyTree], OuterState]
    update: Callable[..., tuple[PyTree, OuterState]]


def accelerate_outer(
    alpha: ScalarOrSchedule,
    *,
    space: Literal["parameters", "logits"] = "parameters",
    skip_last: bool = False,
) -> OuterAccelerator:
    r"""Nesterov's extrapolation between the rounds of iterative preference optimization (APO).

    A round trains a policy against the one it began with, and gives :math:`\hat\theta_{t+1}`. The
    next round begins with, samples from and refers to

    .. math:: \theta_{t+1} = \hat\theta_{t+1} + \alpha_t (\hat\theta_{t+1} - \hat\theta_t), \qquad
        \hat\theta_0 = \theta_0

    Args:
      alpha: in [0, 1), or a schedule over the 0-based round; 0 is plain iterative DPO. No value is
        known to be the authors'.
      space: ``"parameters"``, or ``"logits"`` for trees of logits or log-probabilities, which come
        back normalised over the last axis.
      skip_last: with ``update(..., last=True)``, return the last solution itself (ours).

    Returns:
      An ``OuterAccelerator``; its state is one copy of the parameters, used once a round.

    Raises:
      ValueError: if alpha is out of range, or the solution is another tree than the first.

    The first round is extrapolated, too. With exact rounds and a fixed reward the increments tend
    to 1/(1 - alpha) of plain ones. Norms grow with alpha: watch them. Two factors of a low-rank
    adapter, extrapolated each for itself, are not their product extrapolated: merge first.

    Provisional: no code of the paper was found; the rule follows its abstract and summaries.

    >>> init, update = accelerate_outer(0.5)
    >>> params, state = update(jnp.float32(2.0), init(jnp.float32(1.0)))
    >>> float(params), float(state.prev_hat)
    (2.5, 2.0)

    Reference: He et al., "Accelerated Preference Optimization for Large Language Model Alignment",
    2024, arXiv 2410.06293.
    """
    check_range(alpha=alpha, ge=0, lt=1)
    check_choice(("parameters", "logits"), space=space)

    def init(params: PyTree) -> OuterState:
        return OuterState(copy_tree(params), zero_count())

    def update(
        hat_params: PyTree, state: OuterState, *, last: bool = False
    ) -> tuple[PyTree, OuterState]:
        check_match(hat_params, state.prev_hat, what="solution", like="the state")
        now = alpha(state.round) if callable(alpha) else alpha
        kept = OuterState(copy_tree(hat_params), next_count(state.round))
        if skip_last and last:
            return hat_params, kept
        if space == "parameters":
            return extrapolate_parameters(hat_params, state.prev_hat, now), kept
        new = jax.tree.map(
            lambda hat, prev: extrapolate_log_policy(hat, prev, now), hat_params, state.prev_hat
        )
        return new, kept

    return OuterAccelerator(init, update)


def extrapolate_log_policy(
    log_hat: Array, log_hat_prev: Array, alpha: Any, *, axis: int = -1
) -> Array:
    r"""The policy proportional to :math:`\hat\pi\, (\hat\pi / \hat\pi_{prev})^\alpha`, as its log.

    Args:
      log_hat: logits or log-probabilities of the newest solution.
      log_hat_prev: those of the one before.
      alpha: how far, >= 0.
      axis: the axis of the actions.

    Returns:
      Normalised log-probabilities. An action with probability 0 in either policy keeps that of
      ``log_hat``, before normalising: a masked token stays masked.

    Raises:
      ValueError: if the shapes differ, or alpha is negative.

    >>> before, now = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
    >>> policy = jnp.exp(extrapolate_log_policy(now, before, 1.0))
    >>> round(float(policy[0] / policy[1]), 3)  # 1, then 4, then 4 times 4
    16.0

    Reference: He et al., 2024, arXiv 2410.06293. Provisional.
    """
    check_range(alpha=alpha, ge=0)
    check_match(log_hat_prev, log_hat, what="previous log policy", like="the newest")
    check_real(log_hat, "log policy")
    wide = compute_dtype(log_hat, log_hat_prev)
    new, old = jnp.asarray(log_hat, wide), jnp.asarray(log_hat_prev, wide)
    known = jnp.isfinite(new) & jnp.isfinite(old)
    change = jnp.where(known, new, 0) - jnp.where(known, old, 0)
    moved = jnp.where(known, new + jnp.asarray(alpha, wide) * change, new)
    return narrow(jax.nn.log_softmax(moved, axis=axis), jnp.result_type(log_hat))


extrapolate_policy = extrapolate_log_policy
"""The same under a shorter name."""
