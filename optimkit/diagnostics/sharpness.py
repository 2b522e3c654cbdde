"""The loss's curvature: its extremes, its trace, its density, and what they allow as a rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.gradients.hessian import hessian_product
from optimkit.gradients.krylov import lanczos, random_direction, slq_density
from optimkit.leaves import widen
from optimkit.numerics import check_count, check_range, hyperparameter_dtype, tree_vdot
from optimkit.protocols import Array, PyTree
from optimkit.schedules.batch_scaling import scale_lr_for_batch

LossFn = Callable[[PyTree, Any], Any]


def sharpness(
    loss_fn: LossFn, params: PyTree, batch: Any, key: Array, num_iters: int = 20
) -> jax.Array:
    """The largest eigenvalue of the loss's Hessian, by Lanczos.

    Args:
      loss_fn: ``(params, batch) -> scalar``.
      params: where the Hessian is taken; computed in f32 or better.
      batch: what the loss is taken on, whole: the Hessian of a small batch has larger extremes.
      key: a random key, for the start vector.
      num_iters: products with the Hessian, each two to three gradients; 10 to 20 will do where an
        eigenvalue stands out. Memory: as many copies of the parameters.

    >>> def loss(w, x): return jnp.sum(x * w**2) / 2
    >>> found = sharpness(loss, jnp.ones(2), jnp.array([1.0, 3.0]), jax.random.key(0))
    >>> round(float(found), 4)
    3.0
    """
    return hessian_extremes(loss_fn, params, batch, key, num_iters)["lambda_max"]


def hessian_extremes(
    loss_fn: LossFn, params: PyTree, batch: Any, key: Array, num_iters: int = 20
) -> dict[str, jax.Array]:
    """Largest and smallest eigenvalue of the Hessian, and its spectral density.

    Args:
      loss_fn: ``(params, batch) -> scalar``; this and all else as for ``sharpness``.
      params: where the Hessian is taken.
      batch: what the loss is taken on.
      key: a random key.
      num_iters: products with the Hessian.

    Returns:
      ``lambda_max``, ``lambda_min``; and ``nodes`` and ``weights``, (num_iters,): points of the
      spectrum, and the share of all eigenvalues that each stands for, by one random vector.
    """
    wide = widen(params)

    def product(v: PyTree) -> PyTree:
        return hessian_product(lambda p: loss_fn(p, batch), wide, v)

    found = lanczos(product, random_direction(key, wide), num_iters)
    nodes, weights = slq_density(found.alphas, found.betas)
    return {"lambda_max": nodes[-1], "lambda_min": nodes[0], "nodes": nodes, "weights": weights}


def hessian_trace(
    loss_fn: LossFn, params: PyTree, batch: Any, key: Array, num_samples: int = 10
) -> jax.Array:
    """The trace of the loss's Hessian, by Hutchinson's estimate with random signs.

    Args:
      loss_fn: ``(params, batch) -> scalar``.
      params: where the Hessian is taken; computed in f32 or better.
      batch: what the loss is taken on.
      key: a random key.
      num_samples: products with the Hessian, >= 1. The standard error is at most the Hessian's
        Frobenius norm times the root of ``2 / num_samples``; a diagonal Hessian gives no error.

    >>> def loss(w, x): return jnp.sum(x * w**2) / 2
    >>> float(hessian_trace(loss, jnp.ones(2), jnp.array([1.0, 3.0]), jax.random.key(0)))
    4.0
    """
    return _moments(loss_fn, params, batch, key, num_samples)[0]


def stability_metrics(
    loss_fn: LossFn,
    params: PyTree,
    batch: Any,
    key: Array,
    learning_rate: Any,
    *,
    momentum: Any = 0.0,
    num_iters: int = 20,
    num_samples: int = 10,
) -> dict[str, jax.Array]:
    r"""How close a rate is to the edge of stability.

    On a quadratic, gradient descent with heavy-ball momentum b is stable exactly when
    :math:`\lambda_{max} < 2 (1 + b) / \eta`. A minimum at which SGD without momentum stays has
    :math:`\operatorname{tr} H \le 2 / \eta`.

    Args:
      loss_fn: ``(params, batch) -> scalar``.
      params: where the Hessian is taken.
      batch: what the loss is taken on.
      key: a random key.
      learning_rate: eta, > 0.
      momentum: b, in [0, 1).
      num_iters: products for the sharpness.
      num_samples: products for trace and Frobenius norm.

    Returns:
      Scalars: ``sharpness``; ``trace``; ``fro``, the Frobenius norm; ``gd_threshold``, the
      sharpness at which training turns unstable; ``eta_lambda_over_2`` and ``eta_trace_over_2``,
      both below 1 on the stable side, without momentum.

    Raises:
      ValueError: if an argument is out of range.

    >>> def loss(w, x): return jnp.sum(x * w**2) / 2
    >>> x, key = jnp.array([1.0, 3.0]), jax.random.key(0)
    >>> found = stability_metrics(loss, jnp.ones(2), x, key, 0.5)
    >>> [round(float(found[name]), 3) for name in ("gd_threshold", "eta_lambda_over_2")]
    [4.0, 0.75]

    Reference: Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of
    Stability", ICLR 2021; Wu and Su, "The Implicit Regularization of Dynamical Stability in
    Stochastic Gradient Descent", ICML 2023, arXiv 2305.17490.
    """
    check_range(learning_rate=learning_rate, gt=0)
    check_range(momentum=momentum, ge=0, lt=1)
    most = sharpness(loss_fn, params, batch, key, num_iters)
    trace, square = _moments(loss_fn, params, batch, key, num_samples)
    rate = jnp.asarray(learning_rate, most.dtype)
    return {
        "sharpness": most,
        "trace": trace,
        "fro": jnp.sqrt(square),
        "gd_threshold": 2 * (1 + momentum) / rate,
        "eta_lambda_over_2": rate * most / 2,
        "eta_trace_over_2": rate * trace / 2,
    }


def hessian_noise(
    loss_fn: LossFn,
    params: PyTree,
    batches: tuple[Any, Any],
    batch_sizes: tuple[int, int],
    key: Array,
    num_samples: int = 10,
) -> jax.Array:
    r"""How much the Hessian of one example differs from the mean: ``num_params * sigma2``.

    .. math:: \frac{\overline{\|(H_1 - H_2) v\|^2}}{1/B_1 + 1/B_2}

    over random unit v: what ``noisy_extreme`` needs, as ``sigma2`` with ``num_params=1``.

    Args:
      loss_fn: ``(params, batch) -> scalar``, a mean over the batch.
      params: where the Hessians are taken.
      batches: two independent batches.
      batch_sizes: their sizes B.
      key: a random key.
      num_samples: vectors v, >= 1; two products each.
    """
    check_count(num_samples=num_samples, least=1)
    wide = widen(params)

    def one(key: Array) -> Array:
        v = random_direction(key, wide)
        first, second = (hessian_product(lambda p, b=b: loss_fn(p, b), wide, v) for b in batches)
        apart = jax.tree.map(jnp.subtract, first, second)
        return tree_vdot(apart, apart) / tree_vdot(v, v)

    total = jnp.mean(jax.lax.map(one, jax.random.split(key, num_samples)))
    return total / (1 / batch_sizes[0] + 1 / batch_sizes[1])


def noisy_extreme(
    lam: Any, batch_size: Any, dataset_size: Any, sigma2: Any, num_params: Any
) -> jax.Array:
    r"""What a batch makes of an extreme eigenvalue of the full Hessian.

    With :math:`b = B / (1 - B/N)`, :math:`s^2 = \sigma^2 / b` and P parameters, noise of
    independent entries turns :math:`\lambda` into

    .. math:: \lambda + \frac{P s^2}{\lambda} \text{ if } |\lambda| > s \sqrt{P}, \qquad
        \text{else } \pm 2 s \sqrt{P}

    Args:
      lam: lambda, the eigenvalue of the Hessian on the whole data.
      batch_size: B, > 0.
      dataset_size: N, >= B; ``inf`` where batches are drawn from a stream.
      sigma2: variance of a Hessian entry over the examples, >= 0.
      num_params: P. (``hessian_noise`` gives their product: pass that and 1.)

    Provisional: the formula is that of a spiked random matrix; that the paper has it in this very
    form is from memory.

    >>> [float(noisy_extreme(lam, 1.0, float("inf"), 1.0, 1)) for lam in (2.0, 0.5)]
    [2.5, 2.0]

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", JMLR 2022, arXiv 2006.09092.
    """
    check_range(batch_size=batch_size, dataset_size=dataset_size, gt=0)
    check_range(sigma2=sigma2, num_params=num_params, ge=0)
    lam = jnp.asarray(lam, hyperparameter_dtype())
    share = jnp.clip(1 - jnp.asarray(batch_size) / jnp.asarray(dataset_size), 0, 1)
    square = num_params * sigma2 * share / batch_size
    edge = jnp.sqrt(square)
    outside = jnp.abs(lam) > edge
    sign = jnp.where(lam < 0, -1, 1)
    return jnp.where(outside, lam + square / jnp.where(outside, lam, 1), sign * 2 * edge)


def max_learning_rate_sgd(
    lam1: Any,
    batch_size: Any,
    dataset_size: Any,
    sigma2: Any,
    num_params: Any,
    constant: Any = 2.0,
) -> jax.Array:
    """The largest stable rate of SGD: ``constant`` over the largest eigenvalue of a batch.

    It grows linearly with the batch while noise dominates, up to about
    ``num_params * sigma2 / lam1**2`` examples, and then not beyond ``constant / lam1``.

    Args:
      lam1: the largest eigenvalue of the Hessian on the whole data.
      batch_size: B; this and all that follows as for ``noisy_extreme``.
      dataset_size: N.
      sigma2: variance of a Hessian entry over the examples.
      num_params: P.
      constant: 2 without momentum, ``2 (1 + b)`` with heavy-ball momentum b.

    >>> round(float(max_learning_rate_sgd(2.0, 1.0, float("inf"), 1.0, 1)), 3)  # 2 / 2.5
    0.8
    """
    check_range(constant=constant, gt=0)
    return constant / noisy_extreme(lam1, batch_size, dataset_size, sigma2, num_params)


def scale_learning_rate(
    lr: Any,
    from_batch: Any,
    to_batch: Any,
    rule: Literal["linear", "sqrt", "none"] = "linear",
    lr_max: Any = None,
) -> jax.Array:
    """A rate that was found with one batch size, for another, up to the largest stable one.

    Args:
      lr: the rate, >= 0.
      from_batch: the batch size that it was found with, > 0.
      to_batch: the new one, > 0.
      rule: ``"linear"`` for SGD, ``"sqrt"`` for Adam and its like, ``"none"``.
      lr_max: largest rate, such as ``max_learning_rate_sgd``; None: no limit.

    >>> float(scale_learning_rate(0.5, 8, 32)), float(scale_learning_rate(0.5, 8, 32, lr_max=1.0))
    (2.0, 1.0)
    """
    check_range(lr_max=lr_max, gt=0)
    scaled = scale_lr_for_batch(lr, to_batch, base_batch_size=from_batch, rule=rule)
    return scaled if lr_max is None else jnp.minimum(scaled, lr_max)


def _moments(
    loss_fn: LossFn, params: PyTree, batch: Any, key: Array, num_samples: int
) -> tuple[Array, Array]:
    """Estimates of the trace of H and of H^2."""
    check_count(num_samples=num_samples, least=1)
    wide = widen(params)

    def one(key: Array) -> tuple[Array, Array]:
        v = random_direction(key, wide, signs=True)
        image = hessian_product(lambda p: loss_fn(p, batch), wide, v)
        return tree_vdot(v, image), tree_vdot(image, image)

    traces, squares = jax.lax.map(one, jax.random.split(key, num_samples))
    return jnp.mean(traces), jnp.mean(squares)
