"""MeZO: a training step with the memory of two forward passes, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optimkit.gradients.directions import Direction, GivenDirection, difference_quotient
from optimkit.gradients.zeroth_order import evaluate, finite_or_zero
from optimkit.layout import select_leaves
from optimkit.numerics import check_count, check_range, compute_dtype, turn_after
from optimkit.protocols import Array, LeafSelector, PyTree

UNDECAYED = ("bias", "layernorm", "layer_norm")


def is_decayed(name: str, leaf: Any) -> bool:
    """MeZO's rule: all but names that contain bias, layernorm or layer_norm, in any case.

    >>> is_decayed("dense/kernel", None), is_decayed("LayerNorm_0/scale", None)
    (True, False)
    """
    del leaf
    return not any(word in name.lower() for word in UNDECAYED)


@dataclasses.dataclass(frozen=True)
class MezoStep:
    """One step: ``step(params, key, loss_fn) -> params``; see ``mezo``."""

    learning_rate: Any
    eps: Any
    weight_decay: Any
    decay_mask: LeafSelector
    num_samples: int
    in_place: bool
    axis_name: Any

    def __call__(
        self,
        params: PyTree,
        key: Array,
        loss_fn: Callable[[PyTree], Any],
        *,
        direction: PyTree | None = None,
    ) -> PyTree:
        """The parameters after the step."""
        return self.loss_and_step(params, key, loss_fn, direction=direction)[1]

    def loss_and_step(
        self,
        params: PyTree,
        key: Array,
        loss_fn: Callable[[PyTree], Any],
        *,
        direction: PyTree | None = None,
    ) -> tuple[Array, PyTree]:
        """``(loss, params)`` with the loss at the first perturbed point, or their mean."""
        decayed = select_leaves(self.decay_mask, params, default=is_decayed, argument="decay_mask")
        eps, losses, slopes, noises = self.eps, [], [], []
        now = params
        for index in range(1 if direction is not None else self.num_samples):
            z = self._direction(key, params, index, direction)
            start = now
            now = z.map(lambda w, z: w + eps * z, start)
            plus = self._loss(loss_fn, now)
            z = z.after(plus)
            if self.in_place:
                now = z.map(lambda w, z: w - 2 * eps * z, now)
            else:
                now = z.map(lambda w, z: w - eps * z, start)
            minus = self._loss(loss_fn, now)
            z = z.after(minus)
            if not self.in_place:
                now = start
            elif index + 1 < self.num_samples and direction is None:
                now = z.map(lambda w, z: w + eps * z, now)
            losses.append(plus)
            slopes.append(finite_or_zero(difference_quotient(plus, minus, 2 * eps)))
            noises.append(z)
        return sum(losses) / len(losses), self._update(now, slopes, noises, decayed)

    def _direction(
        self, key: Array, params: PyTree, index: int, direction: PyTree | None
    ) -> Direction:
        if direction is not None:
            return GivenDirection(direction, params)
        return Direction(key if self.num_samples == 1 else jax.random.fold_in(key, index), params)

    def _loss(self, loss_fn: Callable[[PyTree], Any], params: PyTree) -> Array:
        loss, _ = evaluate(loss_fn, params, (), False)
        return loss if self.axis_name is None else jax.lax.pmean(loss, self.axis_name)

    def _update(
        self, now: PyTree, slopes: list[Array], noises: list[Direction], decayed: PyTree
    ) -> PyTree:
        leaves, structure = jax.tree.flatten(now)
        turn: Array | None = None
        for i, (w, mark) in enumerate(zip(leaves, jax.tree.leaves(decayed), strict=True)):
            if not jnp.issubdtype(jnp.result_type(w), jnp.floating):
                continue
            if turn is not None:
                # One leaf after the other, or the noise of all would be there at once.
                noises = [z.after(turn) for z in noises]
            new = jnp.asarray(w, compute_dtype(w))
            if self.in_place:  # the last sample's way back
                new = new + self.eps * noises[-1].leaf(i)
            pairs = zip(slopes, noises, strict=True)
            g = sum(p.astype(new.dtype) * z.leaf(i) for p, z in pairs) / len(slopes)
            new = new - self.learning_rate * (g + self.weight_decay * new if mark else g)
            turn = turn_after(new, turn)
            leaves[i] = new.astype(jnp.result_type(w))
        return structure.unflatten(leaves)


def mezo(
    learning_rate: Any,
    *,
    eps: Any = 1e-3,
    weight_decay: Any = 0.0,
    decay_mask: LeafSelector = None,
    num_samples: int = 1,
    in_place: bool = True,
    axis_name: Any = None,
) -> MezoStep:
    r"""A step of gradient descent by ``spsa`` that holds the parameters once, and no gradient.

    .. math::

        p = \frac{L(w + \epsilon z) - L(w - \epsilon z)}{2\epsilon}, \qquad
        w \leftarrow w - \eta\,(p\, z + \lambda w)

    The normal noise z is made from its key four times: to go there, across, back, and to step.

    Args:
      learning_rate: eta, a number; MeZO takes 1e-7 to 1e-6 for all weights of a large model.
      eps: the way to each side, > 0; tune it together with the rate.
      weight_decay: lambda, >= 0.
      decay_mask: which leaves are decayed, True = decayed: a tree of bools, ``(path, leaf) ->
        bool`` or path patterns; default MeZO's rule, all but names with bias or layer norm in them.
      num_samples: n, >= 1: the mean over n directions, one after the other.
      in_place: go there and back by adding to the parameters, as MeZO does. Jitted with the
        parameters donated, the step holds them once, and is off by their rounding: 1e-7 of them a
        step in f32, but a random walk in bfloat16. False: every way starts at the parameters
        themselves, which then stand in memory twice, and nothing is left of it.
      axis_name: of devices, over which both values are averaged. Give all the same key.

    Returns:
      ``MezoStep``: ``step(params, key, loss_fn) -> params``, where ``loss_fn`` closes over the
      batch and has dropout off; ``step.loss_and_step`` gives ``(loss, params)``. A new key every
      step. ``direction=`` replaces z.

    Raises:
      ValueError: if an argument is out of range, or a tree does not match.

    Parameters come back in their dtypes. If the difference is not finite, only decay acts.

    >>> step = mezo(0.25, eps=0.5)
    >>> w = {"kernel": jnp.array([1.0, 2.0])}
    >>> z = {"kernel": jnp.array([1.0, -1.0])}
    >>> step(w, jax.random.key(0), lambda w: jnp.sum(w["kernel"] ** 2), direction=z)  # p = -2
    {'kernel': Array([1.5, 1.5], dtype=float32)}

    Reference: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023,
    arXiv 2305.17333. Agrees with the authors' code to rounding.
    """
    if callable(learning_rate):
        raise ValueError("learning_rate must be a number: a step has no count to ask a schedule by")
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    check_range(eps=eps, gt=0)
    check_count(num_samples=num_samples, least=1)
    return MezoStep(learning_rate, eps, weight_decay, decay_mask, num_samples, in_place, axis_name)
