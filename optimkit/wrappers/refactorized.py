"""Weight refactorization: balance the factors of low-rank weights every so many steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, check_real, require_params, zero_count
from optimkit.matrices.balanced_factors import PairPredicate, factor_pairs, refactorize_pairs
from optimkit.numerics import check_count, compute_dtype, due, narrow, next_count
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.adam import scale_by_adam


class RefactorizedState(NamedTuple):
    """``count``: int32 scalar, never restarted. ``inner_state``: state of the wrapped one."""

    count: Array
    inner_state: PyTree


def refactorized(
    inner: optax.GradientTransformation,
    interval: int,
    *,
    is_pair: PairPredicate | None = None,
    reset_state: bool = True,
) -> GradientTransformation:
    r"""Replaces low-rank factors by the balanced ones of the same product at every D-th update.

    .. math::

        \tilde w = w + \text{inner}(g), \qquad
        \tilde a\, \tilde b = U S V^T, \quad a \leftarrow U \sqrt{S}, \;\;
        b \leftarrow \sqrt{S}\, V^T \quad \text{at updates } D, 2D, \ldots

    In factorized pretraining (weight = a b) the factors drift to different scales and directions,
    which slows Adam. The jump from old to new factors is part of the update, so the function that
    the network computes does not change by it. See ``optimkit.matrices.refactorize``.

    Args:
      inner: a whole optimizer, with its rate and decay.
      interval: D, updates between two refactorizations, the first after update D; 0: none.
      is_pair: which leaves are factors, ``(path of a, path of b) -> bool``; default ``lora_a`` and
        ``lora_b``, or ``a`` and ``b``, side by side (see ``optimkit.matrices.refactorize_params``).
      reset_state: make the whole state of ``inner`` anew after a refactorization, since moments of
        the old factors belong to other coordinates. That starts a learning-rate schedule in
        ``inner`` again as well: with one, use False and ``momentum_reset``, as below.

    Returns:
      A transformation that needs ``params``. It must be the outermost: what follows would change
      the jump. Its state adds one int32; the un-reset 0-based count goes to ``inner`` as
      ``global_count``. Inside ``shard_map`` each device must hold whole factors.

    Raises:
      ValueError: if ``interval`` is no count, params are missing, a gradient has another shape, a
        factor has no partner, the shapes of a pair do not fit, or no pair has the default names.
      TypeError: for complex or integer leaves.

    What is to be reset after update D is reset on entry to update D + 1. A pair stays as it is
    where its product is zero (LoRA's start), lost in rounding or not finite. Where the product has
    lost rank, both factors get zero columns, whose gradients are zero for ever: the rank that is
    used can only shrink. On factors in 16 bits the jump is rounded to the size of the larger of old
    and new factor, and the product moves by as much: 1.5 % in bfloat16 for norms 30 times apart,
    where ``refactorize_params`` in the loop moves it by 0.2 %. Keep such parameters in f32. To
    accumulate gradients, put this inside ``optax.MultiSteps``, so that it counts real updates.
    Under ``vmap`` factors are decomposed in every step.
    ``cosine_quick_recovery_schedule`` ramps the rate up after each reset.

    >>> import jax, jax.numpy as jnp, optax, optimkit as ok
    >>> rate = ok.cosine_quick_recovery_schedule(0.1, 100, 0, restart_interval=2)
    >>> inner = optax.chain(
    ...     ok.momentum_reset(ok.scale_by_adam(), 2, moments="after", counts="after"),
    ...     optax.add_decayed_weights(0.1),
    ...     optax.scale_by_learning_rate(rate),
    ... )
    >>> tx = ok.refactorized(inner, interval=2, reset_state=False)
    >>> params = {"lora_a": jnp.array([[30.0], [40.0]]), "lora_b": jnp.array([[0.5]])}
    >>> state, grads = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> [[round(x, 1) for x in leaf.ravel().tolist()] for leaf in params.values()]  # norm 5 both
    [[3.0, 4.0], [5.0]]

    Reference: Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent
    Algorithmic Advances and Benchmarking", 2025, arXiv 2505.22922. Agrees with the authors' code,
    which makes the product and its singular values in f32 (goldens ``weight_refactorization__*``).
    """
    check_count(interval=interval)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> RefactorizedState:
        check_real(params, "parameter")
        factor_pairs(params, is_pair)
        return RefactorizedState(zero_count(), inner.init(params))

    def update(
        updates: PyTree,
        state: RefactorizedState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, RefactorizedState]:
        weights: PyTree = require_params(params, "refactorized")
        check_match(updates, weights, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        pairs = factor_pairs(weights, is_pair)
        count = next_count(state.count)

        inner_state = state.inner_state
        if reset_state and interval:
            again = due(state.count, interval) & (state.count > 0)
            inner_state = jax.tree.map(
                lambda new, old: jnp.where(again, new, old).astype(old.dtype),
                inner.init(weights),
                inner_state,
            )
        extra.setdefault("global_count", state.count)
        updates, inner_state = inner.update(updates, inner_state, weights, **extra)

        if interval and pairs:
            steps, structure = jax.tree.flatten(updates)
            factors = sorted({place for pair in pairs for place in pair})
            places = {place: index for index, place in enumerate(factors)}
            own = [(places[a], places[b]) for a, b in pairs]
            old = [jax.tree.leaves(weights)[place] for place in factors]
            jumped = jax.lax.cond(
                due(count, interval),
                lambda steps: _with_jump(steps, old, own),
                lambda steps: steps,
                [steps[place] for place in factors],
            )
            for place, step in zip(factors, jumped, strict=True):
                steps[place] = step
            updates = structure.unflatten(steps)
        return updates, RefactorizedState(count, inner_state)

    return transformation(init, update)


def _with_jump(steps: list[Array], old: list[Array], pairs: list[tuple[int, int]]) -> list[Array]:
    """The steps of factors, and from where they lead to the balanced factors."""
    wide = [p.astype(compute_dtype(u, p)) for u, p in zip(steps, old, strict=True)]
    moved = [p + u.astype(p.dtype) for u, p in zip(steps, wide, strict=True)]
    new = refactorize_pairs(moved, pairs)
    return [
        # Of a pair that stays, the step as it came: a difference would round it.
        narrow(jnp.where(jnp.all(n == m), u.astype(p.dtype), n - p), u.dtype)
        for n, m, u, p in zip(new, moved, steps, wide, strict=True)
    ]


def _example_pair(first: str, second: str) -> bool:
    """Two dense kernels of the suite's parameters that fit one another."""
    return (first, second) in (
        ("dense/kernel", "head/kernel"),
        ("dense/kernel", "other/kernel"),
    )


RECORD = Method(
    factory=refactorized,
    kind="wrapper",
    summary="replace low-rank factors by the balanced ones every so many steps",
    example={"interval": 2, "is_pair": _example_pair},
    example_made={"inner": scale_by_adam},
    static=("inner", "interval", "is_pair", "reset_state"),
    needs=("params",),
    position="alone",
    communication="gather",
    response="bounded",
    state_bytes=8,
    moved_bytes=36,  # 28, and the update stored and read once more around the condition
    paper='Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent '
    'Algorithmic Advances and Benchmarking", 2025, arXiv 2505.22922',
    reference="OptimAI-Lab/Memory_Efficient_Pretraining@9f803d4c6af7e5d312e97de46d7008ec55d990cb:"
    "para_eff_pt/pt_sltrain/splora_model.py:SpLoRaLinear.merge_and_reinit",
    licence="",
)
