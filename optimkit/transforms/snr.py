"""A rate shrunk by the share of signal in the gradient, estimated from one step to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, check_real, narrow_like, widen, zero_count, zeros_like
from optimkit.numerics import check_range, compute_dtype, next_count, one_minus_power, safe_div
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class ScaleBySnrState(NamedTuple):
    """``mu``: mean gradient, one array a parameter. ``norm_mean_square``: mean squared norm.

    ``factor`` is the last factor. Scalars for the whole tree; without the averages, ``mu`` and
    ``norm_mean_square`` are None.
    """

    count: Array
    mu: PyTree | None
    norm_mean_square: Array | None
    factor: Array


def _squared_norm(tree: PyTree, dtype: Any) -> Array:
    squares = [jnp.sum(jnp.square(x)).astype(dtype) for x in jax.tree.leaves(tree)]
    total = sum(squares, start=jnp.zeros((), dtype))
    # Squares that overflow count as very large ones, or the means would hold infinity for good.
    return jnp.where(jnp.isnan(total), total, jnp.minimum(total, jnp.finfo(dtype).max / 16))


class SnrEstimator:
    """The running estimate behind ``scale_by_snr`` and ``snr_learning_rate``."""

    def __init__(self, decay: Any, min_scale: Any, max_scale: Any, debias: bool):
        check_range(decay=decay, ge=0, lt=1)
        check_range(min_scale=min_scale, max_scale=max_scale, ge=0)
        self.decay, self.limits, self.debias = decay, (min_scale, max_scale), debias

    def init(self, params: PyTree) -> ScaleBySnrState:
        """Zero means, and the factor 1."""
        dtype = compute_dtype(jnp.float32, *jax.tree.leaves(params))
        one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
        if self.decay is None:
            return ScaleBySnrState(zero_count(), None, None, one)
        return ScaleBySnrState(zero_count(), zeros_like(params), zero, one)

    def update(self, grads: PyTree, state: ScaleBySnrState, given: Any) -> ScaleBySnrState:
        """The state with the factor for these gradients."""
        check_real(grads, "gradient")
        count, dtype = next_count(state.count), state.factor.dtype
        mu, mean_square, share = state.mu, state.norm_mean_square, given
        if mu is not None and mean_square is not None:
            check_match(grads, mu, what="gradient", like="the state")
            decay = self.decay
            grads = widen(grads, mu)
            mu = jax.tree.map(lambda g, m: (decay * m + (1 - decay) * g).astype(m.dtype), grads, mu)
            squared = _squared_norm(grads, dtype)
            mean_square = (decay * mean_square + (1 - decay) * squared).astype(dtype)
            own = self._share(_squared_norm(mu, dtype), mean_square, count)
            share = own if given is None else given
        elif given is None:
            raise ValueError(
                "decay=None needs the scale: call update(..., snr_scale=gradient_snr(...).scale)"
            )
        factor = jnp.clip(jnp.asarray(share, dtype), *self.limits).astype(dtype)
        return ScaleBySnrState(count, mu, mean_square, factor)

    def _share(self, mean: Array, mean_square: Array, count: Array) -> Array:
        """Signal over signal and noise, from the squared mean and the mean square."""
        correction = one_minus_power(self.decay, count)
        # The same as mean / correction^2 over mean_square / correction.
        share = safe_div(mean, mean_square, otherwise=1.0) / correction
        if self.debias:
            # The sum of the squared weights of the mean: the part of it that is noise alone.
            kept = (1 - self.decay) / (1 + self.decay)
            inverse = kept * one_minus_power(self.decay, 2 * count) / jnp.square(correction)
            share = jnp.maximum(safe_div(share - inverse, 1 - inverse, otherwise=1.0), 0)
        return jnp.where((count == 1) | (mean_square == 0), 1, share)


def scale_by_snr(
    *,
    decay: Any = 0.9,
    min_scale: Any = 0.0,
    max_scale: Any = 1.0,
    debias: bool = True,
) -> GradientTransformation:
    r"""Multiplies the gradient by the share of signal in it: signal / (signal + noise).

    Where the rate is right without noise, this factor promises most progress. It comes from
    running means of the gradient and of its squared norm, over all leaves, with
    :math:`c_t = 1 - \beta^t`:

    .. math::

        M_t &= \beta M_{t-1} + (1-\beta) g_t, \qquad Q_t = \beta Q_{t-1} + (1-\beta)\|g_t\|^2 \\
        q &= Q_t / c_t, \qquad
        \iota = \frac{1-\beta}{1+\beta}\,\frac{1-\beta^{2t}}{c_t^2}, \qquad
        S = \Bigl[\frac{\|M_t\|^2/c_t^2 - \iota q}{1 - \iota}\Bigr]_{\ge 0} \\
        u_t &= \operatorname{clip}(S / q,\ s_{min},\ s_{max})\; g_t

    The first factor is 1.

    Args:
      decay: beta, in [0, 1). None: keep no means; every update is then given ``snr_scale``.
      min_scale: least factor, >= 0. At the default 0 a gradient whose noise hides its signal, as
        is common early on, moves nothing; 0.01 is safer.
      max_scale: largest factor.
      debias: take out of the squared mean what is noise; False: :math:`S = \|M_t\|^2 / c_t^2`.

    Returns:
      A transformation for SGD and the like: a preconditioner behind it, such as Adam's, cancels
      the factor (``snr_learning_rate`` is for those). 4 bytes of state a f32 parameter, none
      without means. With the extra argument ``snr_scale``, as from ``gradient_snr`` over
      micro-batches, that number is used in place of the own estimate, and cut like it. Inside
      ``shard_map`` each device must hold all leaves whole.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or ``snr_scale`` is
        missing where there are no means.

    Provisional: in the spirit of the paper, whose formulas could not be read; estimator and numbers
    are ours. A spike lowers the factor for about 1 / (1 - decay) steps, its own step included;
    one above 1e18 in f32, whose square is not a number any more, may not. A gradient that is not
    finite spoils the means for good: put a guard in front.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_snr(decay=0.5)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in ([1.0], [0.5]):
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> # c = 3/4, M = 1/2, Q = 3/8: S / q = (8/9 - 5/9) / (4/9)
    >>> round(float(state.factor), 4), round(float(updates[0]), 4)
    (0.75, 0.375)

    Reference: Huang et al., "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning",
    2025, arXiv 2511.23310.
    """
    estimator = SnrEstimator(decay, min_scale, max_scale, debias)

    def update(
        updates: PyTree,
        state: ScaleBySnrState,
        params: PyTree | None = None,
        *,
        snr_scale: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleBySnrState]:
        del extra
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        state = estimator.update(updates, state, snr_scale)
        return scaled(updates, state.factor), state

    return transformation(estimator.init, update)


def scaled(updates: PyTree, factor: Array) -> PyTree:
    """Every leaf times a scalar, in f32 or better, back in its own dtype."""
    new = jax.tree.map(lambda u: u * factor.astype(u.dtype), widen(updates))
    return narrow_like(new, updates)


RECORD = Method(
    factory=scale_by_snr,
    kind="piece",
    summary="multiply the gradient by the share of signal in it",
    example={"min_scale": 0.01},
    traced=("decay", "min_scale", "max_scale"),
    static=("debias",),
    position="first",
    communication="reduce",
    response="proportional",
    state_bytes=4,
    moved_bytes=24,  # 20, and the gradient once more
    status="provisional",
    paper='Huang et al., "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning", '
    "2025, arXiv 2511.23310",
    reference="derived in NumPy from the abstract; no public code",
)
