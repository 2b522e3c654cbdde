"""What an optimizer's state knows about the training: one flat dict of scalars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import named_leaves
from optimkit.numerics import max_abs, safe_div, tree_norm
from optimkit.protocols import STATE_FIELDS, Array, PyTree, ScalarOrSchedule

Path = tuple[str, ...]


class _Entry(NamedTuple):
    """One number found: what it is, in which state, and its value."""

    name: str
    path: Path
    value: Array


def _scalar(tree: PyTree) -> Array:
    return jnp.asarray(jax.tree.leaves(tree)[0])


def _largest(tree: PyTree) -> Array:
    return max_abs(jnp.stack([jnp.asarray(x) for x in jax.tree.leaves(tree)]))


FIELDS: Mapping[str, tuple[str, Callable[[PyTree], Array]]] = {
    "norm": ("norm", tree_norm),
    "norm_mean": ("norm_mean", tree_norm),
    "tracked_max": ("tracked_max", _largest),
    "mini_step": ("mini_step", _scalar),  # optax.MultiSteps
    "total_notfinite": ("skipped_steps", _scalar),  # optax.apply_if_finite
    "notfinite_count": ("consecutive_skips", _scalar),
}
"""State field -> name of the metric and how its leaves become one number."""

MATRIX_FIELDS = ("effective_rank", "stable_rank", "spectral_decay")
"""Fields that hold a number a matrix, and a 0-d array in the place of what is none."""

STEP_FIELDS = ("count", "gradient_step")
MOMENT_FIELDS = ("mu", "nu", "trace")


def _children(node: Any) -> Iterator[tuple[str, Any, bool]]:
    """``(name, child, is a field)`` of a container; nothing for an array."""
    fields: Any = getattr(node, "_fields", None)
    if isinstance(node, tuple) and fields is not None:
        yield from ((name, getattr(node, name), True) for name in fields)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        yield from ((f.name, getattr(node, f.name), True) for f in dataclasses.fields(node))
    elif isinstance(node, Mapping):
        yield from ((str(name), child, False) for name, child in node.items())
    elif isinstance(node, (tuple, list)):
        yield from ((str(index), child, False) for index, child in enumerate(node))


def _is_number(node: Any) -> bool:
    leaves = jax.tree.leaves(node)
    return not any(_children(node)) and len(leaves) == 1 and np.ndim(leaves[0]) == 0


def _named_values(field: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of ``metrics`` and ``hyperparams`` under the names that they are reported by."""
    for name, value in values.items():
        plain = field == "metrics" or name == "learning_rate"
        if jax.tree.leaves(value):
            yield name if plain else f"{field}/{name}", _scalar(value)


def _found(node: Any, path: Path, moments: bool) -> Iterator[_Entry]:
    for name, child, is_field in _children(node):
        if is_field and name in ("metrics", "hyperparams") and isinstance(child, Mapping):
            for key, value in _named_values(name, child):
                yield _Entry(key, path, value)
        elif is_field and name in STEP_FIELDS:
            yield _Entry("step", path, _scalar(child))
        elif is_field and name in FIELDS:
            if jax.tree.leaves(child):
                key, reduce = FIELDS[name]
                yield _Entry(key, path, reduce(child))
        elif is_field and name in MATRIX_FIELDS:
            for leaf, values in named_leaves(child):
                if np.ndim(values):
                    yield _Entry(f"{name}/{leaf}".rstrip("/"), path, jnp.mean(values))
        elif is_field and name in STATE_FIELDS and not name.endswith(("state", "states")):
            # Names inside a tree like the parameters are the model's, and mean nothing here.
            if moments and name in MOMENT_FIELDS:
                yield _Entry(f"{name}_norm", path, tree_norm(child))
            elif _is_number(child):
                yield _Entry(name, path, _scalar(child))
        else:
            yield from _found(child, (*path, name), moments)


def metrics(
    state: PyTree,
    params: PyTree | None = None,
    updates: PyTree | None = None,
    grads: PyTree | None = None,
    *,
    learning_rate: ScalarOrSchedule = None,
    moments: bool = False,
) -> dict[str, Array]:
    """Collects the numbers that an optimizer's state holds, at any depth, for a log.

    Args:
      state: any optimizer state: of a chain, ``named_chain``, ``partition``, ``masked``,
        ``MultiSteps``, ``inject_hyperparams``, a wrapper of optimkit.
      params: the parameters, for ``param_norm``.
      updates: what ``update`` returned, for ``update_norm``, and with ``params`` also
        ``update_ratio``, update norm over parameter norm.
      grads: the gradients, for ``gradient_norm``.
      learning_rate: the rate, or the schedule that the optimizer was made with: a rate that is a
        constant of the program stands in no state. A schedule is read at the last update's count.
      moments: report ``mu_norm``, ``nu_norm`` and ``trace_norm``, too, each of which reads the
        whole moment.

    Returns:
      Scalars by name: int32 for ``step`` and ``mini_step``, f32 for all else.

      =========================  ==================================================================
      ``step``                   the largest step count in the state
      ``learning_rate``          rate of the last update: injected, or kept by the method
      ``hyperparams/<name>``     every other injected hyperparameter
      ``gradient_norm``          global l2 norm of the gradient, also from ``skip_bad_steps``
      ``param_norm``             global l2 norm of the parameters; ``update_norm``, ``update_ratio``
      ``skipped_steps``          updates refused, by ``skip_bad_steps`` or ``optax.apply_if_finite``
      ``consecutive_skips``      of these, since an update was last let through
      ``norm``, ``norm_mean``    norms that a method keeps; those of single leaves as one l2 norm
      ``tracked_max``            the largest of a method's tracked maxima
      ``effective_rank/<leaf>``  of a matrix, also ``stable_rank/<leaf>`` and
                                 ``spectral_decay/<leaf>``: mean over those of a stack
      ``mini_step``              gradients accumulated so far by ``optax.MultiSteps``
      any key of ``metrics``     see ``optimkit.protocols.TELEMETRY_KEYS``: ``clip_fraction``,
                                 ``spike_count``, ``task_similarity`` and so on
      any scalar state field     see ``optimkit.protocols.STATE_FIELDS``: ``b1``, ``weight_sum``,
                                 ``max_learning_rate``, ``dissimilarity`` and so on
      =========================  ==================================================================

      Where several states report the same thing, each has its path added,
      ``learning_rate/inner_states/matrix/inner_state``; what was given as an argument keeps the
      plain name. Names depend on the structure alone: an optimizer gives the same ones at every
      step, and a state without a number gives no entry.

    Raises:
      ValueError: for a schedule, where no state holds a step count.

    Made for use inside a jitted step; sharded arrays are welcome. Under ``shard_map`` the norms
    are those of the device's own shard. For a state of several seeds, use it under ``jax.vmap``.

    >>> import optax, optimkit as ok
    >>> make = ok.inject_hyperparams(ok.lion)
    >>> tx = ok.skip_bad_steps(optax.chain(make(learning_rate=0.5), optax.identity()))
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> found = metrics(state, params, updates)
    >>> [found[name].item() for name in ("step", "learning_rate", "param_norm", "skipped_steps")]
    [1, 0.5, 5.0, 0.0]
    """
    entries = list(_found(state, (), moments))
    steps = [entry.value for entry in entries if entry.name == "step"]
    given: dict[str, Array] = {}
    if steps:
        given["step"] = jnp.max(jnp.stack(steps), axis=0)
    if learning_rate is not None:
        if callable(learning_rate):
            if not steps:
                raise ValueError("learning_rate is a schedule, but the state holds no step count")
            learning_rate = learning_rate(jnp.maximum(given["step"] - 1, 0))
        given["learning_rate"] = jnp.asarray(learning_rate)
    for name, tree in (("param_norm", params), ("update_norm", updates), ("gradient_norm", grads)):
        if tree is not None:
            given[name] = tree_norm(tree)
    if params is not None and updates is not None:
        given["update_ratio"] = safe_div(given["update_norm"], given["param_norm"])

    entries = [entry for entry in entries if entry.name != "step"]
    names = [entry.name for entry in entries]
    for entry in entries:
        alone = names.count(entry.name) == 1 and entry.name not in given
        key = entry.name if alone else "/".join((entry.name, *entry.path))
        given.setdefault(key, entry.value)
    whole = ("step", "mini_step")
    return {
        name: value.astype(jnp.int32 if name.split("/")[0] in whole else jnp.float32)
        for name, value in given.items()
    }
