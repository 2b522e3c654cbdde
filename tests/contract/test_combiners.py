"""Every combiner keeps the rules that make sense for stacked gradients.

A check is a function ``check(record, dtype)``; it sees a combiner, or a transformation that takes
stacked gradients, through ``Stacked``, which gives both the same two functions. Two broken
combiners at the end show that the checks can fail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimkit import catalog, protocols
from optimkit.layout import named_leaves
from optimkit.leaves import map_param_state
from optimkit.protocols import GradientCombiner, Method
from tests.contract import trees
from tests.contract.checks import (
    all_finite,
    assert_same_type,
    assert_trees_equal,
    dtype_mode,
    numeric_arguments,
    raises,
    state_classes,
)
from tests.exempt import marks_of

TASKS = 3

LEAVES = ("dense", "temperature", "nothing", "frozen")
"""What is kept of the suite's tree: a matrix, a vector, 0-d, 0-size and None leaves."""

TASKS_OF: dict[str, int] = {"orthogonal_gradient": 2, "freeze_low_disorder": 2}
"""Combiners of a fixed number of tasks, which refuse any other."""

ORDER_MATTERS: dict[str, str] = {
    "orthogonal_gradient": "the first gradient stays whole, the second is projected",
    "freeze_low_disorder": "the first gradient may be frozen, the second is not",
}
"""Combiner -> why its result depends on the order of the tasks."""

CHANGES_A_SINGLE_TASK: dict[str, str] = {
    "gcond": "momentum averages it",
    "cagrad": "the step in the ball round the mean gradient lengthens it",
}
"""Combiner -> why a single task's gradient does not pass unchanged."""


class Stacked(NamedTuple):
    """``init(params) -> state``; ``update(task_grads, state, params) -> (grads, state)``."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    is_combiner: bool


def tasks_of(record: Method) -> int:
    """How many tasks a combiner is run with."""
    return TASKS_OF.get(record.name, TASKS)


def built(record: Method, tasks: int | None = None, **overrides: Any) -> Stacked:
    """The record's example for so many tasks, with the extra arguments that it needs."""
    tasks = tasks_of(record) if tasks is None else tasks
    takes_tasks = "num_tasks" in inspect.signature(record.factory).parameters
    made = record.build(**({"num_tasks": tasks} if takes_tasks else {}), **overrides)
    is_combiner = isinstance(made, GradientCombiner)

    def init(params: Any) -> Any:
        return made.init(params, tasks) if is_combiner else made.init(params)

    def update(task_grads: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        needed = record.extras(params, task_grads) if record.extras else {}
        return made.update(task_grads, state, params, **needed, **extra)

    return Stacked(init, update, is_combiner)


def stack(per_task: list[Any], axis: int = 0) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=axis), *per_task)


def few(tree: Any) -> Any:
    return {name: tree[name] for name in LEAVES}


def parameters_of(dtype: str) -> Any:
    return few(trees.random_like_shapes(0, dtype))


def task_gradients(seed: int, dtype: str, tasks: int = TASKS) -> Any:
    """Normal gradients, with the norms of the tasks a factor 3 apart."""
    return stack(
        [
            jax.tree.map(
                lambda g, k=k: g * jnp.asarray(3.0**-k, g.dtype),
                few(trees.random_like_shapes(10 * seed + k, dtype)),
            )
            for k in range(tasks)
        ]
    )


def sequence(steps: int, dtype: str, tasks: int = TASKS) -> Any:
    return stack([task_gradients(seed, dtype, tasks) for seed in range(1, steps + 1)])


def scanned(stacked: Stacked, params: Any, task_grads: Any) -> tuple[Any, Any]:
    """All outputs, and the last state, of one update a leading entry."""

    def step(state: Any, grads: Any) -> Any:
        out, state = stacked.update(grads, state, params)
        return state, out

    state, outs = jax.lax.scan(step, stacked.init(params), task_grads)
    return outs, state


# -- the checks -------------------------------------------------------------------------------


def check_state(record: Method, dtype: str) -> None:
    params, grads = parameters_of(dtype), task_gradients(1, dtype, tasks_of(record))
    stacked = built(record)
    state = stacked.init(params)
    assert_same_type(jax.eval_shape(stacked.init, params), state, "init under eval_shape")
    out, after = jax.eval_shape(stacked.update, grads, state, params)
    assert_same_type(state, after, "state after update")
    assert jax.tree.structure(out) == jax.tree.structure(params)
    assert [x.shape for x in jax.tree.leaves(out)] == [x.shape for x in jax.tree.leaves(params)]
    for cls in state_classes(state):
        if cls.__module__.startswith("optimkit"):
            unknown = set(cls._fields) - set(protocols.STATE_FIELDS)
            assert not unknown, f"{cls.__name__}: fields {unknown} are not in STATE_FIELDS"
    for reporting in _with_metrics(state):
        unknown = set(reporting.metrics) - set(protocols.TELEMETRY_KEYS)
        assert not unknown, f"metrics {unknown} are not in TELEMETRY_KEYS"
    shapes = {name: leaf.shape for name, leaf in named_leaves(params)}

    def fits(name: str, leaf: Any) -> bool:
        allowed = ((), shapes[name], (tasks_of(record), *shapes[name]))
        assert leaf.shape in allowed, f"state of {name} has shape {leaf.shape}"
        return True

    map_param_state(stacked.init, fits, lambda leaf: False, state)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(buffers)) == len(buffers), "a buffer stands twice in the state: no donation"


def _with_metrics(state: Any) -> list[Any]:
    found = [state] if hasattr(state, "metrics") else []
    children = state if isinstance(state, tuple) else ()
    return found + [inner for child in children for inner in _with_metrics(child)]


def check_finite(record: Method, dtype: str) -> None:
    params = parameters_of(dtype)
    stacked = built(record)

    @jax.jit
    def run(task_grads: Any) -> Any:
        def step(state: Any, grads: Any) -> Any:
            out, state = stacked.update(grads, state, params)
            moved = jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(out)])
            return state, (all_finite((out, state)), moved)

        return jax.lax.scan(step, stacked.init(params), task_grads)[1]

    sizes = trees.sizes(dtype, record.response)
    every = {f"all tasks {name}": [size] * tasks_of(record) for name, size in sizes.items()}
    one = {f"one task {name}": [size, 1.0, 1.0][: tasks_of(record)] for name, size in sizes.items()}
    mixed = {"mixed": [list(sizes.values())] * tasks_of(record)}
    alive = np.asarray([leaf.size > 0 for leaf in jax.tree.leaves(params)])
    for seed, (name, per_task) in enumerate({**every, **one, **mixed}.items()):
        grads = [
            few(trees.gradient_sequence(10 * seed + k, dtype, size))
            for k, size in enumerate(per_task)
        ]
        fine, moved = run(stack(grads, axis=1))
        assert np.all(fine), f"{name}: not finite at steps {np.flatnonzero(~fine)}"
        recovered = np.asarray(moved)[-trees.RECOVERY :].any(axis=0)
        dead = np.flatnonzero(alive & ~recovered)
        assert not dead.size, f"{name}: leaves {dead} are zero for good"


def check_dtype(record: Method, dtype: str) -> None:
    params, grads = parameters_of(dtype), sequence(3, dtype, tasks_of(record))
    stacked = built(record)
    outs, state = jax.jit(lambda p, g: scanned(stacked, p, g))(params, grads)
    for name, leaf in named_leaves(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert jnp.finfo(leaf.dtype).bits >= 32, f"state leaf {name} is {leaf.dtype}"
    for (name, out), (_, given) in zip(named_leaves(outs), named_leaves(grads), strict=True):
        assert out.dtype == given.dtype, f"leaf {name} is {out.dtype}, given {given.dtype}"
    if dtype in ("float16", "bfloat16"):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
        exact, _ = jax.jit(lambda p, g: scanned(stacked, p, g))(*wide)
        info = jnp.finfo(dtype)
        largest = float(info.max)
        exact = jax.tree.map(lambda x: jnp.clip(x, -largest, largest), exact)
        assert_trees_equal(
            outs,
            exact,
            "computed in less than f32",
            rtol=2 * float(info.eps),
            atol=float(info.smallest_normal),
        )


def check_compile(record: Method, dtype: str) -> None:
    params, grads = parameters_of(dtype), task_gradients(1, dtype, tasks_of(record))
    parameters = inspect.signature(record.factory).parameters
    unlisted = set(parameters) - set(record.traced) - set(record.static)
    assert not unlisted, f"arguments {sorted(unlisted)} are neither traced nor static"
    values = numeric_arguments(record)
    traces = 0

    @jax.jit
    def step(values: Any, grads: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        return built(record, **values).update(grads, state, params)

    first = built(record).init(params)
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    out, state = step(arrays, grads, first)
    step({name: value * (1 - 2.0**-10) for name, value in arrays.items()}, grads, state)
    assert traces == 1, f"a second step, with other values of {sorted(values)}, compiled again"
    concrete, _ = jax.jit(built(record).update)(grads, first, params)
    assert_trees_equal(out, concrete, "traced against concrete", rtol=1e-4, atol=1e-6)


def check_compose(record: Method, dtype: str) -> None:
    """jit, eager, scan, vmap over seeds, donation and unknown extra arguments agree."""
    params, grads = parameters_of(dtype), sequence(2, dtype, tasks_of(record))
    stacked = built(record)

    def loop(update: Any) -> Any:
        state, out = stacked.init(params), None
        for index in range(2):
            out, state = update(jax.tree.map(lambda g, i=index: g[i], grads), state, params)
        return out

    close = {"rtol": 1e-5, "atol": 1e-6}
    eager = loop(lambda g, s, p: stacked.update(g, s, p, unknown=1))
    donating = loop(jax.jit(stacked.update, donate_argnums=1))
    assert_trees_equal(donating, eager, "jit with a donated state", **close)
    batch = jax.tree.map(lambda g: jnp.stack([g, -2 * g]), grads)
    outs, _ = jax.jit(jax.vmap(lambda g: scanned(stacked, params, g)))(batch)
    assert_trees_equal(jax.tree.map(lambda x: x[0, 1], outs), eager, "vmap and scan", **close)


def check_trees(record: Method, dtype: str) -> None:
    stacked = built(record)
    for name, params in trees.other_trees(dtype).items():
        task_grads = stack(
            [jax.tree.map(lambda p, k=k: k * p, params) for k in range(tasks_of(record))]
        )
        state = stacked.init(params)
        out, after = stacked.update(task_grads, state, params)
        assert jax.tree.structure(out) == jax.tree.structure(params), name
        assert_same_type(state, after, f"state for a tree of kind {name}")
        for x, p in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True):
            assert x.shape == p.shape, name
            assert x.dtype == p.dtype, name
        assert all_finite((out, after)), name


def check_bad_input(record: Method, dtype: str) -> None:
    params = {"layer": {"kernel": jnp.ones((4, 3), dtype), "bias": jnp.ones((3,), dtype)}}
    good = stack([params] * tasks_of(record))
    stacked = built(record)
    state = stacked.init(params)

    def with_kernel(kernel: Any) -> Callable[[], Any]:
        tree = {"layer": {**good["layer"], "kernel": kernel}}
        return lambda: stacked.update(tree, state, params)

    kernel = good["layer"]["kernel"]
    for wrong in (kernel[:-1], kernel[0], jnp.concatenate([kernel, kernel]), kernel[:1]):
        raises(
            with_kernel(wrong),
            (ValueError,),
            "layer/kernel",
            str(wrong.shape),
            str(tasks_of(record)),
        )
    raises(with_kernel(kernel[:, :1]), (ValueError,), "layer/kernel", str((tasks_of(record), 1, 3)))
    raises(with_kernel(jnp.ones((), dtype)), (ValueError,), "layer/kernel", "()")
    raises(with_kernel(kernel.astype(jnp.int32)), (TypeError,), "layer/kernel", "int32")
    raises(with_kernel(kernel.astype(jnp.complex64)), (TypeError,), "layer/kernel", "complex")
    less = {"layer": {"kernel": kernel}}
    raises(lambda: stacked.update(less, state, params), (ValueError,), "layer/bias")
    raises(lambda: built(record, tasks=0).init(params), (ValueError,), "num_tasks", "0")
    for name in numeric_arguments(record):
        raises(lambda name=name: record.build(**{name: float("nan")}), (ValueError,), name, "nan")


def check_order(record: Method, dtype: str) -> None:
    """Renumbering the tasks changes nothing."""
    params, grads = parameters_of(dtype), sequence(4, dtype, tasks_of(record))
    stacked = built(record)
    run = jax.jit(lambda g: scanned(stacked, params, g)[0])
    renumbered = jax.tree.map(lambda g: g[:, jnp.roll(jnp.arange(tasks_of(record)), 1)], grads)
    assert_trees_equal(run(renumbered), run(grads), "renumbered tasks", rtol=1e-4, atol=1e-5)


def check_single_task(record: Method, dtype: str) -> None:
    """One task passes unchanged through a combiner, and keeps a transformation alive."""
    if record.name in TASKS_OF:
        raises(lambda: built(record, tasks=1).init(parameters_of(dtype)), (ValueError,), "got 1")
        return
    params, grads = parameters_of(dtype), sequence(2, dtype, tasks=1)
    stacked = built(record, tasks=1)
    outs, state = jax.jit(lambda g: scanned(stacked, params, g))(grads)
    assert all_finite((outs, state))
    if stacked.is_combiner and record.name not in CHANGES_A_SINGLE_TASK:
        alone = jax.tree.map(lambda g: g[:, 0], grads)
        assert_trees_equal(outs, alone, "a single task")


CHECKS: dict[str, tuple[Callable[[Method, str], None], tuple[str, ...]]] = {
    "state": (check_state, trees.DTYPES),
    "finite": (check_finite, trees.DTYPES),
    "dtype": (check_dtype, trees.DTYPES),
    "compile": (check_compile, ("float32",)),
    "compose": (check_compose, ("float32",)),
    "trees": (check_trees, ("float32", "bfloat16")),
    "bad_input": (check_bad_input, ("float32",)),
    "order": (check_order, ("float32",)),
    "single_task": (check_single_task, ("float32",)),
}
"""Rule -> its check, and the dtypes in which it says something new."""


# -- the records ------------------------------------------------------------------------------


def _marks(
    record: Method, rule: str, dtype: str, dtypes: tuple[str, ...]
) -> list[pytest.MarkDecorator]:
    marks = marks_of(record, rule, dtype, usual=USUAL.get(rule, dtypes))
    if rule == "order" and record.name in ORDER_MATTERS:
        marks.append(pytest.mark.xfail(reason=ORDER_MATTERS[record.name], strict=True))
    return marks


USUAL = {"state": ("float32",), "finite": ("float16", "float32"), "dtype": ("float16", "bfloat16")}
"""Dtypes of these rules in the usual suite; ``make test-full`` runs the others, too."""

RECORDS = catalog.records("combiner")

CASES = [
    pytest.param(
        record,
        rule,
        dtype,
        id=f"{name}-{rule}-{dtype}",
        marks=_marks(record, rule, dtype, dtypes),
    )
    for name, record in RECORDS.items()
    for rule, (_, dtypes) in CHECKS.items()
    for dtype in dtypes
]


@pytest.mark.parametrize(("record", "rule", "dtype"), CASES)
def test_combiner(record: Method, rule: str, dtype: str) -> None:
    with dtype_mode(dtype):
        CHECKS[rule][0](record, dtype)


def test_every_combiner_is_run() -> None:
    assert {"sam_gs", "sum_combiner", "sam_gs_optimizer", "with_combiner"} <= set(RECORDS)
    for name in (*ORDER_MATTERS, *CHANGES_A_SINGLE_TASK):
        assert isinstance(RECORDS[name].build(), GradientCombiner), f"{name} is no combiner"
    assert len(CASES) == len(RECORDS) * sum(len(dtypes) for _, dtypes in CHECKS.values())


# -- the checks can fail ----------------------------------------------------------------------


def nan_on_zero_task() -> GradientCombiner:
    """Averages unit gradients, and divides 0 by 0 for a task that has none."""

    def update(task_grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(jnp.float32, g.dtype)), task_grads)
        squares = [
            jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(wide)
        ]
        norms = jnp.sqrt(jnp.sum(jnp.stack(squares), axis=0))
        mixed = jax.tree.map(lambda g: jnp.tensordot(1 / norms, g, axes=1), wide)
        return jax.tree.map(lambda x, g: x.astype(g.dtype), mixed, task_grads), state

    return GradientCombiner(lambda params, num_tasks: optax.EmptyState(), update)


def drops_dtype() -> GradientCombiner:
    """Adds the tasks and hands the sum back in float32 whatever came in."""

    def update(task_grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return jax.tree.map(lambda g: jnp.sum(g.astype(jnp.float32), axis=0), task_grads), state

    return GradientCombiner(lambda params, num_tasks: optax.EmptyState(), update)


BROKEN = [
    (nan_on_zero_task, "finite", "float32", "all tasks zero: not finite"),
    (drops_dtype, "dtype", "bfloat16", "is float32, given bfloat16"),
    (drops_dtype, "bad_input", "float32", "nothing was raised"),
]


@pytest.mark.parametrize(("factory", "rule", "dtype", "message"), BROKEN)
def test_broken_combiners_are_rejected(factory: Any, rule: str, dtype: str, message: str) -> None:
    record = Method(factory=factory, kind="combiner", summary="")
    with dtype_mode(dtype), pytest.raises(AssertionError, match=message):
        CHECKS[rule][0](record, dtype)
    with dtype_mode(dtype):  # rejected for that reason alone: the sum itself is fine
        check_order(record, "float32")
