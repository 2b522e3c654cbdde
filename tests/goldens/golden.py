"""One recorded trajectory: the file, what it names, and how far a result is from it.

Files ``<method>__<case>.npz`` hold numbers that the authors' programs produced, and ``meta``, a
JSON string that says which program, which arguments, and how ours is called.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import optimkit as ok

FOLDER = Path(__file__).parent

TOLERANCES: dict[str, float] = {
    "orthogonal_gradient": 1e-7,  # the reference takes the backward part from a difference
    "gcond__bf16_unmodified_one_iter": 3e-2,  # the reference's buffers
    "gcond": 1e-5,  # the reference computes in float32
    # SLSQP stops at 1e-6 of its objective; ours, by the duality gap, at 1e-8
    "pcgrad_cagrad_gradnorm__cagrad_two_tasks": 1e-3,
    "pcgrad_cagrad_gradnorm__cagrad_four_tasks_c04": 4e-3,
    "weight_refactorization": 1e-5,  # float32 SVD
    "adan__clip": 1e-6,  # the reference adds up the norm in float32
    "autolrs": 1e-3,  # Nelder-Mead fits
    "quantized_state": 5e-3,  # a twentieth of a rate; one flipped code is 4e-3 of all codes
    "quantized_state__codebook": 1e-6,  # recorded in float32
    "fake_quant_4bit__bfloat16": 2e-2,
    "fake_quant_4bit__float32": 1e-6,
    "spectral_diagnostics": 1e-8,  # the reference fits with float32 weights
    "spectral_diagnostics__dynamics_stride10": 1e-4,  # the reference computes in float32
    "spectral_diagnostics__dynamics_stride4": 1e-4,
    "spectral_diagnostics__heldout_dynamics_stride7": 1e-4,
    "stability_gap": 1e-6,  # its averages are float32
    "zeroth_order__mezo_decay_f32": 1e-4,  # float32; a small difference of losses over 2 eps
}
"""Tolerances other than 1e-9, by file or by method."""


class DamagedGolden(ValueError):
    """A golden that cannot be read or lacks what it must hold."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """One recorded case."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def method(self) -> str:
        return self.name.split("__")[0]

    @property
    def factory_names(self) -> list[str]:
        named = self.meta["optimkit"]["factory"]
        named = named if isinstance(named, list) else re.split(r"[|/,]", named)
        return [part.strip() for part in named]

    @property
    def tolerance(self) -> float:
        return TOLERANCES.get(self.name, TOLERANCES.get(self.method, 1e-9))

    @property
    def kind(self) -> str:
        tops = {key.split("/")[0] for key in self.arrays}
        if {"params0", "grads", "params"} <= tops:
            return "trajectory"
        if {"step", "value"} <= tops:
            return "schedule"
        return "combiner" if self.tree("task_grads") else "other"

    def tree(self, top: str) -> dict[str, np.ndarray]:
        """The arrays below ``top/``, by leaf path."""
        return {k[len(top) + 1 :]: v for k, v in self.arrays.items() if k.startswith(top + "/")}

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments of our factory, with tables, masks and arrays put in their places."""
        return {k: self._value(v) for k, v in self.meta["optimkit"]["kwargs"].items()}

    def _value(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if set(value) == {"table"}:
            table = self.arrays[value["table"]]
            return lambda count: jnp.asarray(table)[jnp.clip(count, 0, len(table) - 1)]
        if set(value) == {"array"}:
            return self.arrays[value["array"]]
        if set(value) == {"masks"}:
            masks = self.tree("mask")
            return lambda params, refresh, key: nest(
                {name: jnp.asarray(masks[name])[refresh] if name in masks else None
                 for name in self.tree("params0")}
            )  # fmt: skip
        return value


def load(path: Path) -> Golden:
    """Reads one file.

    Raises:
      DamagedGolden: if it cannot be read, is truncated, or says too little of itself.
    """
    try:
        # From memory, so that a truncated archive leaves no file open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        meta = json.loads(str(arrays.pop("meta")))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DamagedGolden(f"{path.name}: cannot be read: {error}") from error
    missing = [key for key in ("optimkit", "reference", "dtype") if key not in meta]
    missing += [key for key in ("factory", "kwargs") if key not in meta.get("optimkit", {})]
    if missing or not arrays:
        raise DamagedGolden(f"{path.name}: lacks {missing or 'arrays'}")
    return Golden(path.stem, meta, arrays)


@functools.cache
def all_goldens() -> dict[str, Golden]:
    """Every golden in this folder, by name."""
    return {path.stem: load(path) for path in sorted(FOLDER.glob("*.npz"))}


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"a/b": x}`` as ``{"a": {"b": x}}``."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of ``nest``."""
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        flat |= flatten(node, f"{prefix}{key}/") if isinstance(node, dict) else {prefix + key: node}
    return flat


PLACES = ("", "multitask", "diagnostics", "gradients", "federated", "controllers", "nn",
          "matrices", "schedules", "transforms", "wrappers", "checkpoint")  # fmt: skip
"""Where a factory that a golden names may live, the flat namespace first."""


def resolve(name: str) -> Any:
    """The public object that a golden calls ``name``.

    Raises:
      LookupError: if the public API does not have it.
    """
    if name.startswith("optax."):
        module_name, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module_name), attribute)
    for place in PLACES:
        try:
            module = importlib.import_module(f"optimkit.{place}") if place else ok
        except ModuleNotFoundError:
            continue
        # Of a whole family, "name_*", the first stands for all.
        for found in (name, *fnmatch.filter(sorted(vars(module)), name)):
            if hasattr(module, found):
                return getattr(module, found)
    raise LookupError(f"optimkit has no public {name!r}")


def relative_error(got: Any, recorded: np.ndarray, origin: np.ndarray | None = None) -> float:
    """The largest difference, over how far the recording moved from ``origin`` (default zero)."""
    got, recorded = np.asarray(got, np.float64), np.asarray(recorded, np.float64)
    if got.shape != recorded.shape:
        raise ValueError(f"shape {got.shape} against the recorded {recorded.shape}")
    if recorded.size == 0:
        return 0.0
    moved = np.max(np.abs(recorded - (0 if origin is None else origin[None])))
    difference = np.max(np.abs(got - recorded))
    if np.isnan(difference):
        return float("inf")
    return 0.0 if difference == 0 else float(difference / moved) if moved else float("inf")


def before_each_step(golden: Golden, params: Any) -> dict[str, Any]:
    """Parameters before every step, by leaf: the recording's start, then each step's result."""
    origin = golden.tree("params0")
    return {
        name: jnp.concatenate([jnp.asarray(origin[name])[None], after[:-1]])
        for name, after in flatten(params).items()
    }
