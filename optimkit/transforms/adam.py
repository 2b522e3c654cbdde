"""Adam's direction: first moment over the root of the second, each corrected for its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import map_leaves, zero_count, zeros_like
from optimkit.numerics import check_choice, check_range, next_count, one_minus_power, saturate
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)

EPS_FORMS = ("standard", "before_bias_correction")


class ScaleByAdamState(NamedTuple):
    """``count``: int32 scalar. ``mu``, ``nu``: first and second moment, one array a parameter."""

    count: Array
    mu: PyTree
    nu: PyTree


def scale_by_adam(
    b1: ScalarOrSchedule = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    nesterov: bool = False,
    eps_form: Literal["standard", "before_bias_correction"] = "standard",
    mu_dtype: Any = None,
    bias_correction: bool = True,
) -> GradientTransformation:
    r"""Rescales gradients by Adam's moments.

    .. math::

        m_t &= b_1 m_{t-1} + (1-b_1) g_t, \qquad v_t = b_2 v_{t-1} + (1-b_2) g_t^2 \\
        u_t &= \frac{m_t / (1-b_1^t)}{\sqrt{v_t/(1-b_2^t)} + \epsilon}

    Args:
      b1: decay of the first moment, in [0, 1). A schedule is called with the extra argument
        ``global_count`` where a wrapper hands one on, else with the own 0-based count; powers use
        the current value, not a running product.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      nesterov: use ``b1 m_t + (1-b1) g_t`` in place of ``m_t``, both over ``1-b1^t``: AdamP's form.
        ``optax.scale_by_adam(nesterov=True)`` corrects ``m_t`` with ``b1^(t+1)`` instead.
      eps_form: ``"standard"`` as above; ``"before_bias_correction"`` adds eps to the uncorrected
        root, ``m / (sqrt(v) + eps) * sqrt(1-b2^t) / (1-b1^t)``, as Hugging Face's AdamW, SPAM,
        GaLore and Moonlight do.
      mu_dtype: dtype of the first moment; default f32, or f64 for f64 gradients.
      bias_correction: False leaves both moments uncorrected, m / (sqrt(v) + eps).

    Returns:
      A transformation that gives a direction (no rate, no sign). It keeps 8 bytes a f32 parameter.

    Raises:
      ValueError: if an argument is out of range.

    Differs from ``optax.scale_by_adam``: it computes in f32 at least, so a zero float16 gradient
    does not give NaN, and entries above 1e15 (f32) count as 1e15, so that squares never overflow.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_adam()
    >>> updates, _ = tx.update(jnp.array([2.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> [round(float(u), 3) for u in updates]
    [1.0, -1.0]

    Reference: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv 1412.6980.
    """
    check_range(b1=b1, b2=b2, ge=0, lt=1)
    check_range(eps=eps, ge=0)
    check_choice(EPS_FORMS, eps_form=eps_form)

    def init(params: PyTree) -> ScaleByAdamState:
        return ScaleByAdamState(zero_count(), zeros_like(params, mu_dtype), zeros_like(params))

    def update(
        updates: PyTree, state: ScaleByAdamState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByAdamState]:
        del params
        count = next_count(state.count)
        decay: Any = b1(extra.get("global_count", state.count)) if callable(b1) else b1
        step = adam_rule(
            decay, b2, eps, count if bias_correction else None, nesterov=nesterov, eps_form=eps_form
        )
        updates, mu, nu = map_leaves(step, updates, state.mu, state.nu)
        return updates, ScaleByAdamState(count, mu, nu)

    return transformation(init, update)


def adam_rule(
    b1: Any,
    b2: Any,
    eps: Any,
    count: Array | None,
    *,
    nesterov: bool = False,
    eps_form: Literal["standard", "before_bias_correction"] = "standard",
) -> Callable[[Array, Array, Array], tuple[Array, Array, Array]]:
    """Adam for one array at the 1-based ``count``: ``(g, m, v) -> (direction, new m, new v)``.

    Without a count, the moments stay uncorrected.
    """
    mu_correction = 1.0 if count is None else one_minus_power(b1, count)
    nu_correction = 1.0 if count is None else one_minus_power(b2, count)

    def step(g: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
        g = saturate(g)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * jnp.square(g)
        top = b1 * m + (1 - b1) * g if nesterov else m
        if eps_form == "standard":
            direction = (top / mu_correction) / (jnp.sqrt(v / nu_correction) + eps)
        else:
            direction = top / (jnp.sqrt(v) + eps) * (nu_correction**0.5 / mu_correction)
        return direction, m, v

    return step


RECORD = Method(
    factory=scale_by_adam,
    kind="piece",
    summary="Adam's direction, with both placements of eps",
    traced=("b1", "b2", "eps"),
    static=("nesterov", "eps_form", "mu_dtype", "bias_correction"),
    position="middle",
    communication="none",
    response="bounded",
    state_bytes=8,
    moved_bytes=28,
    paper='Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv 1412.6980',
    reference="google-deepmind/optax (agreement tested)",
    licence="Apache-2.0",
)
