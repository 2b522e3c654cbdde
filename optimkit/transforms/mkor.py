"""MKOR's direction: gradients between inverse Kronecker factors, kept up by rank-one updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import MatrixAxesOverride, named_leaves
from optimkit.leaves import check_match, check_real, check_structure, zero_count
from optimkit.matrices.kronecker import Factor, identity, layer_shape
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    compute_dtype,
    due,
    next_count,
)
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.mkor_factors import (
    RESETS,
    UPDATE_RULES,
    Pair,
    RefreshRule,
    Reset,
    UpdateRule,
    precondition,
    refreshed,
)
from optimkit.transforms.mkor_layers import Layer, Skip, example_stats, find_layers, stats_of


class ScaleByMkorState(NamedTuple):
    """``count``: int32 scalar. What a layer has stands in the place of its kernel and bias.

    ``inverse_inputs``: for a kernel, one (inputs, inputs) array a matrix; for its bias the row that
    it adds, (inputs + 1,). ``inverse_outputs``: for a kernel, (outputs, outputs).
    ``reset_inputs``, ``reset_outputs``: bool, whether a factor starts anew at the next refresh.
    All other places hold None.
    """

    count: Array
    inverse_inputs: PyTree
    inverse_outputs: PyTree
    reset_inputs: PyTree
    reset_outputs: PyTree


def scale_by_mkor(
    *,
    inv_freq: int = 10,
    warmup_steps: int = 0,
    factor_decay: Any = 0.95,
    threshold: Any = 2.0,
    stabilization: Any = 0.1,
    clip: Any = 100.0,
    update_rule: UpdateRule = "code",
    reset: Reset = "identity",
    factor_dtype: Any = None,
    skip: Skip = (),
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""Multiplies each layer's gradient by inverse Kronecker factors, and keeps its norm.

    With the gradient of kernel and bias in D, one row an input, the bias last:

    .. math:: V = A D G, \qquad
        D \leftarrow \frac{\|D_W\| + \|D_b\|}{\|V_W\| + \|V_b\|}\, V

    A and G are kept, not computed: every ``inv_freq`` steps one vector each, the mean input a (with
    1 for the bias) and the summed output gradient g, changes them by a matrix of rank one. For
    M in {A, G}, v in {a, g} and :math:`s = v^T M v`:

    .. math::

        \text{code:} \quad M &\leftarrow \gamma M + (1-\gamma) I, \qquad
            M \leftarrow M - \frac{(Mv)(Mv)^T}{1 + s} \\
        \text{exact:} \quad M &\leftarrow \frac{1}{\gamma} \Bigl(M -
            \frac{(1-\gamma)(Mv)(Mv)^T}{\gamma + (1-\gamma) s}\Bigr) \\
        \text{paper:} \quad M &\leftarrow \gamma M +
            \frac{(1-\gamma)(Mv)(Mv)^T}{\gamma^2 (1 + \gamma (1-\gamma) s)}

    Args:
      inv_freq: steps between two refreshes of the factors, >= 1; the authors' 10.
      warmup_steps: the factors are refreshed at every one of the first steps.
      factor_decay: gamma, in (0, 1).
      threshold: a factor with an entry above it is too large, > 0.
      stabilization: zeta, in [0, 1]. With ``"paper"`` and ``"exact"`` a factor that is too large
        becomes :math:`(1-\zeta) M + \zeta I` before its update. With ``"code"`` both factors of the
        layer are reset instead, each at its next refresh, which then ends there.
      clip: entries of the statistics are limited to this magnitude, > 0.
      update_rule: ``"code"`` is what the authors ran; ``"exact"`` is the inverse of
        :math:`\gamma L + (1-\gamma) v v^T`; ``"paper"`` adds where the others subtract.
      reset: of rule ``"code"``: to the ``"identity"``, as the code does, or ``"blend"``, the same
        mixture as above, as its parameters mean.
      factor_dtype: dtype of the factors; default f32, or f64 for f64 parameters; never less.
      skip: layers that keep their gradient: patterns of paths (``"lm_head"``, ``"block_*/up"``), or
        ``(leaf path, leaf) -> bool``. A layer with a vocabulary among its sides belongs here.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.

    Returns:
      A transformation whose ``update`` takes ``layer_stats``,
      ``{layer path: {"a": (inputs,), "g": (outputs,)}}``, in every step: see
      ``optimkit.nn.collect_layer_stats``. Only Dense and Conv kernels, and their biases, are
      changed. A square layer keeps 8 bytes a f32 parameter, others more.

    Raises:
      ValueError: if an argument is out of range, statistics are missing or of another shape, a
        gradient has another shape, or a layout is ambiguous.

    Two products cost ``2 inputs outputs (inputs + outputs)`` operations a layer in every step,
    not only at a refresh; a refresh costs as much as reading the factors a few times. On a mesh
    both are divided, and so are the factors, where the sides divide evenly. The first refresh of
    ``"code"`` sets the identity, so step 0 is that of the optimizer behind. With the default
    threshold its factors never trip: their eigenvalues stay in (0, 1]. ``"paper"`` lets a factor
    grow about twofold along a vector that keeps coming. Statistics with NaN leave the factors as
    they are; a zero gradient stays zero. Under gradient accumulation the statistics must be
    averaged like the gradients.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_mkor(inv_freq=1, update_rule="exact", factor_decay=0.5)
    >>> grads = {"dense": {"kernel": jnp.array([[3.0], [4.0]])}}
    >>> stats = {"dense": {"a": jnp.array([1.0, 0.0]), "g": jnp.zeros(1)}}
    >>> updates, state = tx.update(grads, tx.init(grads), grads, layer_stats=stats)
    >>> state.inverse_inputs["dense"]["kernel"].tolist()  # of 0.5 I + 0.5 a a^T
    [[1.0, 0.0], [0.0, 2.0]]
    >>> [round(float(u), 3) for u in updates["dense"]["kernel"][:, 0]]  # (3, 8), of norm 5
    [1.756, 4.682]

    Reference: Mozaffari et al., "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
    Rank-1 Updates", NeurIPS 2023, arXiv 2306.01685. ``"code"`` agrees with the authors' package
    (goldens ``mkor__*``), the other two with the equations above.
    """
    check_count(inv_freq=inv_freq, least=1)
    check_count(warmup_steps=warmup_steps)
    check_range(factor_decay=factor_decay, gt=0, lt=1)
    check_range(threshold=threshold, clip=clip, gt=0)
    check_range(stabilization=stabilization, ge=0, le=1)
    check_choice(UPDATE_RULES, update_rule=update_rule)
    check_choice(RESETS, reset=reset)
    if factor_dtype is not None and not jnp.issubdtype(jnp.dtype(factor_dtype), jnp.floating):
        raise ValueError(f"factor_dtype must be a floating-point dtype, got {factor_dtype!r}")

    rule = RefreshRule(update_rule, reset, factor_decay, threshold, stabilization)

    def dtype_of(leaf: Any) -> Any:
        wide = compute_dtype(leaf)
        return wide if factor_dtype is None else jnp.promote_types(wide, factor_dtype)

    def init(params: PyTree) -> ScaleByMkorState:
        check_real(params, "parameter")
        leaves, structure = jax.tree.flatten(params)
        columns: list[list[Any]] = [[None] * len(leaves) for _ in range(4)]
        for layer in find_layers(params, skip, matrix_axes):
            kernel = leaves[layer.kernel]
            batch, inputs, outputs = layer_shape(kernel, layer.axes)
            dtype = dtype_of(kernel)
            a = identity(batch, inputs, layer.bias is not None, kernel, dtype)
            g = identity(batch, outputs, False, kernel, dtype)
            columns[0][layer.kernel], columns[1][layer.kernel] = a.square, g.square
            if layer.bias is not None:
                columns[0][layer.bias] = a.border
            for flags in columns[2:]:
                flags[layer.kernel] = jnp.ones(batch, bool)
        return ScaleByMkorState(zero_count(), *(structure.unflatten(c) for c in columns))

    def update(
        updates: PyTree,
        state: ScaleByMkorState,
        params: PyTree | None = None,
        *,
        layer_stats: Mapping[str, Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByMkorState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        layers = find_layers(updates, skip, matrix_axes)
        names = [name for name, _ in named_leaves(updates)]
        leaves, structure = jax.tree.flatten(updates)
        columns = [_column(updates, tree) for tree in state[1:]]
        _check_all_found(layers, names, leaves, columns[1])
        pairs = [_pair_of(layer, names, leaves, columns) for layer in layers]
        stats = [
            stats_of(layer, leaves[layer.kernel], pair, layer_stats, clip)
            for layer, pair in zip(layers, pairs, strict=True)
        ]

        def all_refreshed(pairs: list[Pair]) -> list[Pair]:
            return [refreshed(pair, *v, rule) for pair, v in zip(pairs, stats, strict=True)]

        now = due(state.count, inv_freq) | (state.count < warmup_steps)
        if layers:
            pairs = jax.lax.cond(now, all_refreshed, lambda pairs: pairs, pairs)
        for layer, pair in zip(layers, pairs, strict=True):
            kernel = leaves[layer.kernel]
            bias = None if layer.bias is None else leaves[layer.bias]
            new, new_bias = precondition(pair, kernel, bias, layer.axes)
            leaves[layer.kernel] = new
            columns[0][layer.kernel], columns[1][layer.kernel] = pair.a.square, pair.g.square
            columns[2][layer.kernel], columns[3][layer.kernel] = pair.reset_a, pair.reset_g
            if layer.bias is not None:
                leaves[layer.bias] = new_bias
                columns[0][layer.bias] = pair.a.border
        new_state = ScaleByMkorState(
            next_count(state.count), *(structure.unflatten(column) for column in columns)
        )
        return structure.unflatten(leaves), new_state

    return transformation(init, update)


# ---------------------------------------------------------------------------------------------
# The state of a layer
# ---------------------------------------------------------------------------------------------


def _column(updates: PyTree, tree: PyTree) -> list[Any]:
    """One entry of a state tree a gradient leaf, None where there is none."""
    structure = jax.tree.structure(updates)
    try:
        return structure.flatten_up_to(tree)
    except ValueError:
        pass
    filled = jax.tree.map(lambda x: 0 if x is None else x, tree, is_leaf=lambda x: x is None)
    check_structure(updates, filled, what="gradient", like="the state")
    raise ValueError("gradient and the state are different trees")


def _check_all_found(
    layers: Sequence[Layer], names: list[str], leaves: list[Any], factors: list[Any]
) -> None:
    kernels = {layer.kernel for layer in layers}
    for index, factor in enumerate(factors):
        if factor is not None and index not in kernels:
            raise ValueError(
                f"gradient leaf {names[index]!r} of shape {np.shape(leaves[index])} is no gradient "
                f"of the layer that the state was made for, with {factor.shape[-1]} outputs"
            )


def _pair_of(layer: Layer, names: list[str], leaves: list[Any], columns: list[list[Any]]) -> Pair:
    """The state of a layer, checked against its gradient."""
    kernel = leaves[layer.kernel]
    batch, inputs, outputs = layer_shape(kernel, layer.axes)
    a, g, reset_a, reset_g = (column[layer.kernel] for column in columns)
    border = None if layer.bias is None else columns[0][layer.bias]
    have = tuple(np.shape(x)[:-1] for x in (a, g))
    if have != ((*batch, inputs), (*batch, outputs)) or (layer.bias is None) != (border is None):
        raise ValueError(
            f"gradient leaf {names[layer.kernel]!r} of shape {np.shape(kernel)} is no gradient of "
            f"the layer that the state was made for, whose factors have shapes {np.shape(a)} and "
            f"{np.shape(g)}"
        )
    return Pair(Factor(a, border), Factor(g, None), reset_a, reset_g)


# ---------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------


TRACED = ("factor_decay", "threshold", "stabilization", "clip")
STATIC = (
    "inv_freq", "warmup_steps", "update_rule", "reset", "factor_dtype", "skip", "matrix_axes"
)  # fmt: skip
PAPER = (
    'Mozaffari et al., "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1 '
    'Updates", NeurIPS 2023, arXiv 2306.01685'
)
REFERENCE = "Mohammad-Mozaffari/mkor@3a0e3bb2df:mkor/mkor.py:MKOR"

RECORD = Method(
    factory=scale_by_mkor,
    kind="piece",
    summary="gradients between inverse Kronecker factors that rank-one updates keep",
    example={"inv_freq": 2},
    extras=example_stats,
    traced=TRACED,
    static=STATIC,
    needs=("layer_stats",),
    position="first",
    communication="matrix",
    response="proportional",
    state_bytes=8,
    moved_bytes=28,
    paper=PAPER,
    reference=REFERENCE,
    licence="MIT",
)
