"""A rate from how far a step of that size would drift from the gradient flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.gradients.hessian import METHODS, hessian_gradient
from optimkit.leaves import (
    check_match,
    check_real,
    matching_leaves,
    narrow_like,
    require_params,
    widen,
    zero_count,
)
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    hyperparameter_dtype,
    next_count,
    safe_div,
    tree_norm,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class ScaleByDriftState(NamedTuple):
    """``count``: int32 scalar. ``learning_rate``: the last rate, f32 or better."""

    count: Array
    learning_rate: Array


def drift_rate(grad_norm: Array, hg_norm: Array, power: Any, max_learning_rate: Any) -> Array:
    """``2 / (hg_norm / grad_norm)**power``, at most the largest rate, which a zero norm gives.

    >>> import jax.numpy as jnp
    >>> float(drift_rate(jnp.float32(1.0), jnp.float32(8.0), 1.0, 5.0))
    0.25
    """
    flatness = safe_div(grad_norm, hg_norm, otherwise=jnp.inf)
    flatness = jnp.where(grad_norm == 0, jnp.inf, flatness)
    return jnp.minimum(2 * flatness**power, max_learning_rate)


def scale_by_drift(
    power: Any = 1.0,
    max_learning_rate: Any = 5.0,
    *,
    static_learning_rate: Any = 0.1,
    start: int | None = None,
    stop: int | None = None,
    hvp: Literal["exact", "finite_difference"] = "exact",
) -> GradientTransformation:
    r"""Multiplies the gradient by a rate that keeps the drift of a step in bounds.

    A step of size eta departs from the gradient flow by about :math:`\eta^2/2\, H g`. With norms
    over all leaves:

    .. math:: \eta_t = \min\Bigl(2 \Bigl(\frac{\|g_t\|}{\|H_t g_t\|}\Bigr)^{p},\; \eta_{max}\Bigr)

    Args:
      power: p, >= 0. 1 keeps the rate at or below two over the curvature along the gradient; a
        smaller power takes larger steps where that curvature is above 1. 0: the static rate.
      max_learning_rate: largest rate, > 0; 5 is the authors' code.
      static_learning_rate: rate outside the interval, and for power 0, >= 0. The authors give no
        value; 0.1 is ours.
      start: the rule rests at counts (from 0) up to and including this one. As in the authors'
        code, None and 0 both mean no limit: the rule is on at count 0.
      stop: the rule rests from this count on; None and 0: never.
      hvp: how ``value_fn`` is used for the Hessian's product, see ``hessian_gradient``.

    Returns:
      A transformation that gives the step without its sign: chain it with ``optax.scale(-1)``.
      Each update takes, as an extra argument, either ``hg``, the tree H g, or ``value_fn``, the
      loss on the same batch as a function of the parameters (``loss_fn`` is taken as well), and
      then needs ``params``. ``state.learning_rate`` is the last rate. No state per parameter.
      Inside ``shard_map`` each device must hold all leaves whole.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or ``hg`` and
        ``value_fn`` are both missing.

    Costs one product with the Hessian a step, about one more forward and backward pass; none is
    taken while the rule rests. The rate can reach two over the largest curvature even at power 1,
    where the loss oscillates instead of falling; below power 1 it can diverge. A zero gradient
    gives the largest rate.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_drift()
    >>> w = jnp.array([1.0, 1.0])
    >>> u, state = tx.update(
    ...     jnp.array([3.0, 4.0]), tx.init(w), w, hg=jnp.array([0.0, 20.0])
    ... )
    >>> float(state.learning_rate), u.tolist()  # 2 * 5 / 20
    (0.5, [1.5, 2.0])

    Reference: Rosca et al., "On a continuous time model of gradient descent dynamics and
    instability in deep learning", TMLR 2023, arXiv 2302.01952. Agrees with the authors' code.
    """
    check_range(power=power, static_learning_rate=static_learning_rate, ge=0)
    check_range(max_learning_rate=max_learning_rate, gt=0)
    check_count(start=start or 0, stop=stop or 0)
    check_choice(METHODS, hvp=hvp)

    def init(params: PyTree) -> ScaleByDriftState:
        del params
        rate = jnp.array(static_learning_rate, hyperparameter_dtype(), copy=True)
        return ScaleByDriftState(zero_count(), rate)

    def product(updates: PyTree, params: PyTree | None, hg: PyTree, value_fn: Any) -> PyTree:
        if hg is not None:
            return matching_leaves(hg, updates, what="hg")
        if value_fn is None:
            raise ValueError(
                "scale_by_drift needs the Hessian's product or the loss: "
                "call update(..., hg=tree) or update(..., value_fn=loss)"
            )
        params = require_params(params, "scale_by_drift with value_fn")
        return hessian_gradient(value_fn, params, updates, hvp)

    def update(
        updates: PyTree,
        state: ScaleByDriftState,
        params: PyTree | None = None,
        *,
        hg: PyTree | None = None,
        value_fn: Callable[[PyTree], Any] | None = None,
        loss_fn: Callable[[PyTree], Any] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByDriftState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        dtype = state.learning_rate.dtype

        def adapted() -> Array:
            curved = product(updates, params, hg, value_fn or loss_fn)
            rate = drift_rate(tree_norm(updates), tree_norm(curved), power, max_learning_rate)
            return jnp.where(jnp.equal(power, 0), static_learning_rate, rate).astype(dtype)

        def static() -> Array:
            return jnp.asarray(static_learning_rate, dtype)

        if start or stop:
            active = state.count > (start or -1)
            active &= state.count < (stop or jnp.iinfo(jnp.int32).max)
            rate = jax.lax.cond(active, adapted, static)
        else:
            rate = adapted()
        new = jax.tree.map(lambda g: rate.astype(g.dtype) * g, widen(updates))
        return narrow_like(new, updates), ScaleByDriftState(next_count(state.count), rate)

    return transformation(init, update)


def _half(params: PyTree, grads: PyTree) -> dict[str, PyTree]:
    """A Hessian of one half."""
    return {"hg": jax.tree.map(lambda g: g / 2, grads)}


RECORD = Method(
    factory=scale_by_drift,
    kind="piece",
    summary="multiply the gradient by a rate that bounds the drift from its flow",
    extras=_half,
    traced=("power", "max_learning_rate", "static_learning_rate"),
    static=("start", "stop", "hvp"),
    needs=("hg",),
    position="last",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=20,  # 12, and the gradient and its product with the Hessian for the norms
    paper='Rosca et al., "On a continuous time model of gradient descent dynamics and instability '
    'in deep learning", TMLR 2023, arXiv 2302.01952',
    reference="google-deepmind/discretisation_drift@e5c5623981e2e8206c29c3e97c3a443bfc4b4061:"
    "principal_flow_instability_single_objective/dal.py",
    licence="Apache-2.0",
)
