"""Where arrays lie on a mesh, and how to move them without gathering them.

Everything here concerns explicit meshes, on which the types of arrays say where they lie. A move is
made of single steps, each of which takes one mesh axis from one array axis to another: an
all-to-all, which sends every number once. The direct way gathers the whole array on each device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optimkit.protocols import Array, MatrixAxes

Spec: TypeAlias = tuple[tuple[str, ...], ...]
"""For each axis of an array, the mesh axes that divide it, the first being the outermost."""


def axes_of_kind(mesh: Any, kind: AxisType) -> tuple[str, ...]:
    """Names of the mesh axes of one kind; empty without a mesh."""
    return tuple(
        name
        for name, its_kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if its_kind == kind
    )


def explicit_axes(x: Array) -> tuple[str, ...]:
    """Names of the mesh axes whose use the type of ``x`` says."""
    return axes_of_kind(jax.typeof(x).sharding.mesh, AxisType.Explicit)


def replicated(x: Array) -> NamedSharding | None:
    """The sharding of whole copies on the devices of ``x``; None where types do not tell places."""
    return NamedSharding(jax.typeof(x).sharding.mesh, P()) if explicit_axes(x) else None


def gather(x: Array) -> Array:
    """The whole array on every device: axes of a sharded one can be neither merged nor joined."""
    sharding = replicated(x)
    return x if sharding is None else jax.reshard(x, sharding)


def place_like(x: Array, like: Array) -> Array:
    """``x``, of the shape of ``like``, laid where that one lies on an explicit mesh."""
    return walk(x, spec_of(like)) if explicit_axes(like) else x


def spec_of(x: Array) -> Spec:
    """How the axes of ``x`` are divided, as far as its type says."""
    entries = tuple(jax.typeof(x).sharding.spec)
    entries += (None,) * (x.ndim - len(entries))
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    )


def sharding(mesh: Any, spec: Spec) -> NamedSharding:
    """The sharding that a spec means on a mesh."""
    return NamedSharding(mesh, P(*[names or None for names in spec]))


def walk(x: Array, target: Spec) -> Array:
    """Moves ``x`` to the spec ``target`` step by step; numbers stay where they need not move."""
    mesh = jax.typeof(x).sharding.mesh
    now = [list(names) for names in spec_of(x)]

    def leaving() -> list[int]:
        """Axes whose innermost mesh axis has to go elsewhere."""
        return [
            axis
            for axis, names in enumerate(now)
            if names and tuple(names) != target[axis][: len(names)]
        ]

    def wanted(axis: int) -> str | None:
        """The mesh axis that this axis waits for, unless another has to leave it first."""
        fits = axis not in leaving() and len(now[axis]) < len(target[axis])
        return target[axis][len(now[axis])] if fits else None

    def go(x: Array) -> Array:
        spec = tuple(tuple(names) for names in now)
        return x if spec == spec_of(x) else jax.reshard(x, sharding(mesh, spec))

    while leaving():
        _divide_further(now, wanted)
        x = go(x)
        # A mesh axis goes where it is waited for. One that nobody waits for has to be gathered.
        ends = {wanted(axis): axis for axis in range(x.ndim)}
        source = next((axis for axis in leaving() if now[axis][-1] in ends), leaving()[0])
        name = now[source].pop()
        if name in ends:
            now[ends[name]].append(name)
        x = go(x)
    _divide_further(now, wanted)
    return go(x)


def _divide_further(now: list[list[str]], wanted: Callable[[int], str | None]) -> None:
    """Uses mesh axes that nothing uses yet: every device keeps a part of what it has."""
    for axis, names in enumerate(now):
        while (name := wanted(axis)) is not None and not any(name in used for used in now):
            names.append(name)


def mergeable(x: Array, axes: MatrixAxes) -> Spec:
    """The nearest spec in which the axes of each group can be merged into one.

    Of merged axes only the first may be divided. Mesh axes of the others, and of a batch that does
    not divide among all devices, go to the inputs or outputs where they fit, and are else gathered.
    """
    mesh, now = jax.typeof(x).sharding.mesh, spec_of(x)
    batch = math.prod(x.shape[axis] for axis in axes.batch)
    whole = batch and batch % math.prod(mesh.shape[name] for name in explicit_axes(x)) == 0
    homes = [axes.inputs[0], axes.outputs[0]]
    keep: dict[int, list[str]] = {axis: [] for axis in range(x.ndim)}
    for axis in (*axes.batch[:1], *homes) if whole else homes:
        keep[axis] = list(now[axis])
    kept = {name for names in keep.values() for name in names}

    def parts(axis: int) -> int:
        return math.prod(mesh.shape[name] for name in keep[axis])

    for name in (name for names in now for name in names if name not in kept):
        fits = (home for home in homes if x.shape[home] % (parts(home) * mesh.shape[name]) == 0)
        home = next(fits, None)
        if home is not None:
            keep[home].append(name)
    return tuple(tuple(keep[axis]) for axis in range(x.ndim))


def whole_matrices(x: Array, among: Sequence[str]) -> Spec:
    """The spec in which only the first axis of a stack is divided, among the named mesh axes."""
    batch, *rest = spec_of(x)
    used = {name for names in (batch, *rest) for name in names}
    free = [name for name in among if name not in used]
    moved = [name for names in rest for name in reversed(names) if name in among]
    return ((*batch, *free, *moved), *(() for _ in rest))


def reshape(x: Array, shape: Sequence[int], spec: Spec) -> Array:
    """A reshape that merges or splits axes of which only the first is divided."""
    if not explicit_axes(x):
        return x.reshape(shape)
    place = sharding(jax.typeof(x).sharding.mesh, spec)
    return jax.lax.reshape(x, tuple(shape), out_sharding=place)
