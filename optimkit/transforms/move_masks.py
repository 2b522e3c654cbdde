"""Moving masks: the smallest active weights are dropped, and as many other entries grow."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import named_leaves
from optimkit.leaves import check_match
from optimkit.matrices.statistics import magnitude_bits
from optimkit.numerics import (
    as_float,
    check_choice,
    check_range,
    compute_dtype,
    in_turn,
    safe_div,
    turn_after,
)
from optimkit.protocols import Array, PyTree
from optimkit.transforms.choose_entries import (
    above_smallest,
    count_entries,
    largest_entries,
    random_entries,
)
from optimkit.transforms.masks import leaf_key, leaf_masks

Growth: TypeAlias = Literal["random", "random_unfired", "gradient", "momentum", "none"]
GROWTHS = ("random", "random_unfired", "gradient", "momentum", "none")


def update_masks(
    masks: PyTree,
    params: PyTree,
    scores: PyTree | None,
    rate: Any,
    *,
    growth: Growth = "random",
    key: Array | None = None,
    fired: PyTree | None = None,
    frozen: PyTree | None = None,
    exact_growth: bool = False,
) -> PyTree:
    """Drops the smallest active weights of every sparse leaf, and grows as many other entries.

    Of a active entries the n = ceil(rate a) smallest are dropped, with all that tie with the
    largest of them; at n = 0 only exact zeros. What was just dropped may be grown again.

    Args:
      masks: a tree like ``params``, of bool arrays and None or True for dense leaves.
      params: the weights; those that a mask hides count as zero.
      scores: a tree like ``params`` whose largest magnitudes grow, for ``"gradient"`` and
        ``"momentum"``. NaN counts as zero; among equal scores the first in the array's order.
      rate: share of active entries to drop, in [0, 1].
      growth: ``"random"``, ``"random_unfired"`` (entries that were never active, and random ones
        where they are too few), ``"gradient"``, ``"momentum"`` (both by ``scores``), or ``"none"``,
        which prunes.
      key: random key, for the two random rules.
      fired: a tree like ``masks``, the entries ever active, for ``"random_unfired"``. Afterwards it
        is ``fired | masks``.
      frozen: a tree like ``masks``, also with one bool for a whole leaf: True = is neither dropped
        nor grown, and does not count.
      exact_growth: let random growth take exactly as many entries as were dropped. Otherwise each
        one outside grows with the probability dropped / outside, and their number is random.

    Returns:
      The new masks, with True in the place of dense leaves.

    Raises:
      ValueError: for an unknown rule, a rate out of range, a tree of another structure or shape, or
        if what the rule needs is missing.

    Each leaf is read about 31 times (f32) to find a threshold, and twice that to grow by score;
    nothing is sorted, and a sharded leaf stays where it lies.

    >>> masks = {"w": jnp.array([True, True, False, False])}
    >>> params = {"w": jnp.array([1.0, 0.1, 0.0, 0.0])}
    >>> grads = {"w": jnp.array([0.0, 1.0, 2.0, 9.0])}
    >>> update_masks(masks, params, grads, 0.5, growth="gradient")["w"].tolist()
    [True, False, False, True]
    """
    check_choice(GROWTHS, growth=growth)
    check_range(rate=rate, ge=0, le=1)
    by_score = growth in ("gradient", "momentum")
    for needed, name, given in (
        (by_score, "scores", scores),
        (growth.startswith("random"), "key", key),
        (growth == "random_unfired", "fired", fired),
    ):
        if needed and given is None:
            raise ValueError(f"{name} is missing, which growth={growth!r} needs")
    if by_score:
        check_match(scores, params, what="scores", like="the parameters")
    leaves, structure = named_leaves(params), jax.tree.structure(params)
    old = leaf_masks(masks, params, what="masks")
    nothing = [None] * len(leaves)
    score = structure.flatten_up_to(scores) if by_score else nothing
    used = leaf_masks(fired, params, what="fired") if growth == "random_unfired" else nothing
    fixed = nothing if frozen is None else leaf_masks(frozen, params, what="frozen")

    def grown(name: str, kept: Array, free: Array, removed: Array, s: Any, f: Any) -> Array:
        """The entries that stay, and as many of the free ones as were removed."""
        if growth == "none":
            return kept
        if by_score:
            bits, _ = magnitude_bits(jnp.where(jnp.isnan(s), 0, s))
            return kept | largest_entries(bits, free, removed)
        first, rest = jax.random.split(leaf_key(key, name))
        if f is not None:
            unused = random_entries(first, free & ~jnp.asarray(f).astype(bool), removed)
            kept, free, removed = kept | unused, free & ~unused, removed - count_entries(unused)
        if exact_growth:
            return kept | random_entries(rest, free, removed)
        share = safe_div(as_float(removed), as_float(count_entries(free)))
        return kept | (free & (jax.random.uniform(rest, kept.shape, jnp.float32) < share))

    def one(turn: Any, name: str, w: Array, mask: Any, s: Any, f: Any, stop: Any) -> Array:
        if mask is None or not np.ndim(mask):
            return jnp.ones((), bool)
        mask = jnp.asarray(mask).astype(bool)
        stay = jnp.asarray(False if stop is None else stop).astype(bool)
        w = in_turn(jnp.asarray(w, compute_dtype(w)), turn)
        if by_score:
            s = in_turn(jnp.asarray(s, compute_dtype(s)), turn)
        own = mask & ~stay
        kept = _drop(own, w, rate)
        new = grown(name, kept, ~(kept | stay), count_entries(own) - count_entries(kept), s, f)
        return new if stop is None else jnp.where(stay, mask, new)

    new: list[Array] = []
    turn: Array | None = None
    for named, *others in zip(leaves, old, score, used, fixed, strict=True):
        new.append(one(turn, *named, *others))
        # A float, for the compiler knows that 0 times an integer is 0.
        after = turn_after(new[-1], turn)
        turn = None if after is None else after.astype(jnp.float32)
    return structure.unflatten(new)


def _drop(mask: Array, weight: Array, rate: Any) -> Array:
    """The active entries that stay."""
    active = count_entries(mask)
    number = jnp.minimum(jnp.ceil(rate * as_float(active)).astype(jnp.int32), active)
    hidden = mask.size - active
    return above_smallest(jnp.where(mask, weight, 0), jnp.where(number > 0, hidden + number, 0))
