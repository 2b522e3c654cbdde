"""Batch normalisation over small virtual batches, however large the real one is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from optimkit.numerics import check_count, check_range, compute_dtype
from optimkit.protocols import Array


class GhostBatchNorm(linen.Module):
    r"""``linen.BatchNorm`` that computes its statistics on virtual batches of a fixed size.

    The noise of small-batch statistics regularises; a large batch loses it. The batch is cut, in
    order, into k virtual batches, each is normalised by its own mean and variance, and the running
    statistics are renewed once for each, in order:

    .. math:: r \leftarrow b^k r + (1-b) \sum_{i=1}^{k} b^{k-i} s_i

    Attributes:
      virtual_batch_size: examples in a virtual batch, >= 1; it must divide the batch.
      use_running_average: whether to normalise by the running statistics, which then stay: for
        evaluation. Here or in the call.
      momentum: b, in [0, 1]; torch's 0.1 is 0.9 here.
      epsilon: added to the variance, >= 0.
      use_scale: whether to multiply by a parameter ``scale`` (features,).
      use_bias: whether to add a parameter ``bias`` (features,).
      dtype: dtype of the output; default: that of inputs and parameters, promoted.
      param_dtype: dtype of the parameters.
      scale_init: initializer of ``scale``.
      bias_init: initializer of ``bias``.

    The features are the last axis, the examples the first; all others count as examples do. Running
    ``mean`` and ``var`` are kept in f32 or better in the collection ``batch_stats``. The variance
    is the biased one, as everywhere in Flax; torch keeps the unbiased one.

    >>> layer = GhostBatchNorm(2, use_running_average=False)
    >>> x = jnp.array([[1.0], [3.0], [10.0], [14.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, renewed = layer.apply(variables, x, mutable=["batch_stats"])
    >>> [round(float(v), 3) for v in y[:, 0]]
    [-1.0, 1.0, -1.0, 1.0]
    >>> round(float(renewed["batch_stats"]["mean"][0]), 3)  # 0.9 (0.1 * 2) + 0.1 * 12
    1.38

    Reference: Hoffer et al., "Train longer, generalize better: closing the generalization gap in
    large batch training of neural networks", NeurIPS 2017, arXiv 1705.08741. Agrees with the
    authors' training loop (goldens ``large_batch_regime__ghost_bn*``).
    """

    virtual_batch_size: int
    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = linen.initializers.ones_init()
    bias_init: Any = linen.initializers.zeros_init()

    @linen.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalises (batch, ..., features).

        Raises:
          ValueError: if an attribute is out of range, the batch is no multiple of
            ``virtual_batch_size``, or ``use_running_average`` is given nowhere or twice.
        """
        check_count(virtual_batch_size=self.virtual_batch_size, least=1)
        check_range(momentum=self.momentum, ge=0, le=1)
        check_range(epsilon=self.epsilon, ge=0)
        evaluating = _choose(self.use_running_average, use_running_average)
        x = jnp.asarray(x)
        shape, wide = (x.shape[-1],), compute_dtype(x)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, wide)
        var = self.variable("batch_stats", "var", jnp.ones, shape, wide)

        parameters = []
        if self.use_scale:
            parameters.append(self.param("scale", self.scale_init, shape, self.param_dtype))
        if self.use_bias:
            parameters.append(self.param("bias", self.bias_init, shape, self.param_dtype))
        dtype = self.dtype or jnp.result_type(x, *parameters)

        groups = x.astype(wide).reshape(*self._grouped(x, evaluating), shape[0])
        if evaluating:
            means, variances = mean.value[None], var.value[None]
        else:
            means = jnp.mean(groups, axis=1)
            variances = jnp.mean(jnp.square(groups - means[:, None]), axis=1)
            if not self.is_initializing():
                mean.value = self._renewed(mean.value, means)
                var.value = self._renewed(var.value, variances)

        factor = 1 / jnp.sqrt(variances + self.epsilon)
        if self.use_scale:
            factor = factor * parameters[0].astype(wide)[None]
        y = (groups - means[:, None]) * factor[:, None]
        if self.use_bias:
            y = y + parameters[-1].astype(wide)[None, None]
        return y.reshape(x.shape).astype(dtype)

    def _grouped(self, x: Array, evaluating: bool) -> tuple[int, int]:
        """How many groups share statistics, and how many rows of features each has."""
        rows = x.size // max(x.shape[-1], 1)
        if evaluating:
            return 1, rows
        groups, left = divmod(x.shape[0], self.virtual_batch_size)
        if left or not groups:
            raise ValueError(
                f"the batch must be a multiple of virtual_batch_size={self.virtual_batch_size}, "
                f"got the shape {x.shape}"
            )
        return groups, rows // groups

    def _renewed(self, running: Array, groups: Array) -> Array:
        """The running statistic after the groups, one by one."""
        powers = self.momentum ** jnp.arange(len(groups) - 1, -1, -1, dtype=groups.dtype)
        new = jnp.sum(((1 - self.momentum) * powers)[:, None] * groups, axis=0)
        return (self.momentum ** len(groups) * running + new).astype(running.dtype)


def _choose(attribute: bool | None, argument: bool | None) -> bool:
    if (attribute is None) == (argument is None):
        raise ValueError(
            "use_running_average must be given once, to the module or to the call, got "
            f"{attribute} and {argument}"
        )
    return bool(argument if attribute is None else attribute)
