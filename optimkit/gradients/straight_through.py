"""Derivatives for units that have none: hard thresholds, coin flips, and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from optimkit.numerics import check_choice, check_range, compute_dtype, safe_div
from optimkit.protocols import Array

Slope: TypeAlias = Literal["identity", "sigmoid", "clip"]
SMALLEST = 1e-12
"""Floor of an optimal baseline's denominator."""


@jax.custom_jvp
def hard_forward(hard: Array, smooth: Array) -> Array:
    """The value ``hard`` with the derivative of ``smooth``, in forward and in reverse mode.

    As ``smooth + stop_gradient(hard - smooth)``, without its rounding. Second derivatives are those
    of ``smooth``.
    """
    del smooth
    return hard


hard_forward.defjvp(lambda primals, tangents: (hard_forward(*primals), tangents[1]))


def straight_through(hard_fn: Callable[[Array], Any]) -> Callable[[Array], Array]:
    """Any function of an array, with the derivative of the identity.

    Args:
      hard_fn: from an array to one of the same shape; it is never differentiated.

    Returns:
      ``fn(a)``: ``hard_fn(a)`` in the dtype of ``a``; backward, the cotangent as it is.

    Raises:
      TypeError: if ``a`` is not a real floating-point array.
      ValueError: if ``hard_fn`` changes the shape.

    >>> fn = straight_through(jnp.round)
    >>> value, slope = jax.value_and_grad(lambda a: 3 * fn(a))(1.7)
    >>> float(value), float(slope)
    (6.0, 3.0)

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013, arXiv 1308.3432.
    """

    def fn(a: Array) -> Array:
        a = _real(a)
        hard = jnp.asarray(hard_fn(lax.stop_gradient(a))).astype(a.dtype)
        if hard.shape != a.shape:
            raise ValueError(f"hard_fn gave shape {hard.shape} for an array of shape {a.shape}")
        return hard_forward(hard, a)

    return fn


def straight_through_bernoulli(
    key: Array, a: Array, *, slope: Slope = "identity", uniform: Array | None = None
) -> Array:
    r"""A coin flip per unit: 1 with probability :math:`\sigma(a)`, with a made-up derivative.

    Args:
      key: a random key; another one every call. It is an argument, so that recomputation
        (``jax.checkpoint``) flips the same way.
      a: pre-activations.
      slope: what stands for the derivative: ``"identity"``, 1, the paper's first form;
        ``"sigmoid"``, :math:`\sigma'(a)`, its second, which vanishes for large \|a\|; ``"clip"``,
        1 where \|a\| <= 1 and else 0, of later binarised networks.
      uniform: numbers in [0, 1) to use in place of random ones.

    Returns:
      Zeros and ones in the shape and dtype of ``a``.

    Raises:
      TypeError: if ``a`` is not a real floating-point array.
      ValueError: for another slope, or ``uniform`` of another shape.

    >>> a, u = jnp.array([0.0, 0.0]), jnp.array([0.4, 0.6])
    >>> straight_through_bernoulli(jax.random.key(0), a, uniform=u).tolist()
    [1.0, 0.0]

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013, arXiv 1308.3432.
    """
    a = _real(a)
    # Compared in f32 at least: bfloat16 has 256 numbers between a half and one.
    p = jax.nn.sigmoid(lax.stop_gradient(a).astype(compute_dtype(a)))
    hard = _drawn(key, a, uniform, "uniform", jax.random.uniform) < p
    return hard_forward(hard.astype(a.dtype), _surrogate(a, slope))


def straight_through_threshold(
    a: Array, *, threshold: Any = 0.0, slope: Slope = "identity"
) -> Array:
    r"""1 above a threshold and 0 below, with a made-up derivative.

    Args:
      a: pre-activations.
      threshold: a number.
      slope: as for ``straight_through_bernoulli``, around zero whatever the threshold.

    Returns:
      Zeros and ones in the shape and dtype of ``a``.

    Raises:
      TypeError: if ``a`` is not a real floating-point array.
      ValueError: for another slope.

    >>> def total(a): return straight_through_threshold(a, slope="clip").sum()
    >>> jax.grad(total)(jnp.array([-2.0, 0.5, 1.0])).tolist()
    [0.0, 1.0, 1.0]

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013, arXiv 1308.3432; ``"clip"`` is later practice.
    """
    a = _real(a)
    return hard_forward((a > threshold).astype(a.dtype), _surrogate(a, slope))


def sts_neuron(key: Array, a: Array, *, uniform: Array | None = None) -> Array:
    r"""Stochastic times smooth: :math:`h = b \sqrt p`, with b = 1 at probability :math:`\sqrt p`.

    :math:`p = \sigma(a)` is the mean of h. The derivative is that of the smooth factor,
    :math:`b \sqrt p\,(1 - p)/2`; its mean is half of that of p: the other half lies in the
    probability, and is dropped.

    Args:
      key: a random key; another one every call.
      a: pre-activations.
      uniform: numbers in [0, 1) to use in place of random ones.

    Returns:
      An array of the shape and dtype of ``a``.

    Raises:
      TypeError: if ``a`` is not a real floating-point array.
      ValueError: for ``uniform`` of another shape.

    >>> sts_neuron(jax.random.key(0), jnp.array([0.0]), uniform=jnp.array([0.7])).tolist()
    [0.7071067690849304]

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013, arXiv 1308.3432.
    """
    a = _real(a)
    # exp(log / 2): the root of an underflowing sigmoid has no finite derivative.
    root = jnp.exp(0.5 * jax.nn.log_sigmoid(a.astype(compute_dtype(a))))
    on = _drawn(key, a, uniform, "uniform", jax.random.uniform) < lax.stop_gradient(root)
    return (on * root).astype(a.dtype)


def noisy_rectifier(
    key: Array,
    a: Array,
    *,
    noise: Literal["logistic", "normal"] = "logistic",
    scale: Any = 1.0,
    sample: Array | None = None,
) -> Array:
    r"""A rectifier behind noise: :math:`\max(0, a + s z)`, with its own derivative.

    Args:
      key: a random key; another one every call.
      a: pre-activations.
      noise: ``"logistic"`` or ``"normal"``, both of mean zero.
      scale: s, >= 0.
      sample: z, to use in place of random numbers.

    Returns:
      An array of the shape and dtype of ``a``.

    Raises:
      TypeError: if ``a`` is not a real floating-point array.
      ValueError: for another kind of noise, a negative scale, or ``sample`` of another shape.

    The derivative is 1 where a + s z > 0 and else 0: without bias for this graph.

    >>> a, z = jnp.array([1.0, 1.0]), jnp.array([0.5, -2.0])
    >>> noisy_rectifier(jax.random.key(0), a, sample=z).tolist()
    [1.5, 0.0]

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013, arXiv 1308.3432.
    """
    check_choice(("logistic", "normal"), noise=noise)
    check_range(scale=scale, ge=0)
    a = _real(a)
    draw = jax.random.logistic if noise == "logistic" else jax.random.normal
    z = _drawn(key, a, sample, "sample", draw)
    return jax.nn.relu(a.astype(compute_dtype(a)) + scale * z).astype(a.dtype)


def reinforce_neuron_grad(
    a: Array,
    b: Array,
    loss: Array,
    *,
    baseline: Literal["optimal", "mean"] | Array | None = "optimal",
    axis: int = 0,
) -> Array:
    r"""The gradient of the expected loss by the pre-activations of coin flips, from losses alone.

    .. math:: \hat g = \operatorname{mean}_s\, (b_s - p)(L_s - c), \qquad p = \sigma(a)

    Args:
      a: pre-activations: in the shape of ``b``, or without ``axis``.
      b: the flips, 0 or 1, with samples along ``axis``.
      loss: one a sample, or one a sample and unit, in the shape of ``b``.
      baseline: c. ``"optimal"``: :math:`E[(b-p)^2 L]/E[(b-p)^2]` of these samples, a unit each,
        which gives the least variance; ``"mean"``: the mean loss; None: 0; or an array, such as
        ``OptimalBaseline.value``.
      axis: of the samples.

    Returns:
      The estimate, in the shape of ``b`` without ``axis``, f32 at least.

    Raises:
      ValueError: if shapes do not fit, there is no sample, or the baseline is of another kind.

    Without bias for a c that does not depend on b; a baseline of the same few samples does, and
    shrinks the estimate a little: in training take a running one. Average over devices.

    >>> a, b = jnp.zeros(1), jnp.array([[1.0], [0.0]])
    >>> reinforce_neuron_grad(a, b, jnp.array([3.0, 1.0])).tolist()  # (0.5 * 1 + 0.5 * 1) / 2
    [0.5]

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013, arXiv 1308.3432.
    """
    dtype = compute_dtype(a, loss)
    flips = jnp.moveaxis(jnp.asarray(b, dtype), axis, 0)
    losses = jnp.asarray(loss, dtype)
    if flips.shape[0] == 0:
        raise ValueError("b holds no sample")
    if losses.shape == jnp.shape(b) and losses.ndim > 1:
        losses = jnp.moveaxis(losses, axis, 0)
    elif losses.shape == flips.shape[:1]:
        losses = losses.reshape(-1, *[1] * (flips.ndim - 1))
    else:
        raise ValueError(
            f"loss must have shape {flips.shape[:1]} or {jnp.shape(b)}, got {losses.shape}"
        )
    units = jnp.asarray(a, dtype)
    if units.shape == jnp.shape(b) and units.ndim == flips.ndim:
        units = jnp.moveaxis(units, axis, 0)
    elif units.shape == flips.shape[1:]:
        units = units[None]
    else:
        raise ValueError(
            f"a must have shape {flips.shape[1:]} or {jnp.shape(b)}, got {units.shape}"
        )
    centred = flips - jax.nn.sigmoid(units)
    return jnp.mean(centred * (losses - _baseline(baseline, centred, losses)), axis=0)


def _baseline(kind: Any, centred: Array, losses: Array) -> Array:
    if kind is None:
        return jnp.zeros_like(losses)
    if isinstance(kind, str):
        check_choice(("optimal", "mean"), baseline=kind)
        if kind == "mean":
            return jnp.mean(losses, axis=0, keepdims=True)
        numerator = jnp.sum(jnp.square(centred) * losses, axis=0, keepdims=True)
        denominator = jnp.sum(jnp.square(centred), axis=0, keepdims=True)
        return numerator / jnp.maximum(denominator, SMALLEST)
    return jnp.broadcast_to(jnp.asarray(kind, centred.dtype), centred.shape[1:])[None]


class OptimalBaseline(NamedTuple):
    """Running means of :math:`(b-p)^2 L` and :math:`(b-p)^2`, a unit each, for the best baseline.

    >>> running = OptimalBaseline.init(jnp.zeros(2))
    >>> running = running.update(jnp.array([[0.5, -0.5]]), jnp.array([3.0]))
    >>> [round(float(c), 4) for c in running.value]
    [3.0, 3.0]
    """

    numerator: Array
    denominator: Array

    @staticmethod
    def init(like: Array) -> OptimalBaseline:
        """Zeros in the shape of the units, f32 at least."""
        zeros = jnp.zeros(jnp.shape(like), compute_dtype(like))
        return OptimalBaseline(zeros, zeros)

    def update(self, b_minus_p: Array, loss: Array, decay: Any = 0.99) -> OptimalBaseline:
        """The state after a batch: ``b_minus_p`` (samples, units ...), ``loss`` (samples,)."""
        check_range(decay=decay, ge=0, le=1)
        dtype, shape = self.numerator.dtype, self.numerator.shape
        centred, losses = jnp.asarray(b_minus_p, dtype), jnp.asarray(loss, dtype)
        if centred.shape[1:] != shape or centred.ndim == 0 or losses.shape != centred.shape[:1]:
            raise ValueError(
                f"b_minus_p must have shape (samples, *{shape}) and loss (samples,), got "
                f"{centred.shape} and {losses.shape}"
            )
        squares = jnp.square(centred)
        weighted = squares * losses.reshape(-1, *[1] * len(shape))
        return OptimalBaseline(
            decay * self.numerator + (1 - decay) * jnp.mean(weighted, axis=0),
            decay * self.denominator + (1 - decay) * jnp.mean(squares, axis=0),
        )

    @property
    def value(self) -> Array:
        """The baseline; zero before the first batch."""
        return safe_div(self.numerator, self.denominator)


def _real(a: Any) -> Array:
    a = jnp.asarray(a)
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise TypeError(f"a must be a real floating-point array, got dtype {a.dtype}")
    return a


def _drawn(key: Array, a: Array, given: Any, name: str, draw: Callable[..., Array]) -> Array:
    dtype = compute_dtype(a)
    if given is None:
        return draw(key, a.shape, dtype)
    if jnp.shape(given) != a.shape:
        raise ValueError(f"{name} has shape {jnp.shape(given)}, but a has {a.shape}")
    return jnp.asarray(given, jnp.promote_types(dtype, jnp.result_type(given)))


def _surrogate(a: Array, slope: Slope) -> Array:
    check_choice(("identity", "sigmoid", "clip"), slope=slope)
    if slope == "sigmoid":
        return jax.nn.sigmoid(a.astype(compute_dtype(a))).astype(a.dtype)
    if slope == "clip":
        return jnp.where(jnp.abs(a) <= 1, a, lax.stop_gradient(a))
    return a
