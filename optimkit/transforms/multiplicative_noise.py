"""Noise that multiplies the gradient: the spread of a small batch's update, with a large batch."""

from __future__ import annotations

import zlib
from typing import Any, Literal, NamedTuple

import jax

from optimkit.layout import named_leaves
from optimkit.leaves import check_match, map_leaves, zero_count
from optimkit.numerics import check_choice, check_count, check_range, next_count
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation

SHARES = ("leaf", "tree")


class MultiplicativeGradientNoiseState(NamedTuple):
    """``count``: int32 scalar, which the random numbers are drawn from together with the seed."""

    count: Array


def multiplicative_gradient_noise(
    std: Any, *, seed: int, share: Literal["leaf", "tree"] = "leaf"
) -> GradientTransformation:
    r"""Multiplies the gradient by a random number around 1.

    .. math:: g \leftarrow g\,(1 + \sigma z), \qquad z \sim \mathcal N(0, 1)

    Raising the rate with the square root of the batch keeps the covariance of the update; noise
    with :math:`\sigma^2` proportional to the batch size is the alternative that keeps the rate.

    Args:
      std: sigma, >= 0; 0 changes nothing.
      seed: seed of the random numbers, >= 0.
      share: ``leaf`` draws one number for each leaf and step, ``tree`` one for all leaves.

    Returns:
      A transformation for the front of a chain. It keeps a count alone. A leaf's numbers depend on
      the seed, the step and its path, so that masks and other leaves do not change them.

    Raises:
      ValueError: if an argument is out of range, the word is unknown, or a gradient has another
        shape.

    Provisional: the paper multiplies each example's gradient by its own number before the mean;
    here the mean is multiplied, whose direction stays. With std above 0.5 signs flip now and then.

    >>> import jax.numpy as jnp
    >>> tx = multiplicative_gradient_noise(0.1, seed=0)
    >>> g = jnp.array([1.0, -2.0])
    >>> noisy, _ = tx.update(g, tx.init(g))
    >>> float(noisy[1] / noisy[0]), bool(abs(noisy[0] - 1) < 0.5)
    (-2.0, True)

    Reference: Hoffer et al., "Train longer, generalize better: closing the generalization gap in
    large batch training of neural networks", NeurIPS 2017, arXiv 1705.08741.
    """
    check_range(std=std, ge=0)
    check_count(seed=seed)
    check_choice(SHARES, share=share)

    def init(params: PyTree) -> MultiplicativeGradientNoiseState:
        del params
        return MultiplicativeGradientNoiseState(zero_count())

    def update(
        updates: PyTree,
        state: MultiplicativeGradientNoiseState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MultiplicativeGradientNoiseState]:
        del extra
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        names = iter([name for name, _ in named_leaves(updates)])

        def step(g: Array) -> Array:
            name = next(names) if share == "leaf" else ""
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return g * (1 + std * jax.random.normal(own, (), g.dtype))

        return map_leaves(step, updates), MultiplicativeGradientNoiseState(next_count(state.count))

    return transformation(init, update)


RECORD = Method(
    factory=multiplicative_gradient_noise,
    kind="piece",
    summary="multiply the gradient by a random number around 1",
    example={"std": 0.1, "seed": 0},
    traced=("std",),
    static=("seed", "share"),
    position="first",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    exempt={"fidelity": "the paper's code has no such noise, so there is nothing to record"},
    status="provisional",
    paper='Hoffer et al., "Train longer, generalize better: closing the generalization gap in '
    'large batch training of neural networks", NeurIPS 2017, arXiv 1705.08741',
)
