"""Sign-diverse plasticity: some neurons follow the learning rule with its sign turned round."""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.layout import (
    CONV_WORDS,
    VECTOR_WORDS,
    MatrixAxesOverride,
    has_word,
    matrix_axes,
    named_leaves,
    path_name,
)
from optimkit.leaves import check_match, check_real, require_params
from optimkit.numerics import check_choice, check_count
from optimkit.protocols import (
    Array,
    GradientTransformation,
    MatrixAxes,
    Method,
    PyTree,
    transformation,
)

Flips: TypeAlias = Mapping[str, int | float] | int | float
"""How many units are flipped, as a count or a fraction: for each leaf, or for every kernel."""

SIDES = ("pre", "post")


def is_kernel(name: str, leaf: Any) -> bool:
    """Whether a leaf has input and output units: rank two or more, and no norm scale or bias."""
    return len(np.shape(leaf)) >= 2 and name.rsplit("/", 1)[-1].lower() not in VECTOR_WORDS


def rule_flip_mask(
    params: PyTree,
    flips: Flips,
    *,
    side: Literal["pre", "post"] = "pre",
    seed: int | None = None,
    matrix_axes: MatrixAxesOverride = None,
) -> PyTree:
    """The signs of every synapse's learning rule: -1 for the synapses of flipped units.

    Args:
      params: the parameters; only their paths and shapes are read.
      flips: ``{path or pattern: how many}``, or one number for every kernel. An integer counts
        units, a float in [0, 1] is a fraction of them, rounded.
      side: ``"pre"`` flips all outgoing synapses of input units: a hidden unit lives in the next
        layer's kernel. ``"post"`` flips all incoming synapses of output units.
      seed: None flips the first units of a leaf, as the authors do; an integer draws them, for each
        leaf by its path.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell. By default
        a rank-2 leaf is (in, out), and the units of a convolution are its channels.

    Returns:
      A tree like ``params`` of int8 arrays that broadcast against them, such as (in, 1) for a Dense
      kernel; None where nothing is flipped. A stack of layers flips the same units in each.

    Raises:
      ValueError: if a pattern matches no kernel, there are fewer units than flips, a fraction is
        not in [0, 1], the seed is no integer >= 0, or the layout of a leaf is ambiguous.

    >>> import numpy as np
    >>> kernels = {"hidden": np.zeros((3, 2)), "output": np.zeros((2, 1))}
    >>> signs = rule_flip_mask(kernels, {"output": 1})
    >>> signs["hidden"], signs["output"].tolist()
    (None, [[-1], [1]])
    """
    check_choice(SIDES, side=side)
    check_count(seed=0 if seed is None else seed)
    kernels = [name for name, leaf in named_leaves(params) if is_kernel(name, leaf)]
    wanted = flips if isinstance(flips, Mapping) else {"*": flips}
    for pattern in wanted:
        # An empty tree has nothing to match (optax.tree_map_params inits on one).
        if isinstance(flips, Mapping) and kernels and not fnmatch.filter(kernels, pattern):
            raise ValueError(f"flips: {pattern!r} matches none of the kernels {kernels}")
    for how_many in wanted.values():
        _check_flips(how_many)

    def signs(path: Any, leaf: Any) -> Any:
        name, shape = path_name(path), np.shape(leaf)
        found = [n for pattern, n in wanted.items() if fnmatch.fnmatchcase(name, pattern)]
        if not found or name not in kernels:
            return None
        axes = _unit_axes(name, leaf, matrix_axes)
        kept = axes.inputs if side == "pre" else axes.outputs
        sizes = tuple(n if a in kept else 1 for a, n in enumerate(shape))
        units = int(np.prod(sizes))
        count = found[0] if isinstance(found[0], (int, np.integer)) else round(found[0] * units)
        if count > units:
            raise ValueError(
                f"flips: {count} units of {name!r}, which has {units} on side {side!r}"
            )
        if count == 0:
            return None
        order = np.arange(units)
        if seed is not None:
            # Raw bits: their stream is the same in every version of NumPy.
            key = (int(seed) << 32) + zlib.crc32(name.encode())
            order = np.argsort(np.random.Philox(key=key).random_raw(units))
        flat = np.ones(units, np.int8)
        flat[order[:count]] = -1
        return flat.reshape(sizes)

    return jax.tree_util.tree_map_with_path(signs, params)


def _check_flips(how_many: Any) -> None:
    fine = not isinstance(how_many, bool) and (
        how_many >= 0
        if isinstance(how_many, (int, np.integer))
        else isinstance(how_many, (float, np.floating)) and 0 <= how_many <= 1
    )
    if not fine:
        raise ValueError(
            f"flips must be a count (an integer >= 0) or a fraction (a float in [0, 1]), "
            f"got {how_many!r}"
        )


def _unit_axes(name: str, leaf: Any, override: MatrixAxesOverride) -> MatrixAxes:
    rank = len(np.shape(leaf))
    if override is None and rank == 2:
        return MatrixAxes((), (0,), (1,))
    if override is None and has_word(name, CONV_WORDS):
        return MatrixAxes(tuple(range(rank - 2)), (rank - 2,), (rank - 1,))
    axes = matrix_axes(name, leaf, override)
    if axes is None:
        raise ValueError(f"flips: {name!r} is no matrix, as matrix_axes says")
    return axes


def flip_signs(signs: PyTree | Callable[[PyTree], PyTree]) -> GradientTransformation:
    r"""Multiplies updates by fixed signs: some synapses climb the loss where others descend.

    .. math:: u \leftarrow D\, u, \qquad D = \operatorname{diag}(\pm 1)

    The field of such updates has a rotational part, and is the gradient of nothing.

    Args:
      signs: a tree like the parameters of +-1, each array broadcastable to its leaf, None where a
        leaf stays as it is; or a function of the parameters that gives one, such as
        ``lambda params: rule_flip_mask(params, {"output/kernel": 1})``.

    Returns:
      A transformation without state. It needs ``params`` if ``signs`` is a function. Put weight
      decay behind it, so that the decay is not flipped.

    Raises:
      ValueError: if the signs have another structure, or do not broadcast to their leaf.

    Before or behind momentum or Adam it does the same.

    >>> import jax.numpy as jnp
    >>> tx = flip_signs({"w": jnp.array([[-1], [1]]), "b": None})
    >>> u = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    >>> u, _ = tx.update(u, tx.init(u))
    >>> u["w"].tolist(), u["b"].tolist()
    ([[-1.0, -1.0], [1.0, 1.0]], [1.0, 1.0])

    Reference: Ninou et al., "Curl Descent: Non-Gradient Learning Dynamics with Sign-Diverse
    Plasticity", 2025, arXiv 2510.02765.
    """

    def init(params: PyTree) -> optax.EmptyState:
        if callable(signs):
            signs(params)  # a wrong path shows before training
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        check_real(updates, "gradient")
        given = signs
        if callable(signs):
            given = signs(require_params(params, "flip_signs"))
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        flat, structure = jax.tree_util.tree_flatten_with_path(updates)
        try:
            factors = structure.flatten_up_to(given)
        except ValueError:
            names = [path_name(path) for path, _ in flat]
            raise ValueError(
                f"signs have another structure than the updates, whose leaves are {names}"
            ) from None
        flipped = [_flipped(path, u, sign) for (path, u), sign in zip(flat, factors, strict=True)]
        return structure.unflatten(flipped), state

    return transformation(init, update)


def _flipped(path: Any, u: Array, sign: Any) -> Array:
    if sign is None:
        return u
    shape = np.shape(sign)
    fits = len(shape) in (0, u.ndim) and all(a in (1, b) for a, b in zip(shape, u.shape))  # noqa: B905
    if not fits:
        raise ValueError(
            f"signs of leaf {path_name(path)!r} have shape {shape}, which does not broadcast to "
            f"the update's {u.shape}"
        )
    return u * jnp.asarray(sign).astype(u.dtype)


def _example_signs(params: PyTree) -> PyTree:
    return rule_flip_mask(params, 0.25)


RECORD = Method(
    factory=flip_signs,
    kind="piece",
    summary="turn round the learning rule of chosen neurons",
    example={"signs": _example_signs},
    static=("signs",),
    needs=("params",),
    position="any",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Ninou et al., "Curl Descent: Non-Gradient Learning Dynamics with Sign-Diverse '
    'Plasticity", 2025, arXiv 2510.02765',
    reference="caycogajiclab/Curl_Descent@a79f32a0e2a443c4b932d013a16a361bc8a0909f:"
    "Data_generation/fig6a/phase_diag.py:TeacherStudentLearning",
    licence="",
)
