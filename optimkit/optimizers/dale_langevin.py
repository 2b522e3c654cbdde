"""Dale-Langevin: sampling by multiplicative noise, as a gradient transformation."""

from __future__ import annotations

import zlib
from typing import Any, Literal, NamedTuple

import jax

from optimkit.layout import path_name
from optimkit.leaves import zero_count
from optimkit.numerics import check_choice, check_count, check_range, next_count
from optimkit.protocols import (
    Array,
    GradientTransformation,
    Method,
    PyTree,
    ScalarOrSchedule,
    transformation,
)
from optimkit.transforms.exponentiate_updates import exponentiate_updates
from optimkit.transforms.keep_signs import sign_preserving
from optimkit.transforms.multiplicative_langevin import DRIFTS, langevin_exponent


class DaleLangevinState(NamedTuple):
    """``count``: int32 scalar, which numbers the random draws."""

    count: Array


def dale_langevin(
    delta: ScalarOrSchedule,
    sigma: Any,
    *,
    mu: Any = None,
    temperature: Any = 1.0,
    anneal: ScalarOrSchedule = 1.0,
    drift: Literal["reverse", "langevin"] = "reverse",
    seed: int,
) -> GradientTransformation:
    r"""Moves parameters by multiplicative noise and drift, so that no sign ever changes.

    With the score :math:`s = -g/T` and standard normal z, fresh in every step:

    .. math::

        w \leftarrow w \exp\!\big(\delta\sigma^2\, w s - \delta(\mu - \tfrac32 \sigma^2)
            + a\sqrt\delta\,\sigma z\big)

    Args:
      delta: step size, a number or a schedule over the 0-based count.
      sigma: volatility, >= 0; the authors have 0.8.
      mu: drift of the forward motion; default sigma^2 / 2, the authors' value.
      temperature: T, > 0: the gradient of the loss over T stands for minus the score.
      anneal: a, factor on the noise, a number or a schedule over the 0-based count.
      drift: ``"reverse"`` as above, the authors' denoising step; ``"langevin"`` halves the part
        without noise: with the default mu, parameters then sample from exp(-loss / T).
      seed: of the noise; each leaf, told by its path, and each step draws afresh.

    Returns:
      An optimizer that needs ``params``; its state is one int32.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Parameters that are zero stay so. Steps are exponential in the gradient: they are limited only
    where the result would overflow, or round to zero, in the dtype of the parameters. The sampled
    density lives on each parameter's own side of zero. Sampling is exact as delta goes to
    zero; the variance of log|w| is too large by the factor 1 / (1 - r/2) where one step removes
    the fraction r of a deviation.

    >>> import jax.numpy as jnp, optax
    >>> tx = dale_langevin(0.1, 0.0, mu=1.0, seed=0)  # no volatility: decay by exp(-0.1)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, state = tx.update(jnp.zeros(2), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]
    [0.905, -1.81]

    Reference: Shetty et al., "Dale meets Langevin: A Multiplicative Denoising Diffusion Model",
    2025, arXiv 2510.02730. The step is the authors'; the transformation around it is ours.
    """
    check_range(delta=delta, sigma=sigma, anneal=anneal, ge=0)
    check_range(temperature=temperature, gt=0)
    check_range(mu=mu, ge=-float("inf"))
    check_choice(tuple(DRIFTS), drift=drift)
    check_count(seed=seed)

    def init(params: PyTree) -> DaleLangevinState:
        del params
        return DaleLangevinState(zero_count())

    def update(
        updates: PyTree, state: DaleLangevinState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, DaleLangevinState]:
        del extra
        count = state.count
        key = jax.random.fold_in(jax.random.key(seed), count)
        settings = {
            "delta": delta(count) if callable(delta) else delta,
            "sigma": sigma,
            "mu": mu,
            "anneal": anneal(count) if callable(anneal) else anneal,
            "drift": drift,
        }

        def exponent(path: Any, g: Array, w: Array) -> Array:
            # By name, not by number: a mask around this transformation changes no draw.
            own = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
            noise = jax.random.normal(own, g.shape, g.dtype)
            return langevin_exponent(-(w * g) / temperature, noise, **settings).astype(g.dtype)

        exponents = jax.tree_util.tree_map_with_path(exponent, updates, params)
        return exponents, DaleLangevinState(next_count(count))

    return sign_preserving(exponentiate_updates(signed=False), transformation(init, update))


RECORD = Method(
    factory=dale_langevin,
    kind="recipe",
    summary="Langevin sampling by multiplication: noise that keeps signs",
    example={"delta": 1e-3, "sigma": 0.8, "seed": 0},
    traced=("delta", "sigma", "mu", "temperature", "anneal"),
    static=("drift", "seed"),
    needs=("params",),
    position="alone",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Shetty et al., "Dale meets Langevin: A Multiplicative Denoising Diffusion Model", '
    "2025, arXiv 2510.02730",
    reference="Madhavaprasath23/Dale-Meets-Langevin:mnist_exps/sampling.py:adls_step",
    licence="",
)
