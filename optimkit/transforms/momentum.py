"""Momentum, as an average or as a sum, with Nesterov's mix."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from optimkit.leaves import map_leaves, zero_count, zeros_like
from optimkit.numerics import check_choice, check_range, next_count
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class EmaMomentumState(NamedTuple):
    """``mu``: momentum, one array a parameter."""

    mu: PyTree


class DampenedTraceState(NamedTuple):
    """``trace``: momentum accumulated without averaging, one array a parameter."""

    trace: PyTree


class DampenedTraceCopyState(NamedTuple):
    """``count``: int32 scalar, which tells the first step. ``trace``: one array a parameter."""

    count: Array
    trace: PyTree


_TraceState: TypeAlias = DampenedTraceState | DampenedTraceCopyState


def ema_momentum(
    decay: Any,
    *,
    nesterov: bool = False,
    form: Literal["ema", "sum"] = "ema",
    mu_dtype: Any = None,
) -> GradientTransformation:
    r"""Replaces the gradient by its momentum, from zero and without bias correction.

    .. math::

        \text{ema:} \quad & m_t = b\, m_{t-1} + (1-b)\, g_t, \qquad
            u_t = b\, m_t + (1-b)\, g_t \text{ with Nesterov, else } m_t \\
        \text{sum:} \quad & m_t = b\, m_{t-1} + g_t, \qquad
            u_t = b\, m_t + g_t \text{ with Nesterov, else } m_t

    The two forms differ by the factor 1 - b.

    Args:
      decay: b, in [0, 1).
      nesterov: mix the gradient in once more.
      form: ``"ema"`` averages, ``"sum"`` accumulates.
      mu_dtype: dtype of the momentum; default f32, or f64 for f64 gradients.

    Returns:
      A transformation that works anywhere in a chain; 4 bytes of state a f32 parameter.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The update grows with the gradient; in the sum form up to 1/(1 - b) times the largest.

    >>> import jax.numpy as jnp
    >>> tx = ema_momentum(0.5, nesterov=True)
    >>> updates, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> state.mu.tolist(), updates.tolist()
    ([2.0], [3.0])
    """
    check_range(decay=decay, ge=0, lt=1)
    check_choice(("ema", "sum"), form=form)

    def init(params: PyTree) -> EmaMomentumState:
        return EmaMomentumState(zeros_like(params, mu_dtype))

    def update(
        updates: PyTree, state: EmaMomentumState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, EmaMomentumState]:
        del params, extra

        def step(g: Array, m: Array) -> tuple[Array, Array]:
            fresh = (1 - decay) * g if form == "ema" else g
            m = decay * m + fresh
            return (decay * m + fresh if nesterov else m), m

        updates, mu = map_leaves(step, updates, state.mu)
        return updates, EmaMomentumState(mu)

    return transformation(init, update)


def dampened_trace(
    momentum: Any,
    dampening: Any = 0.0,
    nesterov: bool = False,
    first: Literal["dampened", "copy"] = "dampened",
) -> GradientTransformation:
    r"""Accumulates gradients as SGD with momentum does in PyTorch.

    .. math::

        b_t = \mu\, b_{t-1} + (1-\tau)\, g_t, \qquad
        u_t = g_t + \mu\, b_t \text{ with Nesterov, else } b_t

    Args:
      momentum: mu, in [0, 1].
      dampening: tau, in [0, 1].
      nesterov: look ahead; PyTorch allows it at dampening 0 only.
      first: ``"dampened"`` uses the rule from the first step on; ``"copy"`` starts with
        :math:`b_1 = g_1`, undampened, as ``torch.optim.SGD`` does.

    Returns:
      A transformation that works anywhere in a chain; 4 bytes of state a f32 parameter, and a
      count where ``first="copy"``.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The update grows with the gradient. At dampening 0 it is ``optax.trace``, kept in f32 at least.

    >>> import jax.numpy as jnp
    >>> tx = dampened_trace(0.5, dampening=0.25, first="copy")
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([4.0]), state)
    >>> updates.tolist()  # 0.5 * 4 + 0.75 * 4
    [5.0]
    """
    check_range(momentum=momentum, dampening=dampening, ge=0, le=1)
    check_choice(("dampened", "copy"), first=first)

    def init(params: PyTree) -> _TraceState:
        trace = zeros_like(params)
        if first == "copy":
            return DampenedTraceCopyState(zero_count(), trace)
        return DampenedTraceState(trace)

    def update(
        updates: PyTree, state: _TraceState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, _TraceState]:
        del params, extra
        keep: Any = 1 - dampening
        if isinstance(state, DampenedTraceCopyState):
            keep = jnp.where(state.count == 0, 1.0, keep)

        def step(g: Array, b: Array) -> tuple[Array, Array]:
            b = momentum * b + keep * g
            return (g + momentum * b if nesterov else b), b

        updates, trace = map_leaves(step, updates, state.trace)
        if isinstance(state, DampenedTraceCopyState):
            return updates, DampenedTraceCopyState(next_count(state.count), trace)
        return updates, DampenedTraceState(trace)

    return transformation(init, update)


RECORDS = (
    Method(
        factory=ema_momentum,
        kind="piece",
        summary="momentum as an average or a sum, with Nesterov's mix",
        example={"decay": 0.9, "nesterov": True},
        traced=("decay",),
        static=("nesterov", "form", "mu_dtype"),
        position="any",
        communication="none",
        response="proportional",
        state_bytes=4,
        moved_bytes=20,
        paper='Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024',
        reference="KellerJordan/Muon@857d1adc15:muon.py:muon_update",
        licence="MIT",
    ),
    Method(
        factory=dampened_trace,
        kind="piece",
        summary="momentum of SGD, with dampening",
        example={"momentum": 0.9, "dampening": 0.1, "first": "copy"},
        traced=("momentum", "dampening"),
        static=("nesterov", "first"),
        position="any",
        communication="none",
        response="proportional",
        state_bytes=4,
        moved_bytes=20,
        paper='Sutskever et al., "On the importance of initialization and momentum in deep '
        'learning", ICML 2013',
        reference="pytorch/pytorch:torch/optim/sgd.py:SGD",
        licence="BSD-3-Clause",
    ),
)
