"""The schema of a checkpoint: what every leaf is called, what it is, and what it adds up to."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import path_name
from optimkit.protocols import PyTree

SCHEMA_VERSION = 1
"""Version of the schema written now; older ones stay readable."""

_SHOWN = 6  # leaves that a message names before it counts the rest


class CheckpointError(Exception):
    """A checkpoint cannot be restored."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint is whole, but holds other leaves than the target."""


class DamagedCheckpoint(CheckpointError):
    """Files of the checkpoint are missing, cut off or changed."""


# ---------------------------------------------------------------------------------------------
# Leaves
# ---------------------------------------------------------------------------------------------


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _owner(tree: PyTree, path: tuple[Any, ...]) -> str:
    """The name of the innermost NamedTuple around a leaf: Adam's ``mu`` is not AdaBelief's."""
    node, owner = tree, ""
    for key in path:
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            owner = type(node).__name__
        if key is path[-1]:
            break
        try:
            if isinstance(key, jax.tree_util.GetAttrKey):
                node = getattr(node, key.name)
            else:
                node = node[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
        except (AttributeError, LookupError, TypeError):
            break
    return owner


def describe(tree: PyTree) -> dict[str, tuple[Any, dict[str, Any]]]:
    """``{name: (leaf, {"shape", "dtype", "in"})}``.

    Raises:
      TypeError: for a leaf that is neither an array nor a number.
      ValueError: if two leaves have one name.
    """
    leaves: dict[str, tuple[Any, dict[str, Any]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        known = leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)
        if isinstance(known.dtype, np.dtype) and known.dtype.kind in "OSUMm":
            raise TypeError(
                f"leaf {name!r} is a {type(leaf).__name__}: only arrays and numbers can be saved "
                "in a tree; put the rest into metadata"
            )
        if name in leaves:
            raise ValueError(f"two leaves are called {name!r}: rename one, so that both are found")
        facts = {"shape": list(known.shape), "dtype": str(known.dtype), "in": _owner(tree, path)}
        leaves[name] = (leaf, facts)
    return leaves


def checksum(array: np.ndarray) -> int:
    """CRC-32 of the bytes: Orbax's own files do not notice a changed one."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def on_host(leaf: Any) -> Any:
    """The leaf as NumPy; an array spread over several processes as it is."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return leaf
    return np.asarray(leaf)


def sharding_of(target: Any) -> Any:
    """Where a restored array goes; None leaves it free to follow the others."""
    if isinstance(target, jax.Array) and not target.committed:
        return None
    return getattr(target, "sharding", None)


def place(name: str, value: Any, facts: Mapping[str, Any], target: Any) -> Any:
    """A restored array in the form of its target."""
    if isinstance(target, np.generic):
        return value[()]
    if isinstance(target, np.ndarray):
        return np.array(value)
    if not hasattr(target, "dtype"):
        return type(target)(value.item())
    if isinstance(value, jax.Array):
        return value
    if "key" in facts:
        value = jax.random.wrap_key_data(jnp.asarray(value), impl=facts["key"])
    placed = jax.device_put(value, sharding_of(target))
    if str(placed.dtype) != facts["dtype"]:
        raise CheckpointMismatch(f"{name} is {facts['dtype']}: switch on jax_enable_x64")
    return placed


# ---------------------------------------------------------------------------------------------
# Writing a schema, and comparing with one
# ---------------------------------------------------------------------------------------------


def prepare(trees: Mapping[str, PyTree], metadata: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """What is written: arrays by tree and number, and the schema."""
    arrays: dict[str, dict[str, Any]] = {}
    schema: dict[str, Any] = {"version": SCHEMA_VERSION, "metadata": dict(metadata or {})}
    schema["trees"] = {}
    for tree_name, tree in trees.items():
        if not re.fullmatch(r"[A-Za-z]\w*", tree_name) or tree_name == "metrics":
            raise ValueError(f"a tree needs a plain name other than 'metrics', got {tree_name!r}")
        rows = []
        for number, (name, (leaf, facts)) in enumerate(describe(tree).items()):
            row = {"name": name, **facts, "crc32": None}
            if _is_key(leaf):
                row["key"] = str(jax.random.key_impl(leaf))
            value = on_host(leaf)
            if isinstance(value, np.ndarray):
                row["crc32"] = checksum(value)
            if value.size:  # Orbax refuses arrays without entries; the schema is enough for them
                arrays.setdefault(tree_name, {})[str(number)] = value
            rows.append(row)
        schema["trees"][tree_name] = rows
    try:
        schema = json.loads(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain JSON: {error}") from None
    return arrays or {"empty": {"0": np.zeros(1)}}, schema


def schema_checksum(schema: Mapping[str, Any]) -> int:
    """CRC-32 of the schema itself, so that a changed name is not taken for another chain."""
    return zlib.crc32(json.dumps(schema, sort_keys=True).encode())


def stored_form(row: Mapping[str, Any]) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype in which a leaf lies on disk."""
    if "key" in row:
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=row["key"])))
        return (*row["shape"], *data.shape), data.dtype
    return tuple(row["shape"]), jnp.dtype(row["dtype"])


def _listed(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def differences(tree: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What keeps a saved tree from fitting its target, in words."""
    said = []
    if missing := [name for name in wanted if name not in saved]:
        said.append(f"{tree}: missing from the checkpoint: {_listed(missing)}")
    if unexpected := [name for name in saved if name not in wanted]:
        said.append(f"{tree}: unexpected in the checkpoint: {_listed(unexpected)}")
    other = []
    for name in wanted.keys() & saved.keys():
        have, want = saved[name], wanted[name][1]
        words = [f"{x['dtype']} {tuple(x['shape'])}" for x in (have, want)]
        if words[0] == words[1]:
            words = [f"part of {x['in'] or 'no NamedTuple'}" for x in (have, want)]
        if words[0] != words[1]:
            other.append(f"{name} is {words[0]} there and {words[1]} here")
    return said + ([f"{tree}: {_listed(sorted(other))}"] if other else [])
