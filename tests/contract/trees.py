"""The parameter trees and gradient sequences that every method is run on."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

DTYPES = ("float16", "bfloat16", "float32", "float64")

SHAPES = {
    "conv": {"kernel": (2, 2, 2, 3)},
    "dense": {"kernel": (4, 3), "bias": (3,)},
    "query": {"kernel": (4, 2, 2)},
    "embed": {"embedding": (5, 4)},
    "head": {"kernel": (3, 4)},
    "norms": ({"scale": (3,)}, {"scale": (4,)}),
    "temperature": (),
    "nothing": {"kernel": (0, 3)},
}


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def random_like_shapes(seed: int, dtype: str, shapes: Any = SHAPES) -> Any:
    """A tree of standard normal leaves; ``None`` stands among them."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=is_shape
    )
    return {**tree, "frozen": None}


def sizes(dtype: str, response: str) -> dict[str, float]:
    """The gradient magnitudes a method must survive, by name."""
    info = jnp.finfo(dtype)
    largest = 6e4 if dtype == "float16" else 1e15
    named = {
        "zero": 0.0,
        "subnormal": float(info.smallest_subnormal),
        "1e-7": 1e-7,
        "one": 1.0,
        f"{largest:g}": largest,
    }
    if response == "bounded" and dtype != "float16":
        named["1e30"] = 1e30
    return named


NORMAL, EXTREME, RECOVERY = 2, 3, 6
"""Steps of ordinary size, of the extreme size, and of ordinary size again."""


def gradient_sequence(seed: int, dtype: str, size: float | list[float]) -> Any:
    """Gradients with a leading step axis; a list of sizes is mixed entry by entry."""
    rng = np.random.default_rng(seed)
    options = np.atleast_1d(np.asarray(size, np.float64))

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        steps = NORMAL + EXTREME + RECOVERY
        values = rng.normal(size=(steps, *shape))
        signs = np.sign(rng.normal(size=(EXTREME, *shape)))
        values[NORMAL : NORMAL + EXTREME] = signs * rng.choice(options, size=(EXTREME, *shape))
        return jnp.asarray(values.astype(jnp.dtype(dtype)))

    tree = jax.tree.map(leaf, SHAPES, is_leaf=is_shape)
    return {**tree, "frozen": None}


# Trees of other kinds, all with the same two leaves.


class Layer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array | None


class NnxLayer(nnx.Module):
    def __init__(self, kernel: jax.Array):
        self.kernel = nnx.Param(kernel)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    kernel: jax.Array


def other_trees(dtype: str) -> dict[str, Any]:
    """Small trees of every container that users keep parameters in."""
    kernel = jnp.full((4, 3), 0.5, dtype)
    return {
        "dict": {"kernel": kernel},
        "tuple": (kernel, (kernel,)),
        "dataclass": Record(kernel),
        "equinox": Layer(kernel, None),
        "nnx.State": nnx.state(NnxLayer(kernel), nnx.Param),
        "array": kernel,
        "scalar": jnp.ones((), dtype),
        "none": {"a": None, "kernel": kernel},
        "empty": {},
        "zero size": {"kernel": jnp.zeros((0, 3), dtype)},
    }
