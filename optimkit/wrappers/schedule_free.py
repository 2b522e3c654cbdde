"""Schedule-free learning: a base sequence, its running average, and gradients taken in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import map_leaves, recipe, zero_count
from optimkit.numerics import (
    as_float,
    check_count,
    check_range,
    compute_dtype,
    hyperparameter_dtype,
    next_count,
    safe_div,
)
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam


class ScheduleFreeState(NamedTuple):
    """``z``: base sequence, one array a parameter; ``average``: x in the same way, or None.

    Scalars: ``count`` int32; ``weight_sum``, ``max_learning_rate``, ``learning_rate`` (the last
    one used) and ``b1`` in f32, or f64 under x64, whatever the parameters are.
    """

    count: Array
    z: PyTree
    average: PyTree
    weight_sum: Array
    max_learning_rate: Array
    learning_rate: Array
    b1: Array
    inner_state: PyTree


def schedule_free(
    inner: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    *,
    warmup_steps: int = 0,
    r: Any = 0.0,
    weight_lr_power: Any = 2.0,
    z_dtype: Any = None,
    keep_average: bool = False,
) -> GradientTransformation:
    r"""Averages the path of an optimizer online, in place of a decaying rate; no horizon needed.

    The loop holds y, where gradients are taken; z is the base sequence, x the average of z, and x
    is what to evaluate and to ship (``schedule_free_eval_params``). With u the direction that
    ``inner`` makes of the gradient at y, k counted from 0, and x = y = z at the start:

    .. math::

        \eta_k &= \eta(k) \min(1, (k+1)/N), \qquad
            w_k = (k+1)^r \big(\max_{j \le k} \eta_j\big)^p, \qquad c = w_k / \sum_{j \le k} w_j \\
        z' &= z - \eta_k u, \qquad x' = (1-c)\, x + c\, z', \qquad y' = b_1 x' + (1-b_1)\, z'

    x is not kept: it is :math:`(y - (1-b_1) z)/b_1`, so that
    :math:`y' = y + c\,(z'-y) - (1-b_1)(1-c)\,\eta_k u`.

    Args:
      inner: gives a direction: no rate, no momentum (b1 takes the place of momentum), no sign. It
        sees y as its parameters, so ``optax.add_decayed_weights`` in it decays at y.
      learning_rate: step size of z, or a schedule over the 0-based count. One count serves the
        rate, the warm-up and the weights; it advances with every update that is applied.
      b1: weight of x in y, in (0, 1). 0.9; 0.95 to 0.98 for long runs. When it is changed between
        steps (injected), x stays what it was.
      warmup_steps: N; linear warm-up, whose first step has rate/N. 0: none.
      r: power of the step in the averaging weight, >= 0.
      weight_lr_power: p, power of the largest rate so far, >= 0. Since the largest counts, late
        steps of a falling schedule are not weighted down.
      z_dtype: dtype of z, at least that of the parameters and f32. Default: just that.
      keep_average: keep x in the state, at 4 more bytes a parameter. Worth it for parameters in
        bfloat16 or float16: y is rounded at every step, and an x that is derived from y collects
        those roundings for good, since an average forgets only as 1/k. A kept x takes no part in
        them, and y is then its mix with z, rounded once.

    Returns:
      An optimizer that needs ``params`` and must be the last link of its chain: whatever changed
      the update after it (a clip, a mask, a lookahead) would move y without x, so that x could no
      longer be derived. Clip before it. It keeps 4 bytes a f32 parameter (8 with
      ``keep_average``) and the state of ``inner``.

    Raises:
      ValueError: if an argument is out of range, params are missing, or a gradient has another
        shape.
      TypeError: for complex or integer leaves.

    A rate of zero moves nothing and weighs nothing. Models with BatchNorm need their statistics
    taken anew at x before evaluation: run some training batches through the model at x.
    ``optax.contrib.schedule_free`` asks its schedule one step late for z, which turns a warm-up
    wrong, and keeps its scalars in the lowest dtype of the parameters.

    >>> import jax.numpy as jnp, optax, optimkit as ok
    >>> tx = schedule_free(optax.identity(), learning_rate=0.5)
    >>> y = jnp.array([1.0, -2.0]); state = tx.init(y)
    >>> for _ in range(200):  # minimises y**2
    ...     updates, state = tx.update(2 * y, state, y)
    ...     y = optax.apply_updates(y, updates)
    >>> bool(jnp.all(jnp.abs(ok.schedule_free_eval_params(state, y)) < 1e-2))
    True

    Reference: Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682.
    """
    return schedule_free_recomputed(
        inner,
        None,
        learning_rate,
        b1,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        z_dtype=z_dtype,
        keep_average=keep_average,
    )


def schedule_free_recomputed(
    inner: optax.GradientTransformation,
    recompute: Callable[[PyTree, PyTree, PyTree], PyTree] | None,
    learning_rate: ScalarOrSchedule,
    b1: Any,
    *,
    warmup_steps: int = 0,
    r: Any = 0.0,
    weight_lr_power: Any = 2.0,
    z_dtype: Any = None,
    keep_average: bool = False,
) -> GradientTransformation:
    """``schedule_free`` with a second way to the direction, for the speed of a recipe.

    z' and y' both need the direction u. Where the compiler writes them in two loops (XLA on the
    CPU), u is written to memory in between, 4 bytes a parameter; computing it twice moves less.

    Args:
      inner: gives the direction, as for ``schedule_free``.
      recompute: ``(gradients, new state of inner, params) -> directions``, the same numbers as
        from ``inner``, but spelled so that the compiler does not see that they are the same.
        None: use those of ``inner`` twice.
      learning_rate: this and all else as for ``schedule_free``.
      b1: weight of x in y.
      warmup_steps: steps of linear warm-up.
      r: power of the step in the averaging weight.
      weight_lr_power: power of the largest rate so far in the averaging weight.
      z_dtype: dtype of z.
      keep_average: keep x in the state.
    """
    check_range(learning_rate=learning_rate, r=r, weight_lr_power=weight_lr_power, ge=0)
    check_range(b1=b1, gt=0, lt=1)
    check_count(warmup_steps=warmup_steps)
    inner = optax.with_extra_args_support(inner)

    def copied(p: Array) -> Array:
        # A copy also under jit, where an unchanged argument would be handed on: params and state
        # may be donated together.
        return jnp.array(p, jnp.promote_types(compute_dtype(p), z_dtype or jnp.float32), copy=True)

    def init(params: PyTree) -> ScheduleFreeState:
        dtype = hyperparameter_dtype()
        return ScheduleFreeState(
            count=zero_count(),
            z=jax.tree.map(copied, params),
            average=jax.tree.map(copied, params) if keep_average else None,
            weight_sum=jnp.zeros((), dtype),
            max_learning_rate=jnp.zeros((), dtype),
            learning_rate=jnp.zeros((), dtype),
            b1=jnp.array(b1, dtype, copy=True),
            inner_state=inner.init(params),
        )

    def update(
        updates: PyTree, state: ScheduleFreeState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScheduleFreeState]:
        count = next_count(state.count)
        extra.setdefault("global_count", state.count)
        directions, inner_state = inner.update(updates, state.inner_state, params, **extra)

        given = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = jnp.array(given, hyperparameter_dtype(), copy=True)
        if warmup_steps:
            rate = rate * jnp.minimum(1, as_float(count) / warmup_steps)
        largest = jnp.maximum(state.max_learning_rate, rate)
        weight = jnp.power(as_float(count), r) * jnp.power(largest, weight_lr_power)
        weight_sum = state.weight_sum + weight
        c = safe_div(weight, weight_sum)

        # y was mixed with the b1 of the last step. While b1 stays, turn = 1, pull = c.
        mix = jnp.array(b1, hyperparameter_dtype(), copy=True)
        turn = mix / state.b1
        pull = c + (1 - c) * (1 - turn)
        push = (1 - c) * (1 - state.b1) * turn * rate

        def derive(u: Array, z: Array, again: Array, y: Array) -> tuple[Array, Array]:
            z = z - rate * u
            return pull * (z - y) - push * again, z

        def keep(u: Array, z: Array, x: Array, y: Array) -> tuple[Array, Array, Array]:
            z = z - rate * u
            x = x + c * (z - x)
            return x + (1 - mix) * (z - x) - y, z, x

        again = recompute(updates, inner_state, params) if recompute else directions
        directions = jax.tree.map(  # z may be wider than the parameters
            lambda u, z: u.astype(jnp.promote_types(u.dtype, z.dtype)), directions, state.z
        )
        if keep_average:
            updates, z, average = map_leaves(
                keep, directions, state.z, state.average, reads=(params,)
            )
        else:
            # What can be recomputed took its turns in ``inner``.
            updates, z = map_leaves(
                derive, directions, state.z, reads=(again, params), take_turns=recompute is None
            )
            average = None
        return updates, ScheduleFreeState(
            count, z, average, weight_sum, largest, rate, mix, inner_state
        )

    return recipe(transformation(init, update))


RECORD = Method(
    factory=schedule_free,
    kind="wrapper",
    summary="average the path online in place of a schedule; gradients between average and base",
    example={"learning_rate": 1e-2, "warmup_steps": 2},
    example_made={"inner": lambda: scale_by_adam(b1=0.0)},
    traced=("learning_rate", "b1", "r", "weight_lr_power"),
    static=("inner", "warmup_steps", "z_dtype", "keep_average"),
    needs=("params",),
    position="last",
    communication="none",
    response="bounded",
    state_bytes=12,
    moved_bytes=36,
    paper='Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682',
    reference="facebookresearch/schedule_free@70785b53e778d0e872c0bbb75ff4ee54ee10c291",
    licence="Apache-2.0",
)
