"""How each kind of golden is run, and what else than the parameters is compared.

``run(golden)`` gives the error of every array that was compared. Trajectories, schedules and
combiners need nothing more than their record; a module in ``methods/`` recomputes a method's
further recorded arrays, or runs what is none of the three.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optimkit as ok
from tests.goldens.golden import Golden, flatten, nest, relative_error, resolve

Errors = dict[str, float]


def arrays_of(golden: Golden, top: str) -> Any:
    return nest({k: jnp.asarray(v) for k, v in golden.tree(top).items()})


def arguments(golden: Golden, **overrides: Any) -> dict[str, Any]:
    """The keyword arguments that a golden is run with."""
    translate = getattr(method_module(golden), "arguments", None)
    return {**(translate(golden) if translate else golden.kwargs), **overrides}


def build(golden: Golden, **overrides: Any) -> Any:
    """Our transformation for a golden, as its meta says."""
    return resolve(golden.factory_names[0])(**arguments(golden, **overrides))


# -- trajectories -----------------------------------------------------------------------------


def replay(golden: Golden, tx: Any) -> Any:
    """Parameters and states after every step, from one trace of one step.

    ``lax.scan`` also refuses a state whose structure, shapes, dtypes or weak types change.
    """
    tx = optax.with_extra_args_support(tx)
    params = arrays_of(golden, "params0")
    extras = getattr(method_module(golden), "extras", lambda golden: {})(golden)
    gradient = getattr(method_module(golden), "gradient", lambda golden: None)(golden)

    @jax.jit
    def run(params: Any, sequence: Any) -> Any:
        def step(carry: Any, given: Any) -> Any:
            params, state = carry
            grads, now = given
            grads = gradient(params) if gradient else grads
            updates, state = tx.update(grads, state, params, **extras, **now)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state)

        return jax.lax.scan(step, (params, tx.init(params)), sequence)[1]

    each = getattr(method_module(golden), "extras_each_step", lambda golden: {})(golden)
    return run(params, (arrays_of(golden, "grads"), each))


def parameter_error(golden: Golden, params: Any) -> float:
    """The largest error over the leaves, relative to how far each leaf moved."""
    origin, recorded = golden.tree("params0"), golden.tree("params")
    return max(
        relative_error(got, recorded[name], origin[name]) for name, got in flatten(params).items()
    )


def run_trajectory(golden: Golden, **overrides: Any) -> Errors:
    params, states = replay(golden, build(golden, **overrides))
    errors = {"params": parameter_error(golden, params)}
    factory = resolve(golden.factory_names[0])
    injected = ok.inject_hyperparams(factory)(**arguments(golden, **overrides))
    errors["params (injected)"] = parameter_error(golden, replay(golden, injected)[0])
    return errors | observed(golden, params, states)


def method_module(golden: Golden) -> ModuleType | None:
    """The module in ``methods/`` that knows a golden's further arrays, if there is one."""
    name = f"tests.goldens.methods.{golden.method}"
    return importlib.import_module(name) if find_spec(name) else None


def observed(golden: Golden, results: Any, states: Any) -> Errors:
    """Errors of the further arrays that the method's module recomputes."""
    observe = getattr(method_module(golden), "observe", None)
    return compare_named(golden, observe(golden, results, states)) if observe else {}


def compare_named(golden: Golden, named: dict[str, Any]) -> Errors:
    """Errors of recomputed arrays against those recorded under the same names."""
    return {
        name: relative_error(value, golden.arrays[name])
        for name, value in named.items()
        if name in golden.arrays
    }


# -- schedules and combiners ------------------------------------------------------------------


def run_schedule(golden: Golden, **overrides: Any) -> Errors:
    schedule = build(golden, **overrides)
    # optax turns int32 counts into float32 even where 64 bits are on; ours must not.
    optaxs = golden.factory_names[0].startswith("optax.")
    counts = jnp.asarray(golden.arrays["step"], jnp.float64 if optaxs else jnp.int32)
    values = jax.vmap(schedule)(counts)
    errors = {"value": relative_error(values, golden.arrays["value"])}
    return errors | observed(golden, values, None)


def run_combiner(golden: Golden, **overrides: Any) -> Errors:
    combiner = build(golden, **overrides)
    sequence = arrays_of(golden, "task_grads")
    num_tasks = jax.tree.leaves(sequence)[0].shape[1]
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[2:], g.dtype), sequence)
    params = arrays_of(golden, "params") or params
    each = getattr(method_module(golden), "extras_each_step", lambda golden: {})(golden)

    @jax.jit
    def run(sequence: Any, each: Any) -> Any:
        def step(state: Any, given: Any) -> Any:
            grads, now = given
            combined, state = combiner.update(grads, state, params, **now)
            return state, (combined, state)

        return jax.lax.scan(step, combiner.init(params, num_tasks), (sequence, each))[1]

    combined, states = run(sequence, each)
    named = {f"combined/{name}": value for name, value in flatten(combined).items()}
    return compare_named(golden, named) | observed(golden, combined, states)


# -- everything -------------------------------------------------------------------------------

RUNNERS = {"trajectory": run_trajectory, "schedule": run_schedule, "combiner": run_combiner}


def run(golden: Golden, **overrides: Any) -> Errors:
    """Runs a golden in 64 bits; gives the error of every array compared.

    Raises:
      LookupError: if nothing knows how to run it.
    """
    own = getattr(method_module(golden), "run", None)
    alone = getattr(method_module(golden), "RUNS_ALL", False)
    runner = own if alone else RUNNERS.get(golden.kind) or own
    if runner is None:
        raise LookupError(f"{golden.name}: nothing in tests/goldens/methods runs it")
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        return runner(golden, **overrides)


INPUTS = ("params0", "grads", "step", "task_grads")
"""Arrays that are inputs of every golden of their kind."""


def excused(golden: Golden) -> dict[str, str]:
    """Arrays, or folders of arrays, that nobody compares, with the reason."""
    return getattr(method_module(golden), "NOT_COMPARED", {})


def uncompared(golden: Golden, errors: Errors) -> list[str]:
    """Recorded arrays that are neither inputs nor compared nor excused."""
    known = {*INPUTS, *excused(golden), *(name.split(" ")[0] for name in errors)}
    return sorted(n for n in golden.arrays if n not in known and n.split("/")[0] not in known)
