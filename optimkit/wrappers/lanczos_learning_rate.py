"""A rate, and a momentum, from the curvature of the batch, measured while training runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.gradients.hessian import hessian_product
from optimkit.gradients.krylov import lanczos, random_direction, slq_density
from optimkit.leaves import check_match, check_real, narrow_like, require_params, widen, zero_count
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    due,
    hyperparameter_dtype,
    next_count,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.momentum import dampened_trace

RULES = ("polyak", "two_over_max", "one_over_max")


class LanczosLearningRateState(NamedTuple):
    """``count``: int32. ``learning_rate``, ``momentum``, ``lambda_max``, ``lambda_min``: scalars.

    ``inner_state``: state of the optimizer inside.
    """

    count: Array
    learning_rate: Array
    momentum: Array
    lambda_max: Array
    lambda_min: Array
    inner_state: PyTree


def lanczos_learning_rate(
    inner_factory: Callable[..., optax.GradientTransformation],
    *,
    every: int = 100,
    num_iters: int = 20,
    rule: Literal["polyak", "two_over_max", "one_over_max"] = "polyak",
    safety: Any = 1.0,
    ema: Any = 0.0,
    max_lr: Any = 1.0,
    max_momentum: Any = 0.99,
    lambda_floor: Any = 1e-3,
    seed: int = 0,
) -> GradientTransformation:
    r"""Sets the rate of an optimizer by the Hessian's largest eigenvalue, every so often.

    With the extreme Ritz value L and a small one l of the batch's Hessian:

    .. math::

        \text{polyak:} \quad \eta &= \Bigl(\frac{2}{\sqrt L + \sqrt l}\Bigr)^2, \quad
            b = \Bigl(\frac{\sqrt L - \sqrt l}{\sqrt L + \sqrt l}\Bigr)^2 \\
        \text{two\_over\_max:} \quad \eta &= 2/L, \qquad \text{one\_over\_max:} \quad \eta = 1/L

    Args:
      inner_factory: makes the optimizer: takes ``learning_rate``, and with ``"polyak"`` also
        ``momentum`` if it knows that argument; both may be tracers. ``optax.sgd`` is meant.
      every: steps between two measurements, >= 1; the first step measures.
      num_iters: products with the Hessian in a measurement, >= 1.
      rule: as above.
      safety: multiplies the rate, > 0; below 1 with ``"two_over_max"``, which is the edge itself.
      ema: share of the old rate and momentum that stays, in [0, 1); the first measurement counts
        alone.
      max_lr: largest rate, > 0; it also serves until a measurement succeeds.
      max_momentum: largest momentum, in [0, 1).
      lambda_floor: l is at least this, > 0: take the weight decay. Else it is the magnitude of the
        median Ritz value.
      seed: of the start vectors.

    Returns:
      A transformation that needs ``params``, and in each update ``hvp_fn``, ``(params, v) -> H v``,
      or ``value_fn``, the loss as a function of the parameters. ``key`` takes the place of
      ``seed``. Nothing is kept per parameter; a measurement holds ``num_iters`` copies.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or ``hvp_fn`` and
        ``value_fn`` are both missing.

    A largest eigenvalue that is not positive, or not finite, changes nothing. The curvature is that
    of the plain gradient: the rate means nothing to a preconditioned inner optimizer. Provisional:
    of the paper's learner only the abstract could be read; floor, median and defaults are ours.

    >>> def loss(w): return jnp.sum(jnp.array([1.0, 4.0]) * w**2) / 2
    >>> tx, w = lanczos_learning_rate(optax.sgd, rule="one_over_max"), jnp.ones(2)
    >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    >>> [round(float(u), 3) for u in updates], round(float(state.learning_rate), 3)
    ([-0.25, -1.0], 0.25)

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", JMLR 2022, arXiv 2006.09092.
    """
    check_count(every=every, num_iters=num_iters, least=1)
    check_choice(RULES, rule=rule)
    check_range(safety=safety, max_lr=max_lr, lambda_floor=lambda_floor, gt=0)
    check_range(ema=ema, max_momentum=max_momentum, ge=0, lt=1)
    with_momentum = rule == "polyak" and "momentum" in inspect.signature(inner_factory).parameters

    def inner(rate: Any, momentum: Any) -> optax.GradientTransformationExtraArgs:
        chosen = {"momentum": momentum} if with_momentum else {}
        return optax.with_extra_args_support(inner_factory(learning_rate=rate, **chosen))

    def init(params: PyTree) -> LanczosLearningRateState:
        check_real(params, "parameter")
        dtype = hyperparameter_dtype()
        rate, zero = jnp.array(max_lr, dtype, copy=True), jnp.zeros((), dtype)
        kept = inner(rate, zero).init(widen(params))
        return LanczosLearningRateState(zero_count(), rate, zero, zero, zero, kept)

    def measured(state: LanczosLearningRateState, params: PyTree, product: Any, key: Any) -> Any:
        dtype = state.learning_rate.dtype
        found = lanczos(product, random_direction(key, params), num_iters)
        nodes, _ = slq_density(found.alphas, found.betas)
        most, least = nodes[-1], nodes[0]
        small = jnp.maximum(jnp.abs(jnp.median(nodes)), lambda_floor)
        good = jnp.isfinite(most) & jnp.isfinite(least) & (most > 0)
        large = jnp.where(good, jnp.maximum(most, small), 1)
        if rule == "polyak":
            high, low = jnp.sqrt(large), jnp.sqrt(jnp.where(good, small, 1))
            rate, momentum = (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2
        else:
            rate = (2 if rule == "two_over_max" else 1) / jnp.where(good, most, 1)
            momentum = state.momentum
        rate = jnp.minimum(safety * rate, max_lr)
        momentum = jnp.minimum(momentum, max_momentum)
        stay = jnp.where(state.lambda_max > 0, ema, 0.0)
        new = (
            stay * state.learning_rate + (1 - stay) * rate,
            stay * state.momentum + (1 - stay) * momentum,
            most,
            least,
        )
        return tuple(
            jnp.where(good, n, o).astype(dtype) for n, o in zip(new, state[1:5], strict=True)
        )

    def update(
        updates: PyTree,
        state: LanczosLearningRateState,
        params: PyTree | None = None,
        *,
        hvp_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
        value_fn: Callable[[PyTree], Any] | None = None,
        key: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, LanczosLearningRateState]:
        params = require_params(params, "lanczos_learning_rate")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        if hvp_fn is None and value_fn is None:
            raise ValueError(
                "lanczos_learning_rate needs the Hessian's products or the loss: call "
                "update(..., hvp_fn=...) or update(..., value_fn=loss)"
            )
        wide = widen(params)

        def product(v: PyTree) -> PyTree:
            if hvp_fn is not None:
                return hvp_fn(wide, v)
            return hessian_product(value_fn, wide, v)  # type: ignore[arg-type]

        if jax.tree.leaves(params):
            start = jax.random.fold_in(jax.random.key(seed), state.count) if key is None else key
            numbers = jax.lax.cond(
                due(state.count, every),
                lambda: measured(state, wide, product, start),
                lambda: tuple(state[1:5]),
            )
        else:
            numbers = state[1:5]
        rate, momentum, most, least = numbers
        if value_fn is not None:
            extra = {**extra, "value_fn": value_fn}
        new, kept = inner(rate, momentum).update(
            widen(updates, params), state.inner_state, wide, **extra
        )
        count = next_count(state.count)
        state = LanczosLearningRateState(count, rate, momentum, most, least, kept)
        return narrow_like(new, updates), state

    return transformation(init, update)


def _heavy_ball(learning_rate: Any, momentum: Any = 0.0) -> GradientTransformation:
    return optax.chain(dampened_trace(momentum), optax.scale_by_learning_rate(learning_rate))


def _identity(params: PyTree, grads: PyTree) -> dict[str, Any]:
    del params, grads
    return {"hvp_fn": lambda params, v: v}


RECORD = Method(
    factory=lanczos_learning_rate,
    kind="wrapper",
    summary="rate and momentum from the Hessian's largest eigenvalue, measured now and then",
    example={"inner_factory": _heavy_ball, "every": 2, "num_iters": 3, "safety": 0.5},
    extras=_identity,
    traced=("safety", "ema", "max_lr", "max_momentum", "lambda_floor"),
    static=("inner_factory", "every", "num_iters", "rule", "seed"),
    needs=("params", "hvp_fn"),
    position="alone",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=20,
    status="provisional",
    paper='Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix '
    'Theory Approach to Neural Network Training", JMLR 2022, arXiv 2006.09092',
)
