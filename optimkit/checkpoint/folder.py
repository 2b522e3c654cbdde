"""One checkpoint: written whole into its folder, read whole from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from optimkit.checkpoint.schema import (
    SCHEMA_VERSION,
    CheckpointError,
    CheckpointMismatch,
    DamagedCheckpoint,
    checksum,
    describe,
    differences,
    on_host,
    place,
    prepare,
    schema_checksum,
    sharding_of,
    stored_form,
)
from optimkit.protocols import PyTree


class Restored(NamedTuple):
    """What came back.

    ``trees``: by name, each with the structure of its target. ``metadata``: as it was saved.
    ``step``: the step, if restored by ``Checkpoints``. ``skipped``: newer damaged checkpoints, step
    to reason.
    """

    trees: dict[str, PyTree]
    metadata: dict[str, Any]
    step: int | None = None
    skipped: Mapping[int, str] = MappingProxyType({})


def _orbax() -> Any:
    """Orbax's second interface, which releases before 1.0 call experimental."""
    try:
        try:
            from orbax.checkpoint import v1  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError:
            from orbax.checkpoint.experimental import v1
    except ImportError:
        raise ImportError(
            'optimkit.checkpoint needs Orbax: pip install "optimkit[checkpoint]"', name="orbax"
        ) from None
    return v1


def write(path: Path, arrays: Any, schema: Any) -> None:
    """Writes what ``prepare`` made."""
    _orbax().save_checkpointables(
        path, arrays, custom_metadata={"optimkit": schema, "crc32": schema_checksum(schema)}
    )


def save(
    path: str | os.PathLike[str],
    trees: Mapping[str, PyTree],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes one checkpoint, all of it or nothing.

    Everything goes into a temporary folder beside ``path``, which is renamed when it is complete.
    Returns when it is written. With several processes, all of them call this.

    Args:
      path: the folder to create.
      trees: what to save, by name: ``{"params": ..., "opt_state": ...}``. Leaves are JAX arrays
        (sharded or not, typed random keys too), NumPy arrays or numbers.
      metadata: what else to keep, as plain JSON: step, data position, seed, settings.

    Raises:
      FileExistsError: if ``path`` exists.
      TypeError: for a leaf or metadata of another kind, naming it.
      ValueError: if two leaves of a tree have one name.

    Each leaf is known by its tree's name and its path: NamedTuple fields, dict keys and indices.
    Leaves spread over several processes are saved without a checksum.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists")
    write(path, *prepare(trees, metadata))


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        stored = _orbax().checkpointables_metadata(path).custom_metadata
        schema, recorded = stored["optimkit"], stored["crc32"]
    except ImportError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"{path} has no readable schema ({_first_line(error)})") from error
    if recorded != schema_checksum(schema):
        raise DamagedCheckpoint(f"{path}: the schema does not match its checksum")
    if schema["version"] > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {schema['version']}, and this optimkit reads up to "
            f"{SCHEMA_VERSION}: upgrade optimkit"
        )
    return schema


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:200]}"


def restore(path: str | os.PathLike[str], targets: Mapping[str, PyTree]) -> Restored:
    r"""Reads one checkpoint into the form of ``targets``: each tree whole, or an error.

    Args:
      path: the folder that ``save`` made.
      targets: by name, what each tree looks like: live arrays (a fresh ``tx.init(params)``), or
        ``jax.ShapeDtypeStruct`` with or without a sharding. Trees that are saved but not named here
        are left alone.

    Returns:
      ``Restored(trees, metadata)``. Every leaf has the type of its target (JAX array, NumPy array,
      number) and goes where the target is, on however many devices; without a sharding, to the
      default device. NamedTuples, ``None`` and empty states come from the target.

    Raises:
      CheckpointMismatch: if leaves are missing, unexpected, or of another shape, dtype or state
        class; one message names them all. Nothing is cast.
      DamagedCheckpoint: if files are missing or do not match their checksums.
      CheckpointError: for the schema of a newer optimkit.
      FileNotFoundError: if there is no such folder.

    >>> import tempfile, optax, jax.numpy as jnp
    >>> params = {"w": jnp.ones(2)}
    >>> state = optax.adam(0.1).init(params)
    >>> folder = tempfile.mkdtemp() + "/start"
    >>> save(folder, {"params": params, "opt_state": state}, metadata={"seed": 7})
    >>> found = restore(folder, {"opt_state": state})
    >>> type(found.trees["opt_state"][0]).__name__, found.metadata
    ('ScaleByAdamState', {'seed': 7})
    >>> other = optax.sgd(0.1, momentum=0.9).init(params)
    >>> try:
    ...     restore(folder, {"opt_state": other})
    ... except CheckpointMismatch as error:
    ...     print(*str(error).partition("restored. ")[2].split("; "), sep="\n")
    opt_state: missing from the checkpoint: 0/trace/w
    opt_state: unexpected in the checkpoint: 0/count, 0/mu/w, 0/nu/w
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    schema = _read_schema(path)
    described = {tree_name: describe(target) for tree_name, target in targets.items()}
    said, abstract = [], {}
    for tree_name, wanted in described.items():
        if tree_name not in schema["trees"]:
            said.append(f"{tree_name}: not in the checkpoint, which has {list(schema['trees'])}")
            continue
        rows = schema["trees"][tree_name]
        said += differences(tree_name, {row["name"]: row for row in rows}, wanted)
        if not said:
            abstract[tree_name] = _abstract(rows, wanted)
    if said:
        raise CheckpointMismatch(
            f"the checkpoint {path} does not fit the target, and nothing was restored. "
            + "; ".join(said)
        )
    arrays = _read_arrays(path, {name: leaves for name, leaves in abstract.items() if leaves})
    trees = {}
    for tree_name, target in targets.items():
        rows = {}
        for number, row in enumerate(schema["trees"][tree_name]):
            value = _checked(
                arrays.get(tree_name, {}).get(str(number)), row, f"{path}: {tree_name}"
            )
            rows[row["name"]] = (value, row)
        leaves = []
        for name, (leaf, _) in described[tree_name].items():
            value, row = rows[name]
            leaves.append(place(f"{tree_name}/{name}", value, row, leaf))
        trees[tree_name] = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return Restored(trees, schema["metadata"])


def _checked(value: Any, row: Mapping[str, Any], where: str) -> Any:
    """What was read, or made anew if it has no entries; raises if its bytes have changed."""
    if value is None:
        shape, dtype = stored_form(row)
        value = np.zeros(shape, dtype)
    host = on_host(value)
    if isinstance(host, np.ndarray) and row["crc32"] not in (None, checksum(host)):
        raise DamagedCheckpoint(f"{where}/{row['name']} does not match its checksum")
    return value


def _abstract(rows: list[dict[str, Any]], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What Orbax is asked for: NumPy, or arrays in place where a target spans processes."""
    asked: dict[str, Any] = {}
    for number, row in enumerate(rows):
        shape, dtype = stored_form(row)
        if 0 in shape:
            continue
        sharding = sharding_of(wanted[row["name"]][0])
        if sharding is not None and not sharding.is_fully_addressable and "key" not in row:
            asked[str(number)] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        else:
            asked[str(number)] = np.broadcast_to(np.zeros((), dtype), shape)
    return asked


def _read_arrays(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    if not abstract:
        return {}
    try:
        return _orbax().load_checkpointables(path, abstract)
    except Exception as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({_first_line(error)})") from error
