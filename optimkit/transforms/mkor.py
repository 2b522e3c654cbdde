"""MKOR's direction: gradients between inverse Kronecker factors, kept up by rank-one updates."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import (
    EMBEDDING_WORDS,
    MatrixAxesOverride,
    has_word,
    matrix_axes,
    named_leaves,
)
from optimkit.leaves import check_match, check_real, check_structure, zero_count
from optimkit.matrices.kronecker import (
    Factor,
    as_matrix,
    bias_like,
    blend,
    choose,
    divided,
    from_matrix,
    identity,
    image,
    is_finite,
    largest,
    layer_shape,
    rank_one,
    two_sided,
    whole,
)
from optimkit.numerics import (
    check_choice,
    check_count,
    check_range,
    compute_dtype,
    due,
    narrow,
    next_count,
    safe_div,
    safe_norm,
)
from optimkit.protocols import (
    Array,
    GradientTransformation,
    MatrixAxes,
    Method,
    PyTree,
    transformation,
)

UPDATE_RULES = ("code", "paper", "exact")
RESETS = ("identity", "blend")

UpdateRule: TypeAlias = Literal["code", "paper", "exact"]
Reset: TypeAlias = Literal["identity", "blend"]
Skip: TypeAlias = Sequence[str] | Callable[[str, Any], bool]


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


class Layer(NamedTuple):
    """A kernel and its bias: a name, places in the order of ``jax.tree.leaves``, and axes."""

    name: str
    kernel: int
    bias: int | None
    axes: MatrixAxes


def find_layers(
    tree: PyTree, skip: Skip = (), override: MatrixAxesOverride = None
) -> tuple[Layer, ...]:
    """The Dense and Conv layers of a tree: kernels, each with the ``bias`` beside it if it fits.

    A layer is named by its path: ``block/dense`` for ``block/dense/kernel``. A leaf of another name
    than ``kernel`` is a layer of its own. Embedding tables, vectors and empty leaves are none.

    Args:
      tree: the parameters, or anything like them.
      skip: layers to leave out: patterns of layer or leaf paths, or ``(leaf path, leaf) -> bool``.
      override: which axes are inputs and outputs, where name and shape do not tell.

    Raises:
      ValueError: for a pattern that matches no layer, or an ambiguous layout.
    """
    named = named_leaves(tree)
    places = {name: index for index, (name, _) in enumerate(named)}
    found: list[tuple[str, Layer]] = []
    for index, (name, leaf) in enumerate(named):
        parent, _, last = name.rpartition("/")
        if np.size(leaf) == 0 or has_word(last, EMBEDDING_WORDS):
            continue
        if callable(skip) and skip(name, leaf):
            continue
        axes = matrix_axes(name, leaf, override)
        if axes is None:
            continue
        bias = None
        if last == "kernel":
            place = places.get(f"{parent}/bias" if parent else "bias")
            wanted = tuple(leaf.shape[a] for a in (*axes.batch, *axes.outputs))
            if place is not None and np.shape(named[place][1]) == wanted:
                bias = place
        layer = (parent or "(root)") if last == "kernel" else name
        found.append((name, Layer(layer, index, bias, axes)))
    if callable(skip):
        return tuple(layer for _, layer in found)
    for pattern in skip:
        if named and not any(_matches(pattern, name, layer) for name, layer in found):
            names = [layer.name for _, layer in found]
            raise ValueError(f"skip: {pattern!r} matches none of the layers {names}")
    return tuple(
        layer
        for name, layer in found
        if not any(_matches(pattern, name, layer) for pattern in skip)
    )


def _matches(pattern: str, name: str, layer: Layer) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for path in (name, layer.name))


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

    def refresh(pair: _Pair, a: Array, g: Array) -> _Pair:
        if update_rule == "code":
            return _refresh_code(pair, a, g, factor_decay, threshold, stabilization, reset)
        rule = _exact if update_rule == "exact" else _paper

        def one(factor: Factor, v: Array) -> Factor:
            stable = blend(factor, jnp.where(largest(factor) > threshold, stabilization, 0.0))
            return _if_finite(rule(stable, image(stable, v), factor_decay), factor)

        return _Pair(one(pair.a, a), one(pair.g, g), pair.reset_a, pair.reset_g)

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
            _stats_of(layer, leaves[layer.kernel], pair, layer_stats, clip)
            for layer, pair in zip(layers, pairs, strict=True)
        ]

        def refreshed(pairs: list[_Pair]) -> list[_Pair]:
            return [refresh(pair, *v) for pair, v in zip(pairs, stats, strict=True)]

        now = due(state.count, inv_freq) | (state.count < warmup_steps)
        if layers:
            pairs = jax.lax.cond(now, refreshed, lambda pairs: pairs, pairs)
        for layer, pair in zip(layers, pairs, strict=True):
            kernel = leaves[layer.kernel]
            bias = None if layer.bias is None else leaves[layer.bias]
            new, new_bias = _precondition(pair, kernel, bias, layer.axes)
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
# Refreshes
# ---------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """The two factors of a layer, and whether they start anew."""

    a: Factor
    g: Factor
    reset_a: Array
    reset_g: Array


def _refresh_code(
    pair: _Pair, a: Array, g: Array, decay: Any, threshold: Any, stabilization: Any, reset: Reset
) -> _Pair:
    """Inputs first: where they trip, the outputs are reset in this refresh, they in the next."""

    def one(factor: Factor, v: Array, due_now: Array) -> tuple[Factor, Array]:
        fresh = blend(factor, jnp.asarray(1.0 if reset == "identity" else stabilization))
        mixed = blend(factor, jnp.asarray(1 - decay))
        of = image(mixed, v)
        followed = rank_one(mixed, jnp.ones_like(of.form), of, -1 / (1 + of.form))
        new = choose(due_now, fresh, _if_finite(followed, factor))
        return new, ~due_now & (largest(new) > threshold)

    new_a, tripped = one(pair.a, a, pair.reset_a)
    new_g, tripped_g = one(pair.g, g, pair.reset_g | tripped)
    return _Pair(new_a, new_g, tripped | tripped_g, tripped_g)


def _exact(factor: Factor, of: Any, decay: Any) -> Factor:
    scale = (1 - decay) / (decay * (decay + (1 - decay) * of.form))
    return rank_one(factor, jnp.full_like(of.form, 1 / decay), of, -scale)


def _paper(factor: Factor, of: Any, decay: Any) -> Factor:
    scale = (1 - decay) / (decay**2 * (1 + decay * (1 - decay) * of.form))
    return rank_one(factor, jnp.full_like(of.form, decay), of, scale)


def _if_finite(new: Factor, old: Factor) -> Factor:
    return choose(is_finite(new), new, old)


# ---------------------------------------------------------------------------------------------
# A layer
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


def _pair_of(layer: Layer, names: list[str], leaves: list[Any], columns: list[list[Any]]) -> _Pair:
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
    return _Pair(Factor(a, border), Factor(g, None), reset_a, reset_g)


def _stats_of(
    layer: Layer,
    kernel: Array,
    pair: _Pair,
    layer_stats: Mapping[str, Mapping[str, Any]] | None,
    clip: Any,
) -> tuple[Array, Array]:
    """The two vectors of a layer, on every device, limited to ``clip``."""
    if layer_stats is None or layer.name not in layer_stats:
        given = "nothing" if layer_stats is None else sorted(layer_stats)
        raise ValueError(
            f"layer_stats lacks layer {layer.name!r} (it has {given}): call update(gradients, "
            "state, params, layer_stats=collect_layer_stats(...)), or name the layer in skip"
        )
    found = []
    for what, factor in (("a", pair.a), ("g", pair.g)):
        shape = factor.square.shape[:-1]
        if what not in layer_stats[layer.name] or np.shape(layer_stats[layer.name][what]) != shape:
            given = {name: np.shape(x) for name, x in layer_stats[layer.name].items()}
            raise ValueError(
                f"layer_stats[{layer.name!r}] must hold {what!r} of shape {shape}, got {given}"
            )
        v = jnp.asarray(layer_stats[layer.name][what], factor.square.dtype)
        found.append(whole(jnp.clip(v, -clip, clip), kernel))
    return found[0], found[1]


def _precondition(
    pair: _Pair, kernel: Array, bias: Array | None, axes: MatrixAxes
) -> tuple[Array, Array | None]:
    """The new gradient of kernel and bias, in the dtypes and places in which they came."""
    dtype = pair.a.square.dtype
    batch, _, outputs = layer_shape(kernel, axes)
    wide = as_matrix(jnp.asarray(kernel, dtype), axes)
    wide_bias = None
    if bias is not None:
        flat = jnp.asarray(whole(bias, bias), dtype)
        wide_bias = flat.reshape(*batch, outputs)
    new, new_bias = two_sided(pair.a, pair.g, wide, wide_bias)

    def norms(w: Array, b: Array | None) -> Array:
        norm = safe_norm(w, (-2, -1))
        return norm if b is None else norm + safe_norm(b, -1)

    factor = safe_div(norms(wide, wide_bias), norms(divided(new), new_bias), jnp.nan)
    # Zero gradients, and products beyond what floats hold, keep what they have.
    good = jnp.isfinite(factor)
    factor = jnp.where(good, factor, 0)

    def scaled(old: Array, v: Array, axes: int) -> Array:
        over = tuple(range(-axes, 0))
        return jnp.where(jnp.expand_dims(good, over), jnp.expand_dims(factor, over) * v, old)

    done = from_matrix(scaled(wide, new, 2), kernel, axes)
    done = narrow(done, jnp.result_type(kernel))
    if bias is None or wide_bias is None or new_bias is None:
        return done, None
    done_bias = bias_like(scaled(wide_bias, new_bias, 1), bias)
    return done, narrow(done_bias, jnp.result_type(bias))


# ---------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------


def example_stats(params: PyTree, grads: PyTree) -> dict[str, Any]:
    """Statistics for every layer, as large as its gradient."""
    rng = np.random.default_rng(0)
    stats = {}
    sizes = jax.tree.leaves(grads)
    leaves = jax.tree.leaves(params)
    for layer in find_layers(params):
        kernel = leaves[layer.kernel]
        batch, inputs, outputs = layer_shape(kernel, layer.axes)
        size = jnp.max(jnp.abs(sizes[layer.kernel])).astype(compute_dtype(kernel))
        stats[layer.name] = {
            "a": jnp.asarray(rng.normal(size=(*batch, inputs)), size.dtype),
            "g": size * jnp.asarray(rng.normal(size=(*batch, outputs)), size.dtype),
        }
    return {"layer_stats": stats}


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
