"""The statistics that MKOR needs of each layer, as gradients of two arrays that are always zero."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optimkit.layout import named_leaves
from optimkit.matrices.input_gram import Padding, padding_of, strides_of
from optimkit.numerics import check_range, compute_dtype
from optimkit.protocols import Array, PyTree

NAMES = {"tap_a": "a", "mean_act": "a", "tap_g": "g", "sum_outgrad": "g"}
"""What ``collect_layer_stats`` looks for, and what it is."""


def tap_inputs(x: Array, tap: Array, clip: Any = 100.0) -> Array:
    """The inputs of a dense layer as they are; the gradient of ``tap`` is their mean row.

    Args:
      x: ``(..., inputs)``.
      tap: zeros, ``(inputs,)``. Its value is not used.
      clip: entries of each row are limited to this magnitude, > 0.

    >>> x = jnp.array([[1.0, 2.0], [3.0, 400.0]])
    >>> jax.grad(lambda tap: jnp.sum(tap_inputs(x, tap)))(jnp.zeros(2)).tolist()
    [2.0, 51.0]
    """
    check_range(clip=clip, gt=0)
    return _tapped(x, tap, jnp.asarray(clip, jnp.float32))


def tap_patches(
    x: Array,
    tap: Array,
    kernel_size: Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] | None = None,
    clip: Any = 100.0,
) -> Array:
    """The inputs of a convolution as they are; the gradient of ``tap`` is their mean patch.

    Each sample's patches are averaged over the places of the window, limited to ``clip``, and
    averaged over the batch, in the order of a kernel ``(*window, inputs, outputs)``.

    Args:
      x: ``(batch, *sizes, inputs)``.
      tap: zeros, ``(window * inputs,)``.
      kernel_size: the window.
      strides: its steps, one or one an axis.
      padding: ``"SAME"``, ``"VALID"`` or numbers, as for the layer.
      dilation: of the kernel, one or one an axis.
      clip: as for ``tap_inputs``.
    """
    check_range(clip=clip, gt=0)
    rows = mean_patches(lax.stop_gradient(x), kernel_size, strides, padding, dilation)

    # The rows are small, and stay until the backward pass in place of x.
    return _tapped_rows(x, rows, tap, jnp.asarray(clip, jnp.float32))


def tap_outputs(y: Array, tap: Array, places: Sequence[int] = (), clip: Any = 100.0) -> Array:
    """The outputs of a layer as they are; the gradient of ``tap`` is their summed gradient.

    With n rows, each row of the gradient is multiplied by n, limited to ``clip``, and averaged:
    unless the limit acts, that is the gradient of the bias.

    Args:
      y: ``(..., outputs)``.
      tap: zeros, ``(outputs,)``.
      places: axes that a convolution's window moves along: averaged first, for they make no rows.
      clip: as for ``tap_inputs``.

    >>> y = jnp.ones((2, 1))
    >>> jax.grad(lambda tap: jnp.mean(3 * tap_outputs(y, tap)))(jnp.zeros(1)).tolist()
    [3.0]
    """
    check_range(clip=clip, gt=0)
    return _tapped_outputs(tuple(places), y, tap, jnp.asarray(clip, jnp.float32))


def mean_patches(
    x: Array,
    kernel_size: Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] | None = None,
) -> Array:
    """Each sample's patch, averaged over the places of the window: ``(batch, window * inputs)``.

    >>> mean_patches(jnp.arange(4.0).reshape(1, 4, 1), (2,), padding="VALID").tolist()
    [[1.0, 2.0]]
    """
    window = len(kernel_size)
    x = jnp.asarray(x, compute_dtype(x))
    steps, spread = strides_of(strides, window), strides_of(dilation, window)
    sizes = x.shape[-window - 1 : -1]
    extent = [(k - 1) * d + 1 for k, d in zip(kernel_size, spread, strict=True)]
    sides = padding_of(padding, window)
    if isinstance(sides, str):
        sides = lax.padtype_to_pads(sizes, extent, steps, sides)
    lead = x.ndim - window - 1
    x = jnp.pad(x, [*[(0, 0)] * lead, *sides, (0, 0)])
    places = [
        (size + sum(side) - e) // step + 1
        for size, side, e, step in zip(sizes, sides, extent, steps, strict=True)
    ]
    means = []
    for offset in itertools.product(*map(range, kernel_size)):
        cut: list[Any] = [slice(None)] * lead
        for o, d, step, count in zip(offset, spread, steps, places, strict=True):
            cut.append(slice(o * d, o * d + (count - 1) * step + 1, step))
        means.append(jnp.mean(x[tuple(cut)], axis=tuple(range(lead, lead + window))))
    stacked = jnp.stack(means, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], -1)


def collect_layer_stats(stats: PyTree, grads: PyTree | None = None) -> dict[str, dict[str, Array]]:
    """What ``scale_by_mkor`` takes as ``layer_stats``: mean input and summed gradient by layer.

    Args:
      stats: the gradient of the taps of ``TappedDense`` and its like; or what layers have sown,
        with ``mean_act``, the mean of their inputs over all leading axes, in each layer.
      grads: the gradient of the parameters. It serves where ``stats`` has no gradient at the
        output: that of the bias is the same, for a dense layer.

    Returns:
      ``{layer path: {"a": (inputs,), "g": (outputs,)}}``.

    Raises:
      ValueError: for a layer of which one of the two is not known.

    Taps limit each row to ``clip``; means that were sown are not limited row by row. A layer that
    is called several times in a model sums its taps: divide its ``"a"`` by the number of calls.
    Average over devices and microbatches as gradients are averaged.

    >>> import jax.numpy as jnp
    >>> sown = {"dense": {"mean_act": (jnp.array([1.0, 2.0]),)}}
    >>> grads = {"dense": {"kernel": jnp.ones((2, 1)), "bias": jnp.array([3.0])}}
    >>> {k: v.tolist() for k, v in collect_layer_stats(sown, grads)["dense"].items()}
    {'a': [1.0, 2.0], 'g': [3.0]}
    """
    found: dict[str, dict[str, Array]] = {}
    for name, leaf in named_leaves(stats):
        parts = name.split("/")
        if parts[-1].isdigit() and len(parts) > 1 and parts[-2] in NAMES:
            parts.pop()  # flax.linen sows tuples
        if parts[-1] in NAMES:
            layer = "/".join(parts[:-1]) or "(root)"
            found.setdefault(layer, {})[NAMES[parts[-1]]] = jnp.asarray(leaf)
    biases = {} if grads is None else dict(named_leaves(grads))
    for layer, both in found.items():
        bias = "bias" if layer == "(root)" else f"{layer}/bias"
        if "g" not in both and bias in biases:
            both["g"] = biases[bias]
        if missing := {"a", "g"} - set(both):
            raise ValueError(
                f"layer {layer!r} has no {' and no '.join(sorted(missing))}: a comes from tap_a or "
                "mean_act, g from tap_g, sum_outgrad or, with grads=, the gradient of its bias"
            )
    return found


# ---------------------------------------------------------------------------------------------
# Identities with a backward pass of their own
# ---------------------------------------------------------------------------------------------


def _mean_of_clipped(rows: Array, clip: Array, tap: Array) -> Array:
    wide = jnp.asarray(rows, compute_dtype(rows, tap))
    lead = tuple(range(wide.ndim - 1))
    clip = clip.astype(wide.dtype)
    return jnp.mean(jnp.clip(wide, -clip, clip), axis=lead).astype(tap.dtype)


@jax.custom_vjp
def _tapped(x: Array, tap: Array, clip: Array) -> Array:
    del tap, clip
    return x


_tapped.defvjp(
    lambda x, tap, clip: (x, (x, tap, clip)),
    lambda kept, dx: (dx, _mean_of_clipped(kept[0], kept[2], kept[1]), None),
)


@jax.custom_vjp
def _tapped_rows(x: Array, rows: Array, tap: Array, clip: Array) -> Array:
    del rows, tap, clip
    return x


_tapped_rows.defvjp(
    lambda x, rows, tap, clip: (x, (rows, tap, clip)),
    lambda kept, dx: (dx, None, _mean_of_clipped(kept[0], kept[2], kept[1]), None),
)


def _plain(places: tuple[int, ...], y: Array, tap: Array, clip: Array) -> Array:
    del places, tap, clip
    return y


_tapped_outputs = jax.custom_vjp(_plain, nondiff_argnums=(0,))


def _outputs_backward(
    places: tuple[int, ...], kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array, None]:
    tap, clip = kept
    rows = jnp.asarray(dy, compute_dtype(dy, tap))
    if places:
        rows = jnp.mean(rows, axis=places)
    count = rows.size // max(rows.shape[-1], 1)
    return dy, _mean_of_clipped(count * rows, clip, tap), None


_tapped_outputs.defvjp(
    lambda places, y, tap, clip: (y, (tap, clip)),
    _outputs_backward,
)
