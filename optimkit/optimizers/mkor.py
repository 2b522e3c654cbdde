"""MKOR and MKOR-H: inverse Kronecker factors in front of an ordinary optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Method, PyTree, ScalarOrSchedule
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.mkor import (
    PAPER,
    REFERENCE,
    STATIC,
    TRACED,
    scale_by_mkor,
)
from optimkit.transforms.mkor_factors import Reset, UpdateRule
from optimkit.transforms.mkor_layers import Skip, example_stats
from optimkit.transforms.momentum import dampened_trace
from optimkit.wrappers.hybrid import SwitchCriterion, hybrid


def mkor(
    learning_rate: ScalarOrSchedule = None,
    inner: optax.GradientTransformation | None = None,
    *,
    b1: Any = 0.9,
    weight_decay: Any = 0.0,
    inv_freq: int = 10,
    warmup_steps: int = 0,
    factor_decay: Any = 0.95,
    threshold: Any = 2.0,
    stabilization: Any = 0.1,
    clip: Any = 100.0,
    update_rule: UpdateRule = "code",
    reset: Reset = "identity",
    factor_dtype: Any = None,
    skip: Skip = (),
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""Second-order steps for a tenth of the usual price: K-FAC's factors, inverted by rank one.

    ``scale_by_mkor`` in front of SGD with momentum, or of ``inner``:

    .. math:: g \leftarrow \operatorname{mkor}(g) + \lambda w, \qquad
        m \leftarrow b_1 m + g, \qquad w \leftarrow w - \eta\, m

    Args:
      learning_rate: step size, or a schedule over the 0-based count. Give this or ``inner``.
      inner: the whole optimizer behind, its rate included; the authors' BERT has ``lamb``.
      b1: momentum of SGD, in [0, 1); without ``inner``.
      weight_decay: lambda, >= 0, added behind the factors; without ``inner``.
      inv_freq: steps between two refreshes of the factors; this and all that follows as for
        ``scale_by_mkor``.
      warmup_steps: the factors are refreshed at every one of the first steps.
      factor_decay: gamma, in (0, 1).
      threshold: a factor with an entry above it is too large.
      stabilization: share of the identity that a factor that is too large gets, in [0, 1].
      clip: entries of the statistics are limited to this magnitude.
      update_rule: ``"code"``, ``"paper"`` or ``"exact"``.
      reset: ``"identity"`` or ``"blend"``.
      factor_dtype: dtype of the factors.
      skip: layers without factors; a layer with a vocabulary among its sides belongs here.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell.

    Returns:
      An optimizer that needs ``params`` and ``layer_stats`` in each update. 12 bytes of state a f32
      parameter of a square layer with SGD, 16 with LAMB.

    Raises:
      ValueError: if an argument is out of range, both or neither of ``learning_rate`` and ``inner``
        are given, or statistics are missing or of another shape.

    How to gather the statistics: build the model from ``optimkit.nn.TappedDense`` and its like,
    differentiate by parameters and taps at once, and hand on
    ``optimkit.nn.collect_layer_stats(tap_gradients)``; ``examples/mkor_digits.py`` does it. The
    factors keep the gradient's norm, so a rate that suits the optimizer behind is a good start.

    >>> import jax.numpy as jnp
    >>> tx = mkor(0.1, b1=0.0)
    >>> params = {"dense": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}}
    >>> stats = {"dense": {"a": jnp.ones(2), "g": jnp.ones(1)}}
    >>> updates, _ = tx.update(params, tx.init(params), params, layer_stats=stats)
    >>> [round(float(u), 3) for u in updates["dense"]["kernel"][:, 0]]  # the factors begin as 1
    [-0.1, -0.1]

    Reference: Mozaffari et al., "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
    Rank-1 Updates", NeurIPS 2023, arXiv 2306.01685.
    """
    direction = scale_by_mkor(
        inv_freq=inv_freq,
        warmup_steps=warmup_steps,
        factor_decay=factor_decay,
        threshold=threshold,
        stabilization=stabilization,
        clip=clip,
        update_rule=update_rule,
        reset=reset,
        factor_dtype=factor_dtype,
        skip=skip,
        matrix_axes=matrix_axes,
    )
    return recipe(direction, *_behind(learning_rate, inner, b1, weight_decay))


def mkor_h(
    learning_rate: ScalarOrSchedule = None,
    inner: optax.GradientTransformation | None = None,
    *,
    criterion: SwitchCriterion | None = None,
    b1: Any = 0.9,
    weight_decay: Any = 0.0,
    inv_freq: int = 10,
    warmup_steps: int = 0,
    factor_decay: Any = 0.95,
    threshold: Any = 2.0,
    stabilization: Any = 0.1,
    clip: Any = 100.0,
    update_rule: UpdateRule = "code",
    reset: Reset = "identity",
    factor_dtype: Any = None,
    skip: Skip = (),
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    """MKOR that drops to the optimizer behind it, for good, once the loss falls slowly.

    Args:
      learning_rate: step size, or a schedule over the 0-based count. Give this or ``inner``.
      inner: the whole optimizer behind, its rate included.
      criterion: what decides on the switch; default ``optimkit.wrappers.loss_decrease_rate()``.
      b1: momentum of SGD; this and all that follows as for ``mkor``.
      weight_decay: added behind the factors.
      inv_freq: steps between two refreshes of the factors.
      warmup_steps: the factors are refreshed at every one of the first steps.
      factor_decay: gamma, in (0, 1).
      threshold: a factor with an entry above it is too large.
      stabilization: share of the identity that a factor that is too large gets, in [0, 1].
      clip: entries of the statistics are limited to this magnitude.
      update_rule: ``"code"``, ``"paper"`` or ``"exact"``.
      reset: ``"identity"`` or ``"blend"``.
      factor_dtype: dtype of the factors.
      skip: layers without factors.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell.

    Returns:
      An optimizer that needs ``params``, ``layer_stats`` and ``value``, the loss, in each update.
      The first entry of its state says in ``switched`` whether it has switched. The optimizer
      behind keeps its momentum; the factors rest, and still take their memory.

    Raises:
      ValueError: as ``mkor``, or without ``value``.

    Provisional: the authors say that the rate at which the loss falls decides, and published
    neither a rule nor code for it; the default is ours.

    >>> import jax.numpy as jnp
    >>> tx = mkor_h(0.1)
    >>> params = {"dense": {"kernel": jnp.ones((2, 1))}}
    >>> stats = {"dense": {"a": jnp.ones(2), "g": jnp.ones(1)}}
    >>> updates, state = tx.update(params, tx.init(params), params, value=1.0, layer_stats=stats)
    >>> bool(state[0].switched)
    False

    Reference: Mozaffari et al., "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
    Rank-1 Updates", NeurIPS 2023, arXiv 2306.01685.
    """
    direction = scale_by_mkor(
        inv_freq=inv_freq,
        warmup_steps=warmup_steps,
        factor_decay=factor_decay,
        threshold=threshold,
        stabilization=stabilization,
        clip=clip,
        update_rule=update_rule,
        reset=reset,
        factor_dtype=factor_dtype,
        skip=skip,
        matrix_axes=matrix_axes,
    )
    either = hybrid(direction, optax.identity(), criterion=criterion)
    return recipe(either, *_behind(learning_rate, inner, b1, weight_decay))


def _behind(
    learning_rate: ScalarOrSchedule,
    inner: optax.GradientTransformation | None,
    b1: Any,
    weight_decay: Any,
) -> tuple[optax.GradientTransformation, ...]:
    """The optimizer behind the factors."""
    if (learning_rate is None) == (inner is None):
        raise ValueError(
            "give either learning_rate, for SGD with momentum behind the factors, or inner, an "
            "optimizer with its own rate"
        )
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    check_range(b1=b1, ge=0, lt=1)
    if inner is not None:
        return (inner,)
    return (
        decayed_weights(weight_decay),
        dampened_trace(b1),
        optax.scale_by_learning_rate(learning_rate),
    )


def _stats_and_loss(params: PyTree, grads: PyTree) -> Mapping[str, Any]:
    return {**example_stats(params, grads), "value": jnp.ones(())}


_EXAMPLE = {"learning_rate": 0.1, "inv_freq": 2, "weight_decay": 0.01}
_TRACED = ("learning_rate", "b1", "weight_decay", *TRACED)

RECORDS = (
    Method(
        factory=mkor,
        kind="recipe",
        summary="inverse Kronecker factors, kept by rank-one updates, before SGD or LAMB",
        example=_EXAMPLE,
        extras=example_stats,
        traced=_TRACED,
        static=("inner", *STATIC),
        needs=("params", "layer_stats"),
        position="alone",
        communication="matrix",
        response="proportional",
        state_bytes=12,
        moved_bytes=36,
        paper=PAPER,
        reference=REFERENCE,
        licence="MIT",
    ),
    Method(
        factory=mkor_h,
        kind="recipe",
        summary="MKOR that drops to the optimizer behind it once the loss falls slowly",
        example=_EXAMPLE,
        extras=_stats_and_loss,
        traced=_TRACED,
        static=("inner", "criterion", *STATIC),
        needs=("params", "layer_stats", "value"),
        position="alone",
        communication="matrix",
        response="proportional",
        state_bytes=12,
        moved_bytes=36,
        status="provisional",
        paper=PAPER,
        reference=REFERENCE,
        licence="MIT",
    ),
)
