"""Any optimizer's updates, multiplied by the share of signal in the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from optimkit.leaves import check_match, check_real
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.snr import ScaleBySnrState, SnrEstimator, scaled


class SnrLearningRateState(NamedTuple):
    """``mu``: mean gradient, one array a parameter. ``norm_mean_square``: mean squared norm.

    ``factor`` is the last factor on the inner updates. Without the averages, ``mu`` and
    ``norm_mean_square`` are None.
    """

    count: Array
    mu: PyTree | None
    norm_mean_square: Array | None
    factor: Array
    inner_state: PyTree


def snr_learning_rate(
    inner: optax.GradientTransformation,
    *,
    decay: Any = 0.9,
    min_scale: Any = 0.01,
    max_scale: Any = 1.0,
    debias: bool = True,
) -> GradientTransformation:
    r"""Multiplies the updates of ``inner`` by signal / (signal + noise) of the incoming gradient.

    The inner transformation sees the gradient as it is, so that this also works around methods
    that cancel a factor on the gradient, as Adam does.

    Args:
      inner: any transformation.
      decay: of the running means, in [0, 1). None: keep none; every update is then given
        ``snr_scale``.
      min_scale: least factor, >= 0.
      max_scale: largest factor.
      debias: take out of the squared mean what is noise. All defaults are this library's.

    Returns:
      A transformation; 4 bytes of state a f32 parameter beside the inner state. ``state.factor`` is
      the last factor. With the extra argument ``snr_scale``, as from ``gradient_snr`` over
      micro-batches, that number is used in place of the own estimate. Inside ``shard_map`` each
      device must hold all leaves whole.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or ``snr_scale`` is
        missing where there are no means.

    Decay that ``inner`` applies is multiplied too. ``scale_by_snr`` has the formulas, and says what
    is provisional.

    >>> import jax.numpy as jnp, optax
    >>> tx = snr_learning_rate(optax.sgd(0.1))
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in ([1.0], [-1.0]):  # nothing but noise: the least factor
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> round(float(state.factor), 4), round(float(updates[0]), 4)
    (0.01, 0.001)

    Reference: Huang et al., "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning",
    2025, arXiv 2511.23310.
    """
    estimator = SnrEstimator(decay, min_scale, max_scale, debias)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SnrLearningRateState:
        return SnrLearningRateState(*estimator.init(params), inner.init(params))

    def update(
        updates: PyTree,
        state: SnrLearningRateState,
        params: PyTree | None = None,
        *,
        snr_scale: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, SnrLearningRateState]:
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        estimate = estimator.update(updates, ScaleBySnrState(*state[:4]), snr_scale)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        return scaled(updates, estimate.factor), SnrLearningRateState(*estimate, inner_state)

    return transformation(init, update)


RECORD = Method(
    factory=snr_learning_rate,
    kind="wrapper",
    summary="multiply inner updates by the share of signal in the gradient",
    example_made={"inner": scale_by_adam},
    traced=("decay", "min_scale", "max_scale"),
    static=("inner", "debias"),
    position="any",
    communication="reduce",
    response="bounded",
    state_bytes=12,
    moved_bytes=40,  # Adam's 28, and the mean gradient read and written, and the gradient again
    status="provisional",
    paper='Huang et al., "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning", '
    "2025, arXiv 2511.23310",
    reference="derived in NumPy from the abstract; no public code",
)
