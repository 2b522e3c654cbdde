"""Tasks one after the other; other leaves at their own rate; sketches and histories in between."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optimkit as ok
from optimkit.matrices import frequent_directions
from optimkit.wrappers.task_subspaces import TaskSubspacesState
from tests.goldens.adapters import arrays_of, compare_named, parameter_error
from tests.goldens.golden import Golden, flatten

RUNS_ALL = True


def run(golden: Golden) -> dict[str, float]:
    params, nodes = replay(golden, ok.coso)
    errors = {"params": parameter_error(golden, params)}
    injected, _ = replay(golden, ok.inject_hyperparams(ok.coso))
    errors["params (injected)"] = parameter_error(golden, injected)
    return errors | compare_named(golden, observe(golden, nodes))


def replay(golden: Golden, factory: Any) -> Any:
    """Parameters after every step, and CoSO's state after each, and then after the task, by task.

    One trace of one step serves all tasks.
    """
    low = golden.meta["lowrank_leaves"]
    regular = golden.meta["regular_learning_rate"]
    kwargs = {**golden.kwargs, "lowrank_leaves": lambda path, _: path in low}
    tx: Any = optax.partition(
        {"low": factory(**kwargs), "regular": factory(**{**kwargs, "learning_rate": regular})},
        lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: "low" if "/".join(key.key for key in path) in low else "regular", tree
        ),
    )
    tasks = jax.tree.map(
        lambda g: g.reshape(golden.meta["tasks"], -1, *g.shape[1:]), arrays_of(golden, "grads")
    )

    @jax.jit
    def run(start: Any, tasks: Any) -> Any:
        def step(carry: Any, grads: Any) -> Any:
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, node_of(state))

        def task(carry: Any, grads: Any) -> Any:
            (params, state), (every, nodes) = jax.lax.scan(step, carry, grads)
            state = ok.coso_end_task(state)
            return (params, state), (every, (nodes, node_of(state)))

        every, nodes = jax.lax.scan(task, (start, tx.init(start)), tasks)[1]
        return jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), every), nodes

    return run(arrays_of(golden, "params0"), tasks)


def node_of(states: Any) -> TaskSubspacesState:
    """CoSO's state that has projected leaves."""

    def found(node: Any) -> bool:
        return isinstance(node, TaskSubspacesState)

    nodes = [node for node in jax.tree.leaves(states, is_leaf=found) if found(node)]
    return next(node for node in nodes if jax.tree.leaves(node.projector))


def observe(golden: Golden, nodes: tuple[TaskSubspacesState, TaskSubspacesState]) -> dict[str, Any]:
    steps, ended = nodes
    sketches = frequent_directions(golden.kwargs["sketch_rank"])
    named: dict[str, Any] = {}
    for name in golden.meta["lowrank_leaves"]:
        projectors, sketch, history, count = (
            flatten(tree)[name]
            for tree in (steps.projector, steps.sketch, ended.history, ended.history_count)
        )
        named[f"proj/{name}"] = projectors.reshape(-1, *projectors.shape[2:])
        basis, sigma = sketches.basis(sketch)
        named[f"sketch_sigma/{name}"] = sigma.reshape(-1, sigma.shape[-1])
        named[f"sketch_basis/{name}"] = basis[:, -1]
        for task in range(golden.meta["tasks"]):
            held = int(count[task])
            named[f"history_{task + 1}/{name}"] = history[task, :, :held]
            assert not jnp.any(history[task, :, held:])
    return named
