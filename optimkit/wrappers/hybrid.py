"""One transformation until it stops paying, another from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, zero_count
from optimkit.numerics import (
    as_float,
    check_count,
    check_range,
    hyperparameter_dtype,
    next_count,
    safe_div,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.momentum import ema_momentum


class SwitchCriterion(NamedTuple):
    """Decides on a switch from the losses.

    ``init() -> state``; ``update(state, value) -> (state, switch)`` with a bool scalar.
    """

    init: Callable[[], PyTree]
    update: Callable[[PyTree, Array], tuple[PyTree, Array]]


class LossRateState(NamedTuple):
    """``count``: int32. The other fields are scalars: see ``STATE_FIELDS``."""

    count: Array
    loss_mean: Array
    loss_mark: Array
    best_decrease: Array
    slow_windows: Array


def loss_decrease_rate(
    window: int = 100, decay: Any = 0.95, share: Any = 0.1, patience: int = 2
) -> SwitchCriterion:
    """Switches when a running mean of the loss falls much slower than it once did.

    At the end of each window the mean's decrease since the window began, over the mean then, is
    compared with the largest such decrease so far. ``patience`` windows in a row below ``share``
    of it call for the switch.

    Args:
      window: steps of a window, >= 1.
      decay: of the running mean, in [0, 1); it starts as the first loss.
      share: of the largest decrease, in [0, 1].
      patience: windows in a row, >= 1.

    Raises:
      ValueError: if an argument is out of range.

    Provisional: the authors of MKOR-H say that the rate of decrease decides, and not how; all four
    numbers are ours. A non-finite loss is passed over.

    >>> rule = loss_decrease_rate(window=1, decay=0.0, patience=1)
    >>> state, switches = rule.init(), []
    >>> for loss in (8.0, 4.0, 2.0, 1.95):
    ...     state, switch = rule.update(state, jnp.asarray(loss))
    ...     switches.append(bool(switch))
    >>> switches  # decreases of 1/2, 1/2 and 1/40
    [False, False, False, True]
    """
    check_count(window=window, patience=patience, least=1)
    check_range(decay=decay, ge=0, lt=1)
    check_range(share=share, ge=0, le=1)

    def init() -> LossRateState:
        zero = jnp.zeros((), hyperparameter_dtype())
        return LossRateState(zero_count(), zero, zero, zero, zero_count())

    def update(state: LossRateState, value: Array) -> tuple[LossRateState, Array]:
        value = jnp.asarray(value, state.loss_mean.dtype)
        first = state.count == 0
        mean = jnp.where(first, value, decay * state.loss_mean + (1 - decay) * value)
        mark = jnp.where(first, value, state.loss_mark)
        ends = ~first & (state.count % window == 0)
        fall = safe_div(mark - mean, jnp.abs(mark))
        best = jnp.where(ends, jnp.maximum(state.best_decrease, fall), state.best_decrease)
        slow = jnp.where(fall < share * best, state.slow_windows + 1, 0)
        slow = jnp.where(ends, slow, state.slow_windows).astype(jnp.int32)
        new = LossRateState(next_count(state.count), mean, jnp.where(ends, mean, mark), best, slow)
        new = jax.tree.map(
            lambda n, o: jnp.where(jnp.isfinite(mean), n, o).astype(o.dtype), new, state
        )
        return new, new.slow_windows >= patience

    return SwitchCriterion(init, update)


class HybridState(NamedTuple):
    """``switched``: bool scalar. The states of both transformations and of the criterion."""

    switched: Array
    first_state: PyTree
    second_state: PyTree
    criterion_state: PyTree


def hybrid(
    first: optax.GradientTransformation,
    second: optax.GradientTransformation,
    *,
    criterion: SwitchCriterion | None = None,
) -> GradientTransformation:
    """Runs ``first`` until the criterion calls for the switch, and ``second`` for good after it.

    Args:
      first: runs from the start.
      second: runs after the switch, from the state that its ``init`` gave.
      criterion: what decides; default ``loss_decrease_rate()``.

    Returns:
      A transformation whose ``update`` takes ``value``, the loss, and what both need. It keeps the
      states of both; ``state.switched`` says which one runs. The one that rests computes nothing.

    Raises:
      ValueError: from ``update``, without ``value``, or for a gradient of another tree or shape.
      TypeError: for a complex or integer leaf.

    Put what both share, momentum above all, behind it: ``chain(hybrid(scale_by_mkor(),
    optax.identity()), ...)`` keeps the momentum over the switch. The loss of the very step decides
    already. Under ``vmap`` over losses both run.

    >>> rule = loss_decrease_rate(window=1, decay=0.0, patience=1)
    >>> tx = hybrid(optax.scale(1.0), optax.scale(-1.0), criterion=rule)
    >>> g, state = jnp.ones(1), tx.init(jnp.ones(1))
    >>> for loss in (8.0, 4.0, 3.99):
    ...     updates, state = tx.update(g, state, g, value=loss)
    >>> updates.tolist(), bool(state.switched)
    ([-1.0], True)

    Reference: MKOR-H in Mozaffari et al., NeurIPS 2023, arXiv 2306.01685.
    """
    rule = loss_decrease_rate() if criterion is None else criterion
    first = optax.with_extra_args_support(first)
    second = optax.with_extra_args_support(second)

    def init(params: PyTree) -> HybridState:
        return HybridState(
            jnp.zeros((), bool), first.init(params), second.init(params), rule.init()
        )

    def update(
        updates: PyTree,
        state: HybridState,
        params: PyTree | None = None,
        *,
        value: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, HybridState]:
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        if value is None:
            raise ValueError("hybrid needs the loss: call update(..., value=loss)")
        criterion_state, now = rule.update(state.criterion_state, value)
        switched = state.switched | now

        def one(kept: Any) -> Any:
            new, inner = first.update(updates, kept[0], params, value=value, **extra)
            return new, (inner, kept[1])

        def other(kept: Any) -> Any:
            new, inner = second.update(updates, kept[1], params, value=value, **extra)
            return new, (kept[0], inner)

        new, states = jax.lax.cond(switched, other, one, (state.first_state, state.second_state))
        return new, HybridState(switched, states[0], states[1], criterion_state)

    return transformation(init, update)


def _falling_loss(params: PyTree, grads: PyTree) -> dict[str, Any]:
    del params, grads
    return {"value": as_float(1.0)}


RECORD = Method(
    factory=hybrid,
    kind="wrapper",
    summary="one transformation until the loss falls slowly, then another",
    example_made={"first": lambda: ema_momentum(0.9), "second": optax.identity},
    extras=_falling_loss,
    static=("first", "second", "criterion"),
    needs=("value",),
    position="any",
    communication="none",
    response="proportional",
    state_bytes=4,
    moved_bytes=20,
    status="provisional",
    paper='Mozaffari et al., "MKOR", NeurIPS 2023, arXiv 2306.01685: the idea, without a rule',
)
