"""CoSO and its parts: what a task may not move, what a history keeps, what a sketch bounds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.matrices import frequent_directions
from optimkit.matrices.side_by_side import map_side_by_side
from optimkit.wrappers.task_subspaces import TaskSubspacesState


def node_of(state: Any) -> TaskSubspacesState:
    found = [x for x in jax.tree.leaves(state, is_leaf=is_node) if is_node(x)]
    return found[0]


def is_node(x: Any) -> bool:
    return isinstance(x, TaskSubspacesState)


def run(tx: Any, state: Any, grads: Any) -> Any:
    """All updates of one task, and the state at its end."""
    params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return state, updates

    return jax.jit(lambda state, grads: jax.lax.scan(step, state, grads))(state, grads)


def start(tx: Any, grads: Any) -> Any:
    return tx.init(jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads))


# -- tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["noisy", "rank one", "zero at the end"])
def test_a_task_leaves_what_earlier_ones_use(kind: str) -> None:
    rng = np.random.default_rng(0)
    tx = ok.coso(0.1, proj_rank=4, sketch_rank=4, threshold=0.9)
    first, second = rng.normal(size=(2, 3, 6, 8))
    if kind == "rank one":  # all but one column of P are rounding
        second = second[..., :1] * second[..., :1, :]
    if kind == "zero at the end":
        second[-1] = 0
    as_grads = [{"kernel": jnp.asarray(g, jnp.float32)} for g in (first, second)]
    state, _ = run(tx, start(tx, as_grads[0]), as_grads[0])
    state = ok.coso_end_task(state)
    history = node_of(state).history["kernel"]
    count = int(node_of(state).history_count["kernel"])
    assert 0 < count < 4
    np.testing.assert_allclose(
        history.T @ history, np.diag([1] * count + [0] * (8 - count)), atol=1e-6
    )
    updates = run(tx, state, as_grads[1])[1]["kernel"]
    assert float(jnp.max(jnp.abs(updates))) > 0.05
    assert float(jnp.max(jnp.abs(updates @ history))) < 1e-6


def test_the_end_of_a_task_restarts_projected_leaves_alone() -> None:
    grads = {"kernel": jnp.ones((2, 3, 2)), "bias": jnp.ones((2, 2))}
    tx = ok.coso(0.1, proj_rank=1, sketch_rank=1)
    state, _ = run(tx, start(tx, grads), grads)
    after = jax.jit(ok.coso_end_task)(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), state
    )
    low, rest = (after[0].inner_states[kind].inner_state for kind in ("low", "rest"))
    assert int(low.count) == int(low.inner_state.count) == 0
    for tree in (low.inner_state.mu, low.sketch, low.projector):
        assert not jnp.any(tree["kernel"])
    assert int(rest.count) == 2
    assert float(rest.mu["bias"][0]) > 0


def test_the_state_is_found_however_deep() -> None:
    params = {"kernel": jnp.diag(jnp.array([5.0, 1.0])), "bias": jnp.ones(2)}
    inner = ok.inject_hyperparams(ok.coso)(learning_rate=0.1, proj_rank=1, sketch_rank=2)
    tx = optax.chain(optax.masked(inner, {"kernel": True, "bias": False}), optax.scale(1.0))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert int(node_of(ok.coso_end_task(state)).history_count["kernel"]) == 1
    with pytest.raises(ValueError, match="coso_end_task found no state of coso"):
        ok.coso_end_task(optax.sgd(0.1).init(params))


def test_a_full_history_keeps_what_fits_and_counts_the_rest() -> None:
    tx = ok.coso(0.1, proj_rank=1, sketch_rank=3, history_capacity=3)
    params = {"kernel": jnp.zeros((5, 5))}
    state, update = tx.init(params), jax.jit(tx.update)
    for diagonal in ([5.0, 4.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 5.0, 4.0]):
        _, state = update({"kernel": jnp.diag(jnp.array(diagonal))}, state, params)
        state = ok.coso_end_task(state)
    # Outputs 0 and 1, with 41 / 42 of the energy; then 3, and 4 finds no room.
    node = node_of(state)
    np.testing.assert_allclose(node.history["kernel"], np.eye(5)[:, [0, 1, 3]], atol=1e-6)
    assert int(node.history_count["kernel"]) == 4


@pytest.mark.parametrize("bad", [jnp.nan, 0.0])
def test_a_gradient_that_says_nothing_leaves_the_sketch(bad: float) -> None:
    tx = ok.coso(0.1, proj_rank=1, sketch_rank=2)
    params = {"kernel": jnp.diag(jnp.array([5.0, 1.0, 0.0]))}
    update = jax.jit(tx.update)
    _, before = update(params, tx.init(params), params)
    _, after = update({"kernel": jnp.full((3, 3), bad)}, before, params)
    np.testing.assert_allclose(
        node_of(after).sketch["kernel"], node_of(before).sketch["kernel"], atol=1e-5
    )
    if bad != 0:
        np.testing.assert_array_equal(
            node_of(after).projector["kernel"], node_of(before).projector["kernel"]
        )
    _, alone = update({"kernel": jnp.full((3, 3), bad)}, tx.init(params), params)
    assert int(node_of(ok.coso_end_task(alone)).history_count["kernel"]) == 0


def test_the_sides_mirror_each_other() -> None:
    grads = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 5)), jnp.float32)}
    turned = {"kernel": jnp.swapaxes(grads["kernel"], 1, 2)}
    results = []
    for axis, g in (("out", grads), ("in", turned)):
        tx = ok.coso(0.1, proj_rank=2, sketch_rank=3, threshold=0.7, projected_axis=axis)
        state, _ = run(tx, start(tx, g), g)
        results.append(run(tx, ok.coso_end_task(state), g)[1]["kernel"])
    np.testing.assert_allclose(results[0], jnp.swapaxes(results[1], 1, 2), atol=1e-5)


def test_stacks_are_so_many_matrices_and_ranks_are_clamped() -> None:
    grads = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 5, 4)), jnp.bfloat16)
    tx = ok.coso(0.1, proj_rank=99, sketch_rank=99, threshold=0.8, lowrank_leaves=["kernel"])
    state, _ = run(tx, start(tx, {"kernel": grads}), {"kernel": grads})
    node = node_of(ok.coso_end_task(state))
    assert node.sketch["kernel"].shape == node.history["kernel"].shape == (3, 4, 4)
    assert node.history["kernel"].dtype == jnp.float32
    for layer in range(3):
        one = {"kernel": grads[:, layer]}
        alone = node_of(ok.coso_end_task(run(tx, start(tx, one), one)[0]))
        np.testing.assert_allclose(
            node.history["kernel"][layer], alone.history["kernel"], atol=1e-5
        )
        assert int(node.history_count["kernel"][layer]) == int(alone.history_count["kernel"]) > 0


def test_faster_projectors_find_the_same_directions() -> None:
    left, right = (np.linalg.qr(x)[0] for x in np.random.default_rng(3).normal(size=(2, 30, 30)))
    grads = {"kernel": jnp.asarray((left * 0.3 ** np.arange(30)) @ right, jnp.float32)}
    nodes = {}
    for method in ("svd", "gram", "subspace"):
        tx = ok.coso(0.1, proj_rank=2, sketch_rank=3, projector=method)
        nodes[method] = node_of(jax.jit(tx.update)(grads, tx.init(grads), grads)[1])
    for method in ("gram", "subspace"):
        for field in ("projector", "sketch"):
            np.testing.assert_allclose(
                getattr(nodes[method], field)["kernel"],
                getattr(nodes["svd"], field)["kernel"],
                atol=1e-4,
            )


# -- parts ------------------------------------------------------------------------------------


def test_a_sketch_lies_below_the_stream_and_near_it() -> None:
    stream = np.random.default_rng(4).normal(size=(5, 6, 8)) * 0.5 ** np.arange(6)[:, None]
    directions = frequent_directions(4)
    sketch = directions.init(6)
    insert = jax.jit(directions.insert)
    for matrix in jnp.asarray(stream, jnp.float32):
        sketch = insert(sketch, matrix)
    total = np.sum(stream @ np.swapaxes(stream, 1, 2), 0)
    gap = np.linalg.eigvalsh(total - np.asarray(sketch @ sketch.T))
    assert gap[0] > -1e-3
    assert gap[-1] < 0.05 * np.linalg.eigvalsh(total)[-1]
    basis, sigma = directions.basis(sketch)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-4)
    assert jnp.all(sigma[:-1] >= sigma[1:])


def test_an_old_sketch_decays() -> None:
    directions = frequent_directions(2, 0.5)
    insert = jax.jit(directions.insert)
    sketch = insert(directions.init(3), jnp.diag(jnp.array([8.0, 0.0, 0.0])))
    sketch = insert(sketch, jnp.diag(jnp.array([3.0, 0.0, 0.0])))
    assert float(directions.basis(sketch)[1][0]) == pytest.approx(5.0)  # of (4, 3)


def test_groups_of_several_sizes_come_back_in_order() -> None:
    groups = [[jnp.full((2, 3), 1.0), jnp.full((2, 1), 2.0)], [jnp.full((2, 4, 1), 3.0)] * 2]
    found = map_side_by_side(lambda a, b: [a + b, b, b, b], groups)
    assert [x.shape for x in found[0]] == [(2, 3), (2, 1), (2, 1), (2, 1)]
    assert [float(jnp.max(x)) for x in found[0]] == [3.0, 2.0, 2.0, 2.0]
    assert [x.shape for x in found[1]] == [(2, 4, 1)] * 4


def test_a_history_may_be_a_tree_or_a_function() -> None:
    grads = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.ones(2)}
    basis = jnp.array([[0.6], [0.8]])
    for history in (
        {"kernel": basis, "bias": None},
        lambda path, _: basis if path == "kernel" else None,
    ):
        tx = ok.project_out(history)
        updates, _ = tx.update(grads, tx.init(grads))
        np.testing.assert_allclose(updates["kernel"], np.zeros((1, 2)), atol=1e-6)
        assert updates["bias"].tolist() == [1.0, 1.0]


# -- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ok.coso(0.1, proj_rank=0), "proj_rank must be an integer >= 1, got 0"),
        (lambda: ok.coso(0.1, sketch_rank=0), "sketch_rank must be an integer >= 1, got 0"),
        (lambda: ok.coso(0.1, update_proj_gap=0), "update_proj_gap must be an integer >= 1"),
        (lambda: ok.coso(0.1, threshold=1.5), "threshold must be >= 0 and <= 1, got 1.5"),
        (lambda: ok.coso(0.1, sketch_decay=-1.0), "sketch_decay must be >= 0 and <= 1, got -1"),
        (lambda: ok.coso(0.1, projector="random"), "projector must be one of 'svd', 'gram'"),
        (lambda: ok.coso(0.1, projected_axis=0), "projected_axis must be one of 'in', 'out'"),
        (
            lambda: ok.coso(0.1, sketch_rank=8, history_capacity=7),
            "history_capacity must be >= sketch_rank, .* got 7 and 8",
        ),
        (
            lambda: ok.coso(0.1, lowrank_leaves=["bias"]).init({"bias": jnp.ones(3)}),
            r"lowrank_leaves: leaf 'bias' of shape \(3,\) is no matrix",
        ),
        (
            lambda: ok.project_out({"w": jnp.ones((2, 1))}).init({"w": jnp.ones((2, 3))}),
            r"history of leaf 'w' has shape \(2, 1\); for side 'out' of a leaf of shape \(2, 3\)",
        ),
        (
            lambda: ok.project_out({"w": jnp.ones((3, 1))}).init({"w": jnp.ones(3)}),
            "must be absent",
        ),
        (
            lambda: ok.project_out({"v": None}).init({"w": jnp.ones((2, 3))}),
            "history and the gradient are different trees",
        ),
        (lambda: frequent_directions(0), "rank must be an integer >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
