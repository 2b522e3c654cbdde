"""An average of the parameters inside the optimizer state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, narrow_like, require_params, widen
from optimkit.numerics import narrow
from optimkit.protocols import GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.adam import scale_by_adam
from optimkit.wrappers.averagers import Averager
from optimkit.wrappers.ema_params import ema_params


class AveragedParamsState(NamedTuple):
    """``inner_state``: of the wrapped transformation. ``averager_state``: of the averager."""

    inner_state: PyTree
    averager_state: PyTree


def with_averaged_params(
    inner: optax.GradientTransformation, averager: Averager
) -> GradientTransformation:
    """Runs ``inner`` unchanged and keeps an average of the parameters beside its state.

    Args:
      inner: the whole optimizer.
      averager: ``optimkit.wrappers.ema_params``, ``uniform_window_average`` or
        ``weighted_running_average``, or any other ``Averager``. It is fed the parameters after each
        step, or, where it says ``before_step``, those before it.

    Returns:
      A transformation that needs ``params`` and must be the last link of its chain, since it adds
      the update to them itself. It keeps the state of ``inner`` and that of the averager.

    Raises:
      ValueError: if params are missing or a gradient has another shape.
      TypeError: for complex or integer leaves.

    ``averaged_params(opt_state, params)`` reads the average. Training does not change. Average
    BatchNorm statistics with the same averager, or take them anew at the average.

    >>> import optax, optimkit as ok
    >>> tx = with_averaged_params(optax.sgd(1.0), ema_params(0.5))
    >>> params = jnp.array([4.0]); state = tx.init(params)
    >>> for _ in range(2):  # the parameters become 3, then 2
    ...     updates, state = tx.update(jnp.ones(1), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> ok.averaged_params(state, params).tolist()
    [2.5]

    Reference: Luo et al., "How Learning Rate Decay Wastes Your Best Data in Curriculum-Based LLM
    Pretraining", ICLR 2026, arXiv 2511.18903; Hagele et al., 2024, arXiv 2405.18392.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> AveragedParamsState:
        return AveragedParamsState(inner.init(params), averager.init(params))

    def update(
        updates: PyTree, state: AveragedParamsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AveragedParamsState]:
        params = require_params(params, "with_averaged_params")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        fed = params
        if not averager.before_step:
            moved = jax.tree.map(jnp.add, widen(params), widen(updates, params))
            fed = narrow_like(moved, params)  # what the loop will hold
        return updates, AveragedParamsState(inner_state, averager.update(fed, state.averager_state))

    return transformation(init, update)


def averaged_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The average that ``with_averaged_params`` keeps, to evaluate, to teach with or to ship.

    Args:
      opt_state: any optimizer state that holds one such average, however deep.
      params: the parameters; they give the dtypes, and the leaves that were masked out.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: if ``opt_state`` holds no average or several, or the trees differ.

    >>> import optax, optimkit as ok
    >>> tx = optax.chain(optax.clip(1.0), with_averaged_params(optax.sgd(1.0), ema_params(0.5)))
    >>> params = jnp.array([4.0])
    >>> ok.averaged_params(tx.init(params), params).tolist()
    [4.0]
    """

    def is_average(node: Any) -> bool:
        return isinstance(node, AveragedParamsState)

    nodes = [n for n in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(n)]
    if len(nodes) != 1:
        raise ValueError(
            f"opt_state holds {len(nodes) or 'no'} states of with_averaged_params, it must hold "
            "exactly one" + ("; pass the part that is meant" if nodes else "")
        )

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def one(kept: Any, p: Any) -> Any:
        return p if masked(kept) else narrow(kept, jnp.result_type(p))

    return jax.tree.map(one, nodes[0].averager_state.value, params, is_leaf=masked)


RECORD = Method(
    factory=with_averaged_params,
    kind="wrapper",
    summary="keep a running average of the parameters beside the optimizer state",
    example_made={"inner": scale_by_adam, "averager": lambda: ema_params(0.9)},
    static=("inner", "averager"),
    needs=("params",),
    position="last",
    communication="none",
    response="bounded",
    state_bytes=12,
    moved_bytes=36,
    paper='Luo et al., "How Learning Rate Decay Wastes Your Best Data in Curriculum-Based LLM '
    'Pretraining", ICLR 2026, arXiv 2511.18903; Hagele et al., "Scaling Laws and Compute-Optimal '
    'Training Beyond Fixed Training Durations", 2024, arXiv 2405.18392',
    reference="epfml/schedules-and-scaling@17e78d600a7054bc6609a5ca6d050d141d4ad79e:"
    "src/optim/weight_averaging.py",
    licence="MIT",
)
