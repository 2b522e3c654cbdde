"""muP: learning rates by width, so that the best rate of a small model is that of a wide one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import optax

from optimkit import layout
from optimkit.layout import MatrixAxesOverride, path_name
from optimkit.leaves import check_match, map_leaves
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import (
    Array,
    GradientTransformation,
    MatrixAxes,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.mup_growth import BaseShapes, Growth, growth, is_shape, shapes_by_name
from optimkit.transforms.mup_growth import base_shapes as base_shapes

OPTIMIZERS = ("adam", "sgd")
READOUTS = ("multiplier", "lr")

Optimizer = Literal["adam", "sgd"]
Readout = Literal["multiplier", "lr"]


def _multiplier(grown: Growth, optimizer: Optimizer, readout: Readout) -> float:
    rows, columns = grown
    if rows is None and columns is None:
        return 1.0
    if rows is not None and columns is not None:
        return (columns if optimizer == "sgd" else 1.0) / rows
    if rows is not None and readout == "lr":
        return 1 / rows
    ratio = columns if rows is None else rows
    return float(ratio or 1.0) if optimizer == "sgd" else 1.0


def _leaf_multiplier(
    base: BaseShapes, optimizer: Optimizer, readout: Readout, fan_axes: MatrixAxesOverride
) -> Callable[[Any, Any], float]:
    """The multiplier of one leaf, as a function of its key path and itself."""
    check_choice(OPTIMIZERS, optimizer=optimizer)
    check_choice(READOUTS, readout=readout)
    look_up = shapes_by_name(base)

    def one(path: Any, leaf: Any) -> float:
        name = path_name(path)
        grown = growth(name, leaf, look_up(name, leaf), fan_axes)
        return _multiplier(grown, optimizer, readout)

    return one


def mup_multipliers(
    shapes: PyTree,
    base_shapes: BaseShapes,
    *,
    optimizer: Optimizer = "adam",
    readout: Readout = "multiplier",
    fan_axes: MatrixAxesOverride = None,
) -> PyTree:
    """By what muP multiplies the learning rate of every parameter.

    Args:
      shapes: the parameters, or a tree of anything with a shape, or of tuples.
      base_shapes: the same of the base model, or ``(path, leaf) -> shape``.
      optimizer: as for ``scale_by_mup``; so are the others.
      readout: what is done about the output layer.
      fan_axes: which axes are inputs and outputs.

    Returns:
      A tree of floats.

    Raises:
      ValueError: if a parameter is missing from ``base_shapes``, or grew along an unknown axis.

    >>> base = {"hidden": (8, 16), "head": (16, 7)}
    >>> mup_multipliers({"hidden": (32, 128), "head": (128, 7)}, base)
    {'head': 1.0, 'hidden': 0.25}
    """
    one = _leaf_multiplier(base_shapes, optimizer, readout, fan_axes)
    return jax.tree_util.tree_map_with_path(one, shapes, is_leaf=is_shape)


def mup_weight_decay_multipliers(
    shapes: PyTree,
    base_shapes: BaseShapes,
    *,
    optimizer: Optimizer = "adam",
    readout: Readout = "multiplier",
    fan_axes: MatrixAxesOverride = None,
    decoupled: bool = False,
) -> PyTree:
    """By what to multiply a decay that is itself multiplied by the rate, so that it stays the same.

    Args:
      shapes: this and the others as for ``mup_multipliers``.
      base_shapes: shapes of the base model.
      optimizer: ``"adam"`` or ``"sgd"``.
      readout: what is done about the output layer.
      fan_axes: which axes are inputs and outputs.
      decoupled: True: 1 everywhere, so that a leaf with a smaller rate is decayed less.

    In a chain neither is needed: ``optax.add_decayed_weights`` after ``scale_by_mup`` decays all
    leaves alike, before it as with ``decoupled=True``.

    >>> mup_weight_decay_multipliers({"hidden": (32, 128)}, {"hidden": (8, 16)})
    {'hidden': 4.0}
    """
    rates = mup_multipliers(
        shapes, base_shapes, optimizer=optimizer, readout=readout, fan_axes=fan_axes
    )
    return jax.tree.map(lambda rate: 1.0 if decoupled else 1 / rate, rates)


def scale_by_mup(
    base_shapes: BaseShapes,
    *,
    optimizer: Optimizer = "adam",
    readout: Readout = "multiplier",
    fan_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""Multiplies every update by muP's factor for its shape.

    With :math:`r_{in}, r_{out}` the growth of inputs and outputs over the base model:

    ==========================================  =================  ======================
    parameter                                   Adam               SGD
    ==========================================  =================  ======================
    inputs and outputs grew (hidden layers)     :math:`1/r_{in}`   :math:`r_{out}/r_{in}`
    only outputs (input layer, table, bias)     1                  :math:`r_{out}`
    only inputs (output layer)                  1                  :math:`r_{in}`
    neither                                     1                  1
    ==========================================  =================  ======================

    Args:
      base_shapes: shapes of the small model whose best rate is known (``base_shapes`` in
        ``optimkit.transforms.mup`` makes them): a tree with the parameters' names, or a function
        ``(path, leaf) -> shape``.
      optimizer: ``"adam"`` for every method with normalised steps; ``"sgd"``.
      readout: ``"multiplier"``: the model multiplies the input of its output layer by
        :math:`1/r_{in}`. ``"lr"``: it does not; the output layer then starts with variance
        1/inputs^2, and its rate is multiplied by :math:`1/r_{in}` for both optimizers.
      fan_axes: which axes are inputs and outputs where the last two are not:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes | None``. Attention kernels of
        rank 3 called query, key, value or out need none.

    Returns:
      A transformation without state. It belongs after the link that normalises
      (``scale_by_adam``) and before the rate. ``optax.add_decayed_weights`` after it decays all
      leaves alike, which is the authors' default.

    Raises:
      ValueError: if a parameter is missing from ``base_shapes``, or grew along an axis that is
        neither inputs nor outputs.

    An axis counts as width where its size differs from the base. Where just one side of a matrix
    happens to have the size of the base, the other alone counts: choose a base that differs
    everywhere. The rates are half of muP: hidden weights must start with variance 1/inputs, and
    attention be scaled by 1/head size instead of its root. An output layer that shares the
    embedding table keeps the rate of the table. Muon needs none of this with
    ``scale_by_matrix_shape("spectral")``.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_mup({"kernel": (2, 2)})
    >>> updates, _ = tx.update({"kernel": jnp.ones((8, 4))}, tx.init({"kernel": jnp.ones((8, 4))}))
    >>> float(updates["kernel"][0, 0])
    0.25

    Reference: Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
    Hyperparameter Transfer", 2022, arXiv 2203.03466; why it works: Noci et al., 2024,
    arXiv 2402.17457. Agrees with microsoft/mup (goldens ``mup__multipliers``), whose layout has
    inputs last. ``readout="lr"`` is the table of the paper, without a recording.
    """
    return _scale_by(_leaf_multiplier(base_shapes, optimizer, readout, fan_axes))


def mup_simple(
    base_fan_in: Any = 256, *, fan_axes: MatrixAxesOverride = None
) -> GradientTransformation:
    """Multiplies the updates of linear layers by ``base_fan_in / inputs``: muP without the rest.

    Args:
      base_fan_in: inputs of a layer whose rate stays as it is, > 0; the authors' 256.
      fan_axes: which axes are inputs and outputs where name and shape do not tell, as the
        ``matrix_axes`` of ``scale_by_matrix_shape``.

    Returns:
      A transformation without state, for between ``scale_by_adam`` and the rate. Vectors and
      embedding tables pass as they are; the output layer is a linear layer.

    Raises:
      ValueError: if ``base_fan_in`` is not positive, or a layout is ambiguous.

    Initialisation and forward pass stay standard. The authors found that full muP gains nothing
    over it.

    >>> import jax.numpy as jnp
    >>> tx = mup_simple(256)
    >>> updates, _ = tx.update({"kernel": jnp.ones((1024, 2))}, tx.init(None))
    >>> float(updates["kernel"][0, 0])
    0.25

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", ICLR 2024, arXiv 2309.14322.
    """
    check_range(base_fan_in=base_fan_in, gt=0)

    def factor(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        axes = layout.matrix_axes(name, leaf, fan_axes)
        if axes is None or layout.has_word(name, layout.EMBEDDING_WORDS):
            return 1.0
        _, inputs, _ = layout.matrix_shape(np.shape(leaf), axes)
        return base_fan_in / inputs if inputs else 1.0

    return _scale_by(factor)


def _scale_by(factor: Callable[[Any, Any], Any]) -> GradientTransformation:
    """Multiplies every leaf by a number that its name and shape decide."""

    def init(params: PyTree) -> optax.EmptyState:
        jax.tree_util.tree_map_with_path(factor, params)  # for its errors
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")

        def step(u: Array, multiplier: Any) -> Array:
            return multiplier * u

        multipliers = jax.tree_util.tree_map_with_path(factor, updates)
        return map_leaves(step, updates, reads=(multipliers,)), state

    return transformation(init, update)


def _example_base(name: str, leaf: Any) -> tuple[int, ...]:
    """The base of the example: axes of even length were half as long, but for the vocabulary."""
    fixed = 1 if name.endswith("embedding") else 0
    return tuple(n if n % 2 or axis < fixed else n // 2 for axis, n in enumerate(np.shape(leaf)))


def _example_axes(name: str, leaf: Any) -> MatrixAxes | None:
    """The window of the example's convolution grew too; that is said to be inputs."""
    rank = len(np.shape(leaf))
    return MatrixAxes((), tuple(range(rank - 1)), (rank - 1,)) if name == "conv/kernel" else None


RECORDS = (
    Method(
        factory=scale_by_mup,
        kind="piece",
        summary="muP's learning rate for every shape",
        example={"base_shapes": _example_base, "optimizer": "sgd", "fan_axes": _example_axes},
        static=("base_shapes", "optimizer", "readout", "fan_axes"),
        position="middle",
        communication="none",
        response="proportional",
        state_bytes=0,
        moved_bytes=12,
        paper='Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot '
        'Hyperparameter Transfer", 2022, arXiv 2203.03466',
        reference="microsoft/mup@1981497193:mup/optim.py",
        licence="MIT",
    ),
    Method(
        factory=mup_simple,
        kind="piece",
        summary="learning rates of linear layers by their inputs",
        example={"base_fan_in": 4},
        exempt={"fidelity": "the authors published no code; the rule is checked by hand"},
        traced=("base_fan_in",),
        static=("fan_axes",),
        position="middle",
        communication="none",
        response="proportional",
        state_bytes=0,
        moved_bytes=12,
        paper='Wortsman et al., "Small-scale proxies for large-scale Transformer training '
        'instabilities", ICLR 2024, arXiv 2309.14322',
    ),
)
