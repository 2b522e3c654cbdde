"""The dtype in which any method keeps its moments, apart from the one it computes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.leaves import check_real, moment_paths, zero_count
from optimkit.numerics import check_count, compute_dtype, narrow, next_count, no_wider
from optimkit.protocols import (
    PARAMETER_FIELDS,
    Array,
    GradientTransformation,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.rounding import leaf_keys, random_bits, stochastic_bfloat16

BFLOAT16_STOCHASTIC = "bfloat16_stochastic"


class WithStateDtypeState(NamedTuple):
    """``count``: int32, updates made. ``inner_state``: the inner state, its moments cast."""

    count: Array
    inner_state: PyTree


class KeptAs(NamedTuple):
    """How an array is kept: its dtype, and whether it is rounded to it by chance."""

    dtype: Any
    stochastic: bool


def kept_as(value: Any, what: str) -> KeptAs:
    """Reads a dtype, or ``"bfloat16_stochastic"``; ``what`` names the argument in the error."""
    if isinstance(value, str) and value == BFLOAT16_STOCHASTIC:
        return KeptAs(jnp.dtype(jnp.bfloat16), True)
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if value is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{what} must be a floating-point dtype or {BFLOAT16_STOCHASTIC!r}, got {value!r}"
        )
    return KeptAs(dtype, False)


def with_state_dtype(
    inner: optax.GradientTransformation, policy: Any, *, seed: int = 0
) -> GradientTransformation:
    """Keeps the moments of any transformation in a dtype of your choice; it computes in f32.

    Before each update the moments are widened to f32 (f64 for f64 parameters); afterwards they are
    rounded to the dtype in which they are kept. The update is made of the fresh ones, before
    rounding. A moment is what ``momentum_reset`` resets: a floating-point array of the inner state
    that stands in a parameter's place and has its shape; here it has one axis at least.

    Args:
      inner: any transformation; its state is searched, however deep.
      policy: ``"float32"``, ``"bfloat16"`` or any floating-point dtype for all moments;
        ``"bfloat16_stochastic"`` for bfloat16 with stochastic rounding; or a mapping from names of
        state fields to these, ``{"mu": "bfloat16", "nu": "float32"}``. Fields that a mapping does
        not name stay as they are, and so do copies of parameters (``z``, ``average``) unless it
        names them.
      seed: of the stochastic rounding; random bits come from it, the count and the leaf's index.

    Returns:
      A transformation whose state adds one int32; two bytes an entry for moments in bfloat16.

    Raises:
      ValueError: for a dtype that is none, or a field that the inner state does not have; from
        ``update``, for a gradient of another shape.
      TypeError: for complex or integer leaves.

    Rounding to nearest makes a slow average stand still: bfloat16 has 8 bits, so a change of less
    than 1/512 of the value is lost, and a second moment with b2 = 0.999 changes by 1/1000 and never
    falls. Rounding by chance is right on average. The first moment (b1 = 0.9) bears rounding to
    nearest. A narrow dtype costs time on CPUs, where conversions are slow and the old moments are
    copied within the step; what it saves is memory between steps.

    >>> import jax.numpy as jnp, optax
    >>> ones = jnp.ones(1000)
    >>> for policy in ("float32", "bfloat16", "bfloat16_stochastic"):
    ...     tx = with_state_dtype(optax.ema(0.999, debias=False), policy)
    ...     step = jax.jit(lambda _, state: tx.update(ones, state)[1])
    ...     state = jax.lax.fori_loop(0, 1000, step, tx.init(ones))
    ...     print(f"{policy} {jnp.mean(state.inner_state.ema.astype(float)):.1f}")  # 0.63 is right
    float32 0.6
    bfloat16 0.2
    bfloat16_stochastic 0.6
    """
    check_count(seed=seed)
    named = isinstance(policy, Mapping)
    if named:
        kept = {name: kept_as(value, f"policy[{name!r}]") for name, value in policy.items()}
    else:
        kept = {"": kept_as(policy, "policy")}
    inner = optax.with_extra_args_support(inner)

    def plan(state: PyTree, params: PyTree) -> list[KeptAs | None]:
        """How each leaf of an inner state is kept; None for what is left alone."""
        paths = jax.tree.leaves(moment_paths(inner.init, state, params))
        fields = [path.rsplit("/", 1)[-1] for path in paths]
        unknown = set(kept) - set(fields) if named and jax.tree.leaves(params) else set()
        if unknown:
            raise ValueError(
                f"policy names the state fields {sorted(unknown)}, but the moments of the inner "
                f"state are in {sorted(set(fields) - {''})}"
            )

        def choose(field: str, leaf: Array) -> KeptAs | None:
            if not field or not np.ndim(leaf):
                return None
            return kept.get(field) if named else None if field in PARAMETER_FIELDS else kept[""]

        return [choose(*pair) for pair in zip(fields, jax.tree.leaves(state), strict=True)]

    def init(params: PyTree) -> WithStateDtypeState:
        check_real(params, "parameter")
        state = inner.init(params)
        leaves, structure = jax.tree.flatten(state)
        stored = [
            leaf if how is None else narrow(leaf, how.dtype)
            for leaf, how in zip(leaves, plan(state, params), strict=True)
        ]
        return WithStateDtypeState(zero_count(), structure.unflatten(stored))

    def update(
        updates: PyTree, state: WithStateDtypeState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, WithStateDtypeState]:
        check_real(updates, "gradient")
        like = updates if params is None else params
        own = jax.tree.leaves(jax.eval_shape(inner.init, like))
        stored, structure = jax.tree.flatten(state.inner_state)
        how = plan(state.inner_state, like)
        wide = [
            x if keep is None else x.astype(compute_dtype(x, mine))
            for x, keep, mine in zip(stored, how, own, strict=True)
        ]
        new_updates, new_state = inner.update(updates, structure.unflatten(wide), params, **extra)

        by_chance = [keep is not None and keep.stochastic for keep in how]
        keys = leaf_keys(seed, state.count, len(stored)) if any(by_chance) else None
        fresh = [
            narrow(new, old.dtype)
            if keys is None or not by_chance[index]
            else stochastic_bfloat16(new, random_bits(keys[index], new.shape))
            for index, (new, old) in enumerate(
                zip(structure.flatten_up_to(new_state), stored, strict=True)
            )
        ]
        new_updates = jax.tree.map(no_wider, new_updates, updates, like)
        return new_updates, WithStateDtypeState(next_count(state.count), structure.unflatten(fresh))

    return transformation(init, update)


RECORD = Method(
    factory=with_state_dtype,
    kind="wrapper",
    summary="keep any method's moments in bfloat16, rounded to nearest or by chance",
    example={"policy": {"mu": "bfloat16", "nu": "bfloat16_stochastic"}},
    example_made={"inner": scale_by_adam},
    static=("inner", "policy", "seed"),
    position="any",
    communication="none",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    # One step of bfloat16 is 2**-8; rounding by chance falls otherwise where sums are taken in
    # another order, and under another index of the leaf.
    tolerance={"compose": 2e-2, "sharding": 2e-2},
    exempt={
        "dtype": "moments in 16 bits are what it is for",
        "fidelity": "made here: no other code to compare with",
    },
)
