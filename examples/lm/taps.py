"""What MKOR wants of each projection: the mean of its inputs and the sum of its output gradients.

``TappedLinear`` hands out both as the gradients of two arrays of zeros, its taps. A model has taps
only if its optimizer wants them; without, it is the same program as ever.
"""

from __future__ import annotations

from typing import Any

from flax import nnx

from examples.lm.config import Config
from examples.lm.model import Linear
from optimkit import catalog
from optimkit.nn import Tap, TappedLinear, collect_layer_stats

DEFAULTS = {"skip": ("lm_head",)}
"""Keywords of an optimizer that wants statistics: the head has the vocabulary at one side."""


def wants_stats(config: Config) -> bool:
    """Whether the optimizer needs ``layer_stats`` in every update."""
    record = catalog.records("recipe").get(config.optimizer)
    return record is not None and "layer_stats" in record.needs


def linear_for(config: Config) -> Linear:
    """What makes the projections of the blocks, unless the caller has a choice of its own."""
    return TappedLinear if wants_stats(config) else nnx.Linear


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """The structure of a model, its parameters, and its taps: an empty tree if it has none."""
    graphdef, taps, params = nnx.split(model, Tap, ...)
    return graphdef, params, taps


def extras_of(tap_gradients: Any) -> dict[str, Any]:
    """The extra arguments of an update that come from the taps: none without taps."""
    stats = collect_layer_stats(tap_gradients)
    return {"layer_stats": stats} if stats else {}
