"""MKOR's two factors of a layer: how a refresh follows the statistics, and what they do."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from optimkit.matrices.kronecker import (
    Factor,
    as_matrix,
    bias_like,
    blend,
    choose,
    divided,
    from_matrix,
    image,
    is_finite,
    largest,
    layer_shape,
    rank_one,
    two_sided,
    whole,
)
from optimkit.numerics import narrow, safe_div, safe_norm
from optimkit.protocols import Array, MatrixAxes

UPDATE_RULES = ("code", "paper", "exact")
RESETS = ("identity", "blend")

UpdateRule: TypeAlias = Literal["code", "paper", "exact"]
Reset: TypeAlias = Literal["identity", "blend"]


class Pair(NamedTuple):
    """The two factors of a layer, and whether they start anew."""

    a: Factor
    g: Factor
    reset_a: Array
    reset_g: Array


class RefreshRule(NamedTuple):
    """How factors are refreshed; the names are those of ``scale_by_mkor``."""

    update_rule: UpdateRule
    reset: Reset
    factor_decay: Any
    threshold: Any
    stabilization: Any


def refreshed(pair: Pair, a: Array, g: Array, rule: RefreshRule) -> Pair:
    """The factors of a layer after one pair of statistics."""
    if rule.update_rule == "code":
        return _refresh_code(pair, a, g, rule)
    follow = _exact if rule.update_rule == "exact" else _paper

    def one(factor: Factor, v: Array) -> Factor:
        share = jnp.where(largest(factor) > rule.threshold, rule.stabilization, 0.0)
        stable = blend(factor, share)
        return _if_finite(follow(stable, image(stable, v), rule.factor_decay), factor)

    return Pair(one(pair.a, a), one(pair.g, g), pair.reset_a, pair.reset_g)


def _refresh_code(pair: Pair, a: Array, g: Array, rule: RefreshRule) -> Pair:
    """Inputs first: where they trip, the outputs are reset in this refresh, they in the next."""

    def one(factor: Factor, v: Array, due_now: Array) -> tuple[Factor, Array]:
        fresh = blend(factor, jnp.asarray(1.0 if rule.reset == "identity" else rule.stabilization))
        mixed = blend(factor, jnp.asarray(1 - rule.factor_decay))
        of = image(mixed, v)
        followed = rank_one(mixed, jnp.ones_like(of.form), of, -1 / (1 + of.form))
        new = choose(due_now, fresh, _if_finite(followed, factor))
        return new, ~due_now & (largest(new) > rule.threshold)

    new_a, tripped = one(pair.a, a, pair.reset_a)
    new_g, tripped_g = one(pair.g, g, pair.reset_g | tripped)
    return Pair(new_a, new_g, tripped | tripped_g, tripped_g)


def _exact(factor: Factor, of: Any, decay: Any) -> Factor:
    scale = (1 - decay) / (decay * (decay + (1 - decay) * of.form))
    return rank_one(factor, jnp.full_like(of.form, 1 / decay), of, -scale)


def _paper(factor: Factor, of: Any, decay: Any) -> Factor:
    scale = (1 - decay) / (decay**2 * (1 + decay * (1 - decay) * of.form))
    return rank_one(factor, jnp.full_like(of.form, decay), of, scale)


def _if_finite(new: Factor, old: Factor) -> Factor:
    return choose(is_finite(new), new, old)


def precondition(
    pair: Pair, kernel: Array, bias: Array | None, axes: MatrixAxes
) -> tuple[Array, Array | None]:
    """The new gradient of kernel and bias, in the dtypes and places in which they came."""
    dtype = pair.a.square.dtype
    batch, _, outputs = layer_shape(kernel, axes)
    wide = as_matrix(jnp.asarray(kernel, dtype), axes)
    wide_bias = None
    if bias is not None:
        flat = jnp.asarray(whole(bias, bias), dtype)
        wide_bias = flat.reshape(*batch, outputs)
    new, new_bias = two_sided(pair.a, pair.g, wide, wide_bias)

    def norms(w: Array, b: Array | None) -> Array:
        norm = safe_norm(w, (-2, -1))
        return norm if b is None else norm + safe_norm(b, -1)

    factor = safe_div(norms(wide, wide_bias), norms(divided(new), new_bias), jnp.nan)
    # Zero gradients, and products beyond what floats hold, keep what they have.
    good = jnp.isfinite(factor)
    factor = jnp.where(good, factor, 0)

    def scaled(old: Array, v: Array, axes: int) -> Array:
        over = tuple(range(-axes, 0))
        return jnp.where(jnp.expand_dims(good, over), jnp.expand_dims(factor, over) * v, old)

    done = from_matrix(scaled(wide, new, 2), kernel, axes)
    done = narrow(done, jnp.result_type(kernel))
    if bias is None or wide_bias is None or new_bias is None:
        return done, None
    done_bias = bias_like(scaled(wide_bias, new_bias, 1), bias)
    return done, narrow(done_bias, jnp.result_type(bias))
