"""Gradient accumulation: the wrapped transformation steps once every so many gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, zero_count
from optimkit.numerics import check_count, compute_dtype, due, narrow, next_count, no_wider
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.rounding import leaf_keys, random_bits, stochastic_bfloat16
from optimkit.wrappers.state_dtype import kept_as


class AccumulateState(NamedTuple):
    """``gradient_mean``: what the gradients so far add to the mean, one array a parameter.

    ``count``: int32, gradients seen. ``inner_state``: state of the wrapped transformation.
    """

    count: Array
    gradient_mean: PyTree
    inner_state: PyTree


def accumulate(
    inner: optax.GradientTransformation, steps: int, dtype: Any = "float32", *, seed: int = 0
) -> GradientTransformation:
    """Gives ``inner`` the mean of ``steps`` gradients, and lets nothing move between.

    One buffer gathers the gradients, each divided by ``steps``. With the last one the mean is made
    inside the step and never stored; the inner update runs then only.

    Args:
      inner: any transformation.
      steps: gradients a step, at least 1.
      dtype: of the buffer: any floating-point dtype, or ``"bfloat16_stochastic"`` for bfloat16
        rounded by chance. f64 gradients are gathered in f64 where ``"float32"`` is asked for.
      seed: of the rounding by chance.

    Returns:
      A transformation whose updates are zero but for every ``steps``-th; its state adds one buffer
      (4 bytes a parameter, 2 in bfloat16) and one int32.

    Raises:
      ValueError: if ``steps`` is below 1, ``dtype`` is none, or a gradient has another shape.
      TypeError: for complex or integer leaves.

    Extra arguments reach the inner transformation with the last gradient only, and so do the
    parameters. Rounding to bfloat16 to nearest loses gradients smaller than 1/512 of the sum; by
    chance, the mean is right on average. Equal to ``optax.MultiSteps`` to rounding, which keeps a
    running mean. ``inner`` counts its own steps; a schedule outside counts gradients.

    >>> import jax.numpy as jnp, optax
    >>> tx = accumulate(optax.sgd(1.0), 2)
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> first, state = tx.update(jnp.array([1.0, 2.0]), state, params)
    >>> second, state = tx.update(jnp.array([3.0, 2.0]), state, params)
    >>> first.tolist(), second.tolist()
    ([0.0, 0.0], [-2.0, -2.0])
    """
    check_count(least=1, steps=steps)
    check_count(seed=seed)
    kept = kept_as(dtype, "dtype")
    inner = optax.with_extra_args_support(inner)

    def buffer(p: Array) -> Array:
        wide = compute_dtype(p) if kept.dtype == jnp.float32 else kept.dtype
        return jnp.zeros_like(p, dtype=wide)

    def init(params: PyTree) -> AccumulateState:
        check_real(params, "parameter")
        return AccumulateState(zero_count(), jax.tree.map(buffer, params), inner.init(params))

    def update(
        updates: PyTree, state: AccumulateState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AccumulateState]:
        check_real(updates, "gradient")
        check_match(updates, state.gradient_mean, what="gradient", like="the state")
        like = updates if params is None else params
        check_match(updates, like, what="gradient", like="the parameters")

        def with_this(g: Array, mean: Array) -> Array:
            wide = compute_dtype(g, mean)
            return mean.astype(wide) + g.astype(wide) / steps

        def gather(mean: PyTree, inner_state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            new, structure = jax.tree.flatten(jax.tree.map(with_this, updates, mean))
            if kept.stochastic:
                keys = leaf_keys(seed, state.count, len(new))
                new = [
                    stochastic_bfloat16(x, random_bits(key, x.shape))
                    for x, key in zip(new, keys, strict=True)
                ]
            old = jax.tree.leaves(mean)
            new = [narrow(x, m.dtype) for x, m in zip(new, old, strict=True)]
            nothing = jax.tree.map(lambda g, p: jnp.zeros_like(g, jnp.result_type(g, p)),
                                   updates, like)  # fmt: skip
            return nothing, structure.unflatten(new), inner_state

        def step(mean: PyTree, inner_state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            whole = jax.tree.map(
                lambda g, m: narrow(with_this(g, m), jnp.result_type(g)), updates, mean
            )
            moved, inner_state = inner.update(whole, inner_state, params, **extra)
            moved = jax.tree.map(no_wider, moved, updates, like)
            moved = jax.tree.map(
                lambda u, g, p: u.astype(jnp.result_type(g, p)), moved, updates, like
            )
            return moved, jax.tree.map(jnp.zeros_like, mean), inner_state

        count = next_count(state.count)
        moved, mean, inner_state = jax.lax.cond(
            due(count, steps), step, gather, state.gradient_mean, state.inner_state
        )
        return moved, AccumulateState(count, mean, inner_state)

    return transformation(init, update)


RECORD = Method(
    factory=accumulate,
    kind="wrapper",
    summary="step with the mean of several gradients, gathered in one buffer",
    example={"steps": 2},
    example_made={"inner": scale_by_adam},
    static=("inner", "steps", "dtype", "seed"),
    position="any",
    communication="none",
    response="bounded",
    state_bytes=12,
    moved_bytes=36,
    exempt={"fidelity": "made here: no other code to compare with but optax's, in the unit tests"},
)
