"""What the layers of optimkit agree on: records, names and small interfaces.

Nothing here computes. A type or a name belongs in this module when two layers must agree on it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import optax

Array: TypeAlias = Any
"""A JAX or NumPy array of any shape; the docstrings give shapes."""

PyTree: TypeAlias = Any
"""Any tree of arrays that JAX can flatten."""

ScalarOrSchedule: TypeAlias = Any
"""A number, a 0-d array, or a function from the 0-based step count to a number."""

LeafSelector: TypeAlias = Any
"""``None``, a tree of bools, ``(path, leaf) -> bool``, or path patterns (see ``layout``)."""

Mask: TypeAlias = Any
"""optax's mask: a tree of bools or a function of the params; True means *decayed*."""

# ---------------------------------------------------------------------------------------------
# Names. They are an API: checkpoints and user code hold them, and a snapshot test pins them.
# ---------------------------------------------------------------------------------------------

STATE_FIELDS: Mapping[str, str] = {
    "count": "int32 scalar: how many updates have been made",
    "mu": "first moment, one array per parameter",
    "nu": "second moment, one array per parameter",
    "fast_mu": "first moment with a shorter memory than mu, one array per parameter",
    "nu_max": "largest second moment so far, one array per parameter, or None",
    "previous_gradient": "gradient of the update before, one array per parameter",
    "output_nu": "second moment per output channel: a parameter's shape with inputs of size one",
    "trace": "momentum accumulated without averaging, one array per parameter",
    "magnitude_sum": "running sum of |gradient|, or of a power of it, one array per parameter",
    "index": "positions of the entries kept, int32, in the place of the sparse leaf",
    "tracked_max": "running mean of the largest |gradient| entry, one f32 scalar per leaf",
    "norm_mean": "running mean of the gradient norm, one f32 scalar per leaf or one for the tree",
    "norm_mean_square": "running mean of the squared gradient norm, one f32 scalar per leaf or one",
    "norms": "global gradient norm of every step, f32 (total_steps,)",
    "effective_rank": "exponential of the entropy of the singular values, one a matrix, (n,)",
    "stable_rank": "squared Frobenius norm over squared spectral norm, one a matrix, (n,)",
    "spectral_decay": "exponent with which squared singular values fall, one a matrix, (n,)",
    "norm": "norm of the last update, one f32 scalar per leaf or one for the tree",
    "last_update": "the last update before its rate, one array per parameter",
    "factor": "number that multiplies the update, one f32 scalar per leaf or one for the tree",
    "seen": "whether anything has been stored yet, one bool scalar per leaf or one for the tree",
    "target_norm": "norm that a projection returns to: one f32 scalar per leaf, or one per channel",
    "direction_norm": "norm of a direction vector, with the sign of its length, one per row",
    "direction_state": "state of what steps the directions of the rows of a weight",
    "magnitude_state": "state of what steps the lengths of the rows of a weight",
    "alignment": "sum of the products of successive updates, one scalar",
    "learning_rate": "the rate that the last update used",
    "scale": "factor on the next update, one scalar",
    "max_learning_rate": "the largest rate used so far, one scalar",
    "beta": "momentum coefficient that the last update chose, one scalar per leaf or one in all",
    "plane_value": "height of the memory's plane at the parameters, one scalar, or None",
    "b1": "weight that the last update gave to the average, one scalar",
    "z": "base sequence of schedule-free methods, one array per parameter",
    "average": "running average of the parameters, one array per parameter, or None",
    "weight_sum": "sum of the weights of a running average, one scalar",
    "hyperparams": "injected hyperparameters by name",
    "hyperparams_states": "states of the schedules that drive injected hyperparameters",
    "latest": "average of the last full window, one array per parameter",
    "projector": "basis (side, rank) that a leaf is projected on, in its place, or a scalar zero",
    "output_projector": "the same for the outputs, where both sides are projected, or None",
    "sketch": "directions (side, columns) of a task's gradients, each as long as it is frequent",
    "history": "orthonormal directions (side, columns) that earlier tasks use, then zero columns",
    "history_count": "how many directions earlier tasks use, one int32 scalar per leaf",
    "threshold": "share of energy that decides which directions are kept, one scalar",
    "residual_state": "state of what sees that part of a gradient that is not projected, or None",
    "masks": "which entries are active, bool in a sparse leaf's place, one True for a dense leaf",
    "fired": "which entries were ever active, like masks, or None",
    "inner_state": "state of the wrapped transformation",
    "averager_state": "state of the averager beside the wrapped transformation",
    "combiner_state": "state of the gradient combiner in front of the wrapped transformation",
    "absmax": "largest magnitude of each block of an encoded moment, in the moment's place",
    "gradient_mean": "part of a mean of gradients gathered so far, one array per parameter",
    "metrics": "telemetry scalars by name, see TELEMETRY_KEYS",
    "inverse_inputs": "inverse factor of a layer's inputs, (inputs, inputs); its row at the bias",
    "inverse_outputs": "inverse factor of a layer's outputs, (outputs, outputs)",
    "reset_inputs": "whether inverse_inputs starts anew at the next refresh, bool",
    "reset_outputs": "whether inverse_outputs starts anew at the next refresh, bool",
    "gamma": "radius within which the gradient is taken as linear, one scalar",
    "solves": "int32 scalar: linear systems solved so far",
    "momentum": "momentum coefficient that the last measurement chose, one scalar",
    "lambda_max": "largest Ritz value of the last measurement, one scalar",
    "lambda_min": "smallest Ritz value of the last measurement, one scalar",
    "switched": "whether the second of two transformations runs, one bool scalar",
    "first_state": "state of the transformation that runs before the switch",
    "second_state": "state of the transformation that runs after the switch",
    "criterion_state": "state of the rule that decides on a switch",
    "loss_mean": "running mean of the loss, one scalar",
    "loss_mark": "running mean of the loss when the window began, one scalar",
    "best_decrease": "largest relative decrease of the loss over a window, one scalar",
    "slow_windows": "int32 scalar: windows in a row over which the loss hardly fell",
    "dissimilarity": "second moment of the dissimilarity of the task gradients, one scalar",
    "task_cosines": "cosines between the tasks' gradients in the last update, (K, K)",
    "task_weights": "weights of the tasks, or the logits that they are made of, (K,)",
    "sign": "sign of the last gradient, int8, one array per parameter",
    "flips": "how often the sign changed in this window, int32, one array per parameter",
    "disorder": "share of steps in the last window at which the sign changed",
    "frozen": "whether a gradient rests, one bool per leaf or per entry",
    "task_sum": "gradients of a window of calls added up, stacked by task",
    "winners": "numbers of the tasks that won the last conflicts, the newest last, int32",
    "initial_losses": "losses of the tasks that later ones are compared with, (K,)",
}
"""Every field name that a state of optimkit may have, with its meaning."""

COUNT_FIELDS: frozenset[str] = frozenset({"count"})
"""Fields that hold step counts; ``momentum_reset`` restarts these and nothing else."""

PARAMETER_FIELDS: frozenset[str] = frozenset(
    {
        "z",
        "average",
        "latest",
        "inverse_inputs",
        "inverse_outputs",
        "direction_norm",
        "sketch",
        "history",
    }
)
"""Fields that hold parameters, their norms, inverses or directions: no moment, so never reset to
zero and not stored in 16 bits unless named."""

EXTRA_ARGS: Mapping[str, str] = {
    "value": "loss at the current parameters, scalar",
    "grad": "gradient before any preconditioning, tree like the parameters",
    "snr_scale": "share of signal in the gradient, scalar; see optimkit.gradients.gradient_snr",
    "hg": "the Hessian times the gradient, tree like the parameters",
    "value_fn": "loss closure: params -> scalar",
    "global_count": "0-based step count that no wrapper has restarted",
    "global_update": "last round's change of the global model, tree like the parameters",
    "task_losses": "one loss per task, shape (K,)",
    "losses": "one loss a task, shape (K,); see optimkit.multitask.gradnorm",
    "key": "random key of this update; see optimkit.multitask.pcgrad",
    "order": "in which order tasks meet, int (K, K); see optimkit.multitask.pcgrad",
    "reference_grads": "a gradient that steers the gradient, tree like the parameters",
    "grad_fn": "gradient closure: params -> tree like the parameters",
    "hvp_fn": "product closure: (params, v) -> the Hessian times v, or an approximation of it",
    "layer_stats": "mean input and summed output gradient by layer, see scale_by_mkor",
    "first_layer_inputs": "the array that enters the first layer, see tract_precondition",
    "first_layer_gram": "(second moment of those inputs, number of rows)",
}
"""Names under which extra keyword arguments travel through ``update``."""

TELEMETRY_KEYS: Mapping[str, str] = {
    "learning_rate": "rate used by the last update",
    "gradient_norm": "global l2 norm of the incoming gradient",
    "update_norm": "global l2 norm of the outgoing update",
    "clip_fraction": "fraction of entries that the last update clipped",
    "spike_count": "entries called spikes so far",
    "skipped_steps": "updates refused by a guard so far",
    "skipped_spikes": "those of them whose gradient was finite, but too large",
    "consecutive_skips": "updates refused by a guard since it last let one through",
    "skip_limit_reached": "1 once a guard has refused its limit of updates in a row, else 0",
    "momentum_resets": "times that a guard returned the moments to their start",
    "task_similarity": "mean pairwise similarity of the task gradients",
    "min_cosine": "smallest cosine between the gradients of two tasks; 1 for a single task",
    "conflict_fraction": "share of the pairs of tasks whose gradients have a negative cosine",
    "resolved_pairs": "conflicts between two tasks that the last combination resolved",
    "norms_equalized": "1 if the last combination gave every task the mean norm, else 0",
}
"""Names that a state's ``metrics`` field may hold."""


class Telemetry(Protocol):
    """A state that reports: its ``metrics`` maps TELEMETRY_KEYS to f32 scalars."""

    metrics: Mapping[str, Array]


# ---------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------


class MatrixAxes(NamedTuple):
    """Which axes of a leaf are batch, inputs and outputs: how it is seen as a stack of matrices.

    A Dense kernel ``(in, out)`` is ``MatrixAxes((), (0,), (1,))``; a Conv kernel
    ``(h, w, in, out)`` is ``MatrixAxes((), (0, 1, 2), (3,))``; an attention kernel
    ``(d, heads, head_dim)`` is ``MatrixAxes((), (0,), (1, 2))``; a layer scanned over axis 0 adds
    that axis to ``batch``.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


# ---------------------------------------------------------------------------------------------
# Several gradients -> one
# ---------------------------------------------------------------------------------------------


class GradientCombiner(NamedTuple):
    """Turns one gradient per task into one gradient.

    ``init(params, num_tasks) -> state``; ``update(task_grads, state, params=None, **extra) ->
    (grads, state)``. Every leaf of ``task_grads`` has a leading axis of ``num_tasks``; ``grads``
    has the structure and shapes of the parameters.
    """

    init: Callable[[PyTree, int], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------

Kind: TypeAlias = Literal["recipe", "piece", "wrapper", "schedule", "combiner"]
Rule: TypeAlias = Literal[
    "state",
    "finite",
    "dtype",
    "compile",
    "compose",
    "trees",
    "bad_input",
    "sharding",
    "restart",
    "fidelity",
]

RULES: Mapping[Rule, str] = {
    "state": "state is named, parameter-shaped where it belongs to a parameter, and type-stable",
    "finite": "no NaN from finite input, and the method recovers afterwards",
    "dtype": "f32 or better inside, the parameter's dtype outside, hyperparameters never below f32",
    "compile": "a second step, or a new value of a traced argument, compiles nothing",
    "compose": "works inside chain, masked, partition, MultiSteps, scan, vmap, donation",
    "trees": "dicts, tuples, modules, empty trees, None, 0-d and 0-size leaves",
    "bad_input": "wrong input raises at once and names what is wrong",
    "sharding": "sharded parameters give the single-device result",
    "restart": "saved and restored state continues bit for bit",
    "fidelity": "recorded trajectories of the authors' code are reproduced",
}
"""The ten rules of the contract suite, by short name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What the catalog, the contract suite and the tables know about one public factory.

    The file that defines a factory ends with ``RECORD = Method(...)``, or with
    ``RECORDS = (Method(...), ...)`` where it defines several.

    Attributes:
      factory: the public callable; the record's name is its ``__name__``.
      kind: ``recipe`` (a paper's whole method), ``piece`` (a link of a chain), ``wrapper`` (takes
        ``inner``), ``schedule`` or ``combiner``.
      summary: one line for tables.
      example: keyword arguments of a small working instance; the contract suite builds it. A value
        that must be made anew (an ``inner`` transformation) is given as a zero-argument callable
        under ``example_made``.
      example_made: keyword arguments whose values are made by calling them.
      extras: ``(params, grads) -> dict`` of the extra arguments that ``update`` needs, if any.
      traced: arguments that may be tracers, arrays or injected; changing them never recompiles.
      static: arguments that shape the program or the state and are fixed at construction.
      needs: what ``update`` must be given beside the gradient: ``"params"``, names of extras.
      position: where the factory belongs in a chain.
      communication: on sharded parameters: ``none`` (elementwise), ``reduce`` (norms and sums of a
        leaf or the tree), ``matrix`` (whole matrices travel), ``gather``.
      response: ``bounded`` when the update stays bounded however large the gradient is (then 1e30
        must stay finite too), ``proportional`` when it grows with it.
      differentiable: whether a gradient through one update is finite and meant to be used.
      state_bytes: bytes of optimizer state per f32 parameter.
      moved_bytes: bytes that one donated f32 step must move per parameter at least: the gradient,
        the parameter and the state read once, the parameter and the state written once.
      tolerance: rule -> relative tolerance where it differs from the suite's own.
      exempt: rule, or ``"rule:dtype"``, -> reason, for rules that this method cannot keep; each is
        a strict expected failure, and the suite fails when one starts to pass.
      status: ``verified`` against the authors' code, or ``provisional`` where a primary source
        could not be read in full.
      paper: citation with arXiv number.
      reference: repository@commit:file of the code that the goldens were recorded from.
      licence: licence of that reference.
    """

    factory: Callable[..., Any]
    kind: Kind
    summary: str
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    example_made: Mapping[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    extras: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None
    traced: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    position: Literal["alone", "first", "middle", "last", "any"] = "any"
    communication: Literal["none", "reduce", "matrix", "gather"] = "none"
    response: Literal["bounded", "proportional"] = "proportional"
    differentiable: bool = False
    state_bytes: float = 0.0
    moved_bytes: float = 12.0
    tolerance: Mapping[Rule, float] = dataclasses.field(default_factory=dict)
    exempt: Mapping[str, str] = dataclasses.field(default_factory=dict)
    status: Literal["verified", "provisional"] = "verified"
    paper: str = ""
    reference: str = ""
    licence: str = ""

    @property
    def name(self) -> str:
        """The public name of the factory."""
        return self.factory.__name__

    def build(self, **overrides: Any) -> Any:
        """Makes the example instance, with some arguments replaced."""
        made = {name: make() for name, make in self.example_made.items() if name not in overrides}
        return self.factory(**{**self.example, **made, **overrides})


def record_of(factory: Callable[..., Any]) -> Method | None:
    """The record of a public factory, found in the module that defines it; None if it has none."""
    module = sys.modules.get(getattr(factory, "__module__", None) or "")
    records = getattr(module, "RECORDS", None) or (getattr(module, "RECORD", None),)
    return next((r for r in records if r is not None and r.factory is factory), None)


GradientTransformation: TypeAlias = optax.GradientTransformationExtraArgs
"""What every factory of optimkit returns: it accepts, and passes on, unknown extra arguments."""


def transformation(
    init: Callable[..., Any], update: Callable[..., tuple[PyTree, Any]]
) -> GradientTransformation:
    """An optax transformation from its two functions; ``update`` takes ``**extra``."""
    return optax.GradientTransformationExtraArgs(init, update)
