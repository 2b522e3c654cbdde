"""Adaptive Memory: momentum whose coefficient a model of two planes gives anew at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import (
    check_match,
    check_real,
    narrow_like,
    scalars_like,
    widen,
    zero_count,
    zeros_like,
)
from optimkit.numerics import (
    LARGE,
    check_choice,
    check_range,
    compute_dtype,
    in_turn,
    next_count,
    one_minus_power,
    safe_div,
    saturate,
    sums_together,
)
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.rms_direction import RootMeanSquareState

PLANE_GAPS = ("anchored", "zero", "value")
SCOPES = ("global", "leaf")


class AdaptiveMemoryState(NamedTuple):
    """``mu``: the memory, one array a parameter. ``beta``: the last coefficient, f32.

    ``beta`` is one scalar, or one a leaf. ``plane_value``: height of the memory's plane at the
    parameters, one scalar, where loss values are used, else None. ``inner_state``: the
    preconditioner's.
    """

    count: Array
    mu: PyTree
    beta: PyTree
    plane_value: Array | None
    inner_state: PyTree


class Preconditioner(NamedTuple):
    """A diagonal matrix: ``init(params)``, ``update(grads, state)``, and what a state stands for.

    ``diagonal(state, scale)`` is the diagonal times a power of two. It is read twice, and with two
    scales, which cancel exactly, it is computed twice where it would else be stored.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree], PyTree]
    diagonal: Callable[[PyTree, float], PyTree]


class _Products(NamedTuple):
    """Inner products of the change r = gradient - memory and of the memory d."""

    rr: Array
    dr: Array
    dd: Array


def bias_corrected_rms(b2: Any = 0.999, eps: Any = 1e-8) -> Preconditioner:
    """Adam's diagonal: the root of the corrected second moment of the gradients, plus ``eps``."""
    check_range(b2=b2, ge=0, lt=1)
    check_range(eps=eps, gt=0)

    def init(params: PyTree) -> RootMeanSquareState:
        return RootMeanSquareState(zero_count(), zeros_like(params))

    def update(grads: PyTree, state: RootMeanSquareState) -> RootMeanSquareState:
        nu = jax.tree.map(
            lambda g, v: (b2 * v + (1 - b2) * jnp.square(g)).astype(v.dtype), grads, state.nu
        )
        return RootMeanSquareState(next_count(state.count), nu)

    def diagonal(state: RootMeanSquareState, scale: float) -> PyTree:
        correction = one_minus_power(b2, state.count)

        def root(v: Array) -> Array:
            return (jnp.sqrt(scale**2 * v / correction) + scale * eps).astype(v.dtype)

        return jax.tree.map(root, state.nu)

    return Preconditioner(init, update, diagonal)


def _limited(x: Array) -> Array:
    """``saturate`` in other words: two readers of the same words would make it be stored."""
    limit = LARGE[x.dtype.itemsize]
    return jnp.where(jnp.abs(x) < jnp.inf, jnp.clip(x, -limit, limit), x)


def _products(g: Array, d: Array, diagonal: Array | None) -> _Products:
    r = g - d
    pairs = (r * r, d * r, d * d)
    if diagonal is not None:
        inverse = 1 / diagonal
        pairs = tuple(pair * inverse for pair in pairs)
    sums = sums_together(pairs, tuple(range(g.ndim)))
    return _Products(*(jnp.squeeze(x) for x in sums))


def _sum(products: list[_Products], dtype: Any) -> _Products:
    columns = zip(*products, strict=True) if products else ((), (), ())
    zero = jnp.zeros((), dtype)
    return _Products(*(sum((x.astype(dtype) for x in column), start=zero) for column in columns))


def _beta(p: _Products, lam: Any, factor: float, gap: Any) -> Array:
    """The maximiser, cut to [0, 1]; 0 where gradient and memory agree."""
    inside = jnp.clip(1 + (1 + lam) * safe_div(factor * p.dr + gap, p.rr), 0, 1)
    beta = jnp.where(p.rr >= jnp.finfo(p.rr.dtype).tiny, inside, 0)
    # A gradient too large to be squared is a spike: the memory alone goes on.
    return jnp.where(jnp.isfinite(p.rr), beta, 1)


def adaptive_beta(
    grads: PyTree,
    memory: PyTree,
    lam: Any,
    *,
    inv_preconditioner: PyTree | None = None,
    gap: Any = 0.0,
) -> Array:
    r"""The coefficient of the memory that is best for a loss modelled by two planes.

    .. math:: \beta = \Bigl[\frac{\langle g + \lambda d,\; g - d\rangle + (1+\lambda)\,\delta}
        {\|g - d\|^2}\Bigr]_0^1

    Args:
      grads: the gradient g.
      memory: the direction d, a tree like it.
      lam: lambda, >= 0, how strongly the step is drawn to the memory.
      inv_preconditioner: a tree of positive arrays by which the inner products are weighted.
      gap: delta, height of the memory's plane above the loss at the parameters, over the rate.

    Returns:
      A scalar in [0, 1]; 0 where the two agree.

    >>> import jax.numpy as jnp
    >>> float(adaptive_beta(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 0.0))
    0.5
    """
    check_match(grads, memory, what="gradient", like="the memory")
    trees = [jax.tree.leaves(widen(tree)) for tree in (grads, memory)]
    diagonals: list[Any] = [None] * len(trees[0])
    if inv_preconditioner is not None:
        check_match(inv_preconditioner, grads, what="inv_preconditioner", like="the gradient")
        diagonals = [1 / w for w in jax.tree.leaves(widen(inv_preconditioner))]
    products = [_products(*leaf) for leaf in zip(*trees, diagonals, strict=True)]
    return _beta(_sum(products, compute_dtype(jnp.float32, *trees[0])), lam, 1, gap)


def scale_by_adaptive_memory(
    lam: Any = 0.1,
    plane_gap: Literal["anchored", "zero", "value"] = "anchored",
    scope: Literal["global", "leaf"] = "global",
    preconditioner: Preconditioner | None = None,
    *,
    learning_rate: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    r"""Replaces the gradient by a momentum that weighs old and new by a model of the loss.

    The loss is modelled by the larger of two planes: one with the gradient g, one with the memory
    d. The proximal step on the model is a step along a new memory:

    .. math::

        \beta_t &= \Bigl[\frac{\langle g_t + \lambda d_t,\; g_t - d_t\rangle + (1+\lambda)\,
            \delta_t}{\|g_t - d_t\|^2}\Bigr]_0^1 \\
        d_{t+1} &= \frac{\beta_t + \lambda}{1 + \lambda}\, d_t +
            \frac{1 - \beta_t}{1 + \lambda}\, g_t

    with delta the height of the memory's plane over the loss, divided by the rate, and inner
    products over all leaves. With a preconditioner P products are weighted by 1/P, and the
    direction is d/P. The first step has d = g.

    Args:
      lam: lambda, >= 0. 0.1 is this library's choice: the paper's is not known to us.
      plane_gap: how delta is found. ``"anchored"``: the memory's plane meets the loss at the last
        parameters, :math:`\delta = \langle g - d, d\rangle`; ``"zero"``: both planes meet at the
        current ones; ``"value"``: from the losses, given as the extra argument ``value``. The
        choice decides everything, and the default is ours.
      scope: one coefficient for the tree (``"global"``), or one a leaf.
      preconditioner: a diagonal, such as ``bias_corrected_rms(b2, eps)``; default none.
      learning_rate: the rate that a later link applies, a number or a schedule over the 0-based
        count; ``plane_gap="value"`` needs it, else it is not used.

    Returns:
      A transformation that gives a direction (no rate, no sign); ``state.beta`` is the last
      coefficient. It keeps 4 bytes a f32 parameter, and what the preconditioner keeps. Inside
      ``shard_map`` each device must hold whole leaves, and with ``scope="global"`` all of them.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or ``value`` is
        missing where it is used.

    Provisional: the recursion and the cut of beta are the paper's as reported; its closed form is
    derived here from the model, and delta, lambda and the first step are inferred. With ``"zero"``
    the memory becomes the shortest vector between d and g, so it only ever shrinks, and training
    comes to rest. With ``"anchored"`` a memory that is small beside the gradients stays small: zero
    gradients shrink it eleven-fold each at lambda 0.1. A spike is ignored, but one that sits in the
    first step stays until a smaller gradient comes. A memory of norm zero, or one in which old and
    new have cancelled, is replaced by the next gradient. Entries above 1e15 (f32) count as 1e15. A
    non-finite gradient spoils every leaf: put a guard in front.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_adaptive_memory(lam=0.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 0.0], [0.0, 2.0]):
    ...     d, state = tx.update(jnp.array(g), state)
    >>> round(float(state.beta), 3), [round(float(x), 3) for x in d]  # (4 - 1) / (4 + 1)
    (0.6, [0.6, 0.8])

    Reference: Topollai and Choromanska, "Adaptive Memory Momentum via a Model-Based Framework for
    Deep Learning Optimization", AISTATS 2026, arXiv 2510.04988. No public code.
    """
    check_range(lam=lam, ge=0)
    check_choice(PLANE_GAPS, plane_gap=plane_gap)
    check_choice(SCOPES, scope=scope)
    by_value = plane_gap == "value"
    if by_value and scope == "leaf":
        raise ValueError("plane_gap='value' needs scope='global': there is one loss for all leaves")
    if by_value and learning_rate is None:
        raise ValueError("plane_gap='value' needs learning_rate, the rate that the chain applies")
    factor = 2 if plane_gap == "anchored" else 1

    def init(params: PyTree) -> AdaptiveMemoryState:
        zero = jnp.zeros((), compute_dtype(jnp.float32, *jax.tree.leaves(params)))
        return AdaptiveMemoryState(
            zero_count(),
            zeros_like(params),
            scalars_like(params) if scope == "leaf" else zero,
            zero if by_value else None,
            None if preconditioner is None else preconditioner.init(params),
        )

    def weights(p: _Products, gap: Any) -> tuple[Array, Array, Array]:
        """beta, and the weights of memory and gradient in the new memory."""
        info = jnp.finfo(p.dd.dtype)
        empty = ~((p.dd >= info.tiny) & jnp.isfinite(p.dd))
        beta = jnp.where(empty, 0, _beta(p, lam, factor, gap))
        take = jnp.where(empty, 1, (1 - beta) / (1 + lam))
        terms = p.dd + jnp.square(take) * p.rr
        # What is left of two vectors that cancel is rounding: zero is replaced at the next step.
        cancelled = ~empty & (terms + 2 * take * p.dr <= 16 * info.eps * terms)
        return beta, jnp.where(cancelled, 0, 1 - take), jnp.where(cancelled, 0, take)

    def update(
        updates: PyTree,
        state: AdaptiveMemoryState,
        params: PyTree | None = None,
        *,
        value: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, AdaptiveMemoryState]:
        del params, extra
        check_real(updates, "gradient")
        check_match(updates, state.mu, what="gradient", like="the state")
        gradients = widen(updates, state.mu)
        g, structure = jax.tree.flatten(gradients)
        d = structure.flatten_up_to(state.mu)
        inner_state = state.inner_state
        if preconditioner is not None:
            inner_state = preconditioner.update(jax.tree.map(saturate, gradients), inner_state)

        def diagonals(scale: float) -> list[Any]:
            if preconditioner is None:
                return [None] * len(g)
            return structure.flatten_up_to(preconditioner.diagonal(inner_state, scale))

        products: list[_Products] = []
        for new, old, diagonal in zip(g, d, diagonals(1.0), strict=True):
            new = in_turn(new, products[-1].rr if products else None)
            products.append(_products(_limited(new), old, diagonal))

        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        plane_value = state.plane_value
        if scope == "leaf":
            mixes = [weights(p, 0.0) for p in products]
            beta = structure.unflatten([mix[0] for mix in mixes])
        else:
            total = _sum(products, state.beta.dtype)
            gap: Any = 0.0
            if plane_value is not None:
                if value is None:
                    raise ValueError(
                        "plane_gap='value' needs the loss: call update(..., value=loss)"
                    )
                gap = safe_div(plane_value - value, jnp.asarray(rate, plane_value.dtype))
            mix = weights(total, gap)
            beta, mixes = mix[0], [mix] * len(g)
            if plane_value is not None:
                _, keep, take = mix
                length = total.dd + 2 * take * total.dr + jnp.square(take) * total.rr
                height = keep * plane_value + take * value
                plane_value = (height - rate * length).astype(plane_value.dtype)

        memory = [
            (keep * old + take * _limited(new)).astype(old.dtype)
            for old, new, (_, keep, take) in zip(d, g, mixes, strict=True)
        ]
        steps = [
            m if diagonal is None else 2 * m / diagonal
            for m, diagonal in zip(memory, diagonals(2.0), strict=True)
        ]
        return narrow_like(structure.unflatten(steps), updates), AdaptiveMemoryState(
            next_count(state.count),
            structure.unflatten(memory),
            beta,
            plane_value,
            inner_state,
        )

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_adaptive_memory,
    kind="piece",
    summary="momentum whose coefficient a model of two planes gives anew at every step",
    traced=("lam", "learning_rate"),
    static=("plane_gap", "scope", "preconditioner"),
    position="middle",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=28,  # 20, and gradient and memory once more for the products
    status="provisional",
    paper='Topollai and Choromanska, "Adaptive Memory Momentum via a Model-Based Framework for '
    'Deep Learning Optimization", AISTATS 2026, arXiv 2510.04988',
    reference="derived in NumPy from the model; no public code",
    licence="",
)
