"""Weight normalisation inside the step: direction and length of each row move on their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import matrix_axes, path_name
from optimkit.leaves import (
    check_match,
    check_real,
    decay_tree,
    narrow_like,
    require_params,
    widen,
    zero_count,
)
from optimkit.numerics import (
    check_choice,
    check_range,
    compute_dtype,
    in_turn,
    next_count,
    safe_div,
    saturate,
    sums_together,
    turn_after,
)
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Mask,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam

Axes: TypeAlias = int | tuple[int, ...]
NormAxis: TypeAlias = Axes | Callable[[str, Any], Axes | None] | None
"""The axes of a norm, or ``(path, leaf) -> axes``, where None leaves a leaf to the plain step."""

GRADIENTS = ("identity", "tangent")


class WeightNormalizedState(NamedTuple):
    """``direction_norm``: a norm a row, f32 or better; a 0-d zero for a leaf with a plain step.

    ``count``: int32 scalar, for a rate that is a schedule. ``direction_state`` and
    ``magnitude_state``: states of the two wrapped transformations.
    """

    count: Array
    direction_norm: PyTree
    direction_state: PyTree
    magnitude_state: PyTree


class _Rows(NamedTuple):
    """A leaf before the step: ``v = factor * w``, per row its norm and whether that is one."""

    factor: Array
    norm: Array
    live: Array
    radial: Array


def weight_normalized(
    inner_direction: optax.GradientTransformation,
    inner_magnitude: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    norm_axis: NormAxis = None,
    normalize_vectors: bool = False,
    weight_norm_gradient: Literal["identity", "tangent"] = "identity",
    norm_eps: Any = 1e-12,
) -> GradientTransformation:
    r"""Steps the direction and the length of each row by a transformation of its own.

    .. math::

        d &= \langle G, v/\|v\|\rangle, \qquad
            D = G \quad\text{or}\quad G - d\, v/\|v\| \\
        v' &= (v - \eta\operatorname{dir}(D))(1 - \eta\lambda), \qquad
            g = (\|v\| - \eta\operatorname{mag}(d))(1 - \eta\lambda) \\
        w' &= g\, v'/\|v'\|

    for each row of a matrix: what feeds one output. Of v only the norm is kept, with the sign of g:
    :math:`v = w\,\|v\|/\|w\|` up to that sign. g is not kept: it starts from :math:`\|v\|` in every
    step, so that a step of the length lasts until the next one, and a rate of zero takes it back.
    Lasting growth comes from v.

    Args:
      inner_direction: gives a direction (no rate, no sign) from D, and sees v as its parameters.
      inner_magnitude: the same from d, one number a row, in the shape (1, outputs) of a kernel; it
        sees the norms of v as its parameters, and a 0-d zero in the place of other leaves.
      learning_rate: eta, a number or a schedule over the 0-based count. The step is not linear in
        it, so it belongs here and this link stands last.
      weight_decay: lambda, >= 0; it acts after the step, on v and on g.
      mask: which leaves are decayed (True = decayed); default all.
      norm_axis: axis or axes over which a norm is taken. Default: the inputs, which are axis 0 of a
        kernel and the last axis of an embedding table. An axis, or several, for all leaves of rank
        two; or ``(path, leaf) -> axes`` for all leaves, None for the plain step.
      normalize_vectors: take biases and norm scales as one row each; else they get the plain step.
      weight_norm_gradient: what ``inner_direction`` sees: ``"identity"`` the gradient, as the
        authors' code has it; ``"tangent"`` without its part along v: the gradient of weight
        normalisation.
      norm_eps: rows of a norm no larger get the plain step, >= 0.

    Returns:
      A transformation for the end of a chain that needs ``params``; 4 bytes a row beside what the
      two transformations keep.

    Raises:
      ValueError: if an argument is out of range, params are missing, a gradient has another shape,
        or a leaf has no such axis.

    The plain step is :math:`w' = (w - \eta\operatorname{dir}(D))(1 - \eta\lambda)`: for scalars,
    vectors, and leaves of more than two axes unless ``norm_axis`` is a function. A row of zeros has
    no direction, and begins with a plain step, where the authors' code divides by zero. The norms
    stay f32 where parameters have 16 bits.

    >>> import jax.numpy as jnp, optax
    >>> tx = weight_normalized(optax.identity(), optax.identity(), 0.5)
    >>> w = {"kernel": jnp.array([[3.0], [4.0]])}  # one output, norm 5
    >>> g = {"kernel": jnp.array([[0.0], [2.0]])}  # d = 2 * 4 / 5
    >>> u, state = tx.update(g, tx.init(w), w)
    >>> new = optax.apply_updates(w, u)["kernel"].ravel()  # direction (3, 3), length 5 - 0.8
    >>> [round(float(x), 3) for x in new], round(float(state.direction_norm["kernel"].item()), 3)
    ([2.97, 2.97], 4.243)

    Reference: Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM
    Training", AAAI 2025, arXiv 2412.19616.
    """
    check_choice(GRADIENTS, weight_norm_gradient=weight_norm_gradient)
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, norm_eps=norm_eps, ge=0)
    direction = optax.with_extra_args_support(inner_direction)
    magnitude = optax.with_extra_args_support(inner_magnitude)

    def axes_of(params: PyTree) -> list[tuple[int, ...]]:
        """Per leaf, the axes of its norms; none for a plain step."""
        return [
            norm_axes(path_name(path), leaf, norm_axis, normalize_vectors)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        ]

    def first_norms(params: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(params)
        return structure.unflatten(map(_row_norms, leaves, axes_of(params)))

    def init(params: PyTree) -> WeightNormalizedState:
        check_real(params, "parameter")
        params = widen(params)
        norms = first_norms(params)
        return WeightNormalizedState(
            zero_count(), norms, direction.init(params), magnitude.init(norms)
        )

    def before(g: Array, w: Array, kept: Array, axes: tuple[int, ...]) -> _Rows:
        floor = _floor(norm_eps, w.dtype)
        bounded = saturate(w)
        squares, along = sums_together([jnp.square(bounded), saturate(g) * bounded], axes)
        norm = jnp.sqrt(squares)
        known = (jnp.abs(kept) > floor) & (norm > floor)
        factor = safe_div(kept, jnp.where(known, norm, 0), 1)
        norm = jnp.where(known, jnp.abs(kept), norm)
        live = norm > floor
        return _Rows(factor, norm, live, safe_div(along * factor, jnp.where(live, norm, 0)))

    def seen(g: Array, w: Array, rows: _Rows | None) -> Array:
        if rows is None or weight_norm_gradient == "identity":
            return g
        return saturate(g) - w * (rows.factor * safe_div(rows.radial, rows.norm))

    def update(
        updates: PyTree,
        state: WeightNormalizedState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, WeightNormalizedState]:
        params = require_params(params, "weight_normalized")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        expected = jax.eval_shape(first_norms, widen(params))
        check_match(state.direction_norm, expected, what="state", like="the parameters'")
        structure = jax.tree.structure(params)
        grads = jax.tree.leaves(widen(updates, params))
        weights, kept = jax.tree.leaves(widen(params)), jax.tree.leaves(state.direction_norm)
        axes = axes_of(params)
        rows = [
            before(g, w, norm, own) if own else None
            for g, w, norm, own in zip(grads, weights, kept, axes, strict=True)
        ]
        pairs = list(zip(weights, rows, kept, strict=True))
        moved, direction_state = direction.update(
            structure.unflatten(map(seen, grads, weights, rows)),
            state.direction_state,
            structure.unflatten([w if own is None else w * own.factor for w, own, _ in pairs]),
            **extra,
        )
        lengths, magnitude_state = magnitude.update(
            structure.unflatten([zero if own is None else own.radial for _, own, zero in pairs]),
            state.magnitude_state,
            structure.unflatten([zero if own is None else own.norm for _, own, zero in pairs]),
            **extra,
        )
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        decays = jax.tree.leaves(decay_tree(mask, params))
        turn: Array | None = None

        def after(index: int, step: Array, length: Array) -> tuple[Array, Array]:
            nonlocal turn
            w, own = weights[index], rows[index]
            shrink = rate * weight_decay if decays[index] else 0.0
            step = in_turn(step, turn)
            if own is None:
                return (1 - shrink) * (-rate * step) - shrink * w, kept[index]
            v = (w * own.factor - rate * step) * (1 - shrink)
            g = (own.norm - rate * length) * (1 - shrink)
            (squares,) = sums_together([jnp.square(saturate(v))], axes[index])
            turn = turn_after(w, turn, jnp.sum(squares))
            norm = jnp.sqrt(squares)
            live = own.live & (norm > _floor(norm_eps, w.dtype))
            # Behind the barrier v is computed anew, where else it would be stored; and not as v,
            # whose rounding is no smaller than that of w.
            factor = jax.lax.optimization_barrier(safe_div(g, jnp.where(live, norm, 0), 1))
            factor = factor * (1 - shrink)
            update = w * (own.factor * factor - 1) - rate * factor * step
            return update, jnp.where(live & (g < 0), -norm, norm).astype(w.dtype)

        done = [
            after(index, *both)
            for index, both in enumerate(
                zip(structure.flatten_up_to(moved), structure.flatten_up_to(lengths), strict=True)
            )
        ]
        state = WeightNormalizedState(
            next_count(state.count),
            structure.unflatten([norm for _, norm in done]),
            direction_state,
            magnitude_state,
        )
        return narrow_like(structure.unflatten([u for u, _ in done]), updates), state

    return transformation(init, update)


def norm_axes(
    name: str, leaf: Any, norm_axis: NormAxis, normalize_vectors: bool
) -> tuple[int, ...]:
    """The axes over which a leaf's norms are taken; none if it gets the plain step.

    Raises:
      ValueError: if the leaf has no such axis.
    """
    rank = len(np.shape(leaf))
    if callable(norm_axis):
        chosen = norm_axis(name, leaf)
        if chosen is None:
            return ()
    elif rank == 2 and norm_axis is not None:
        chosen = norm_axis
    elif rank in (1, 2):
        seen_as = matrix_axes(name, leaf)
        vector = tuple(range(rank)) if normalize_vectors else ()
        chosen = vector if seen_as is None else seen_as.inputs
    else:
        return ()
    chosen = (chosen,) if isinstance(chosen, int) else tuple(chosen)
    if any(not -rank <= axis < rank for axis in chosen):
        raise ValueError(f"norm_axis {chosen} does not exist in leaf {name!r} of rank {rank}")
    return tuple(sorted({axis % rank for axis in chosen}))


def _row_norms(w: Array, axes: tuple[int, ...]) -> Array:
    if not axes:
        return jnp.zeros((), compute_dtype(w))
    return jnp.sqrt(sums_together([jnp.square(saturate(w))], axes)[0])


def _floor(norm_eps: Any, dtype: Any) -> Array:
    """Smaller norms are none; the squares of smaller entries may be flushed to zero."""
    return jnp.maximum(norm_eps, float(jnp.finfo(dtype).tiny) ** 0.5).astype(dtype)


RECORD = Method(
    factory=weight_normalized,
    kind="wrapper",
    summary="step directions and lengths of rows by a transformation each",
    example={"learning_rate": 0.01, "weight_decay": 0.1, "normalize_vectors": True},
    example_made={
        "inner_direction": lambda: scale_by_adam(eps_form="before_bias_correction"),
        "inner_magnitude": lambda: scale_by_adam(eps_form="before_bias_correction"),
    },
    traced=("learning_rate", "weight_decay", "norm_eps"),
    static=(
        "inner_direction",
        "inner_magnitude",
        "mask",
        "norm_axis",
        "normalize_vectors",
        "weight_norm_gradient",
    ),
    needs=("params",),
    position="last",
    communication="reduce",
    response="bounded",
    # A sum's rounding moves a row's length by 1e-7 to 4e-7 of itself; a step is a hundredth of it.
    tolerance={"sharding": 1e-4},
    state_bytes=8,
    moved_bytes=48,  # 28; gradient and parameter once more for d, and for the new norm p, m and v
    paper='Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM '
    'Training", AAAI 2025, arXiv 2412.19616',
    reference="Jhhuangkay/Gradient-Weight-normalized-Low-rank-Projection-for-Efficient-LLM-"
    "Training@66c8e767c04e6e37a68744c2939209417ae5e4e0:GradNormLoRP/LowRankWeightNormAdamW.py:"
    "LowRankWeightNormAdamW",
    licence="Apache-2.0",
)
