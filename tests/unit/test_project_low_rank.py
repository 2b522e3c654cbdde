"""Low-rank projection on numbers that a reader can check by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.wrappers import compute_projector, refresh_projectors
from tests.goldens import adapters
from tests.goldens.golden import all_goldens


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def diagonal(*values: float) -> dict[str, jax.Array]:
    return {"kernel": jnp.diag(jnp.array(values))}


def bytes_of(tx, params) -> int:
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


# -- projectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "gram", "subspace"])
@pytest.mark.parametrize("axis", [0, 1])
def test_projectors_hold_the_leading_directions(method: str, axis: int) -> None:
    left, right = (np.linalg.qr(normal(seed, (8, 8)))[0] for seed in (0, 1))
    g = jnp.asarray(left @ np.diag([9.0, 5, 3, 0.1, 0.1, 0, 0, 0]) @ right.T)
    p = compute_projector(g, 3, axis, method, key=jax.random.key(0), oversample=2)
    vectors = (left, right)[axis][:, :3]
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(np.abs(p.T @ vectors), np.eye(3), atol=2e-3)
    assert np.all(np.take_along_axis(np.asarray(p), np.argmax(np.abs(p), 0)[None], 0) > 0)


def test_a_stack_has_a_projector_for_each_matrix() -> None:
    g = normal(0, (3, 4, 6))
    p = compute_projector(g, 2, 0)
    for matrix, own in zip(g, p, strict=True):
        np.testing.assert_allclose(compute_projector(matrix, 2, 0), own, atol=1e-5)


def test_random_projectors() -> None:
    key = jax.random.key(0)
    p = compute_projector(jnp.zeros((5, 9)), 3, 0, "random", key=key)
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-5)
    wide = compute_projector(jnp.zeros((50, 60)), 80, 1, "gaussian", key=key)
    assert wide.shape == (60, 80)
    np.testing.assert_allclose(np.var(wide) * 80, 1, rtol=0.1)


def test_own_projectors_reproduce_the_recording_to_the_rounding_of_its_svd() -> None:
    golden = all_goldens()["galore__std"]
    with jax.enable_x64(True):
        params, _ = adapters.replay(golden, ok.galore(**golden.kwargs))
        assert adapters.parameter_error(golden, params) < 1e-5


# -- the wrapper --------------------------------------------------------------------------------


def test_all_directions_are_the_gradient() -> None:
    g = {"kernel": normal(0, (3, 5)), "bias": normal(1, (5,))}
    tx = ok.project_low_rank(optax.identity(), rank=99, scale=2.0)
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates["kernel"], 2 * g["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], g["bias"])
    assert state.projector["kernel"].shape == (3, 3)


@pytest.mark.parametrize(
    ("stagger", "when"), [(False, ([0, 3, 6], [0, 3, 6])), (True, ([0, 3, 6], [0, 2, 5]))]
)
def test_when_projectors_are_renewed(stagger: bool, when: tuple[list[int], list[int]]) -> None:
    tx = ok.project_low_rank(optax.identity(), rank=1, update_proj_gap=3, stagger=stagger)
    grads = [{"a": normal(k, (2, 3)), "b": normal(k + 9, (2, 3))} for k in range(7)]
    step, state, seen = jax.jit(tx.update), tx.init(grads[0]), []
    for g in grads:
        _, state = step(g, state)
        seen.append(state.projector)
    assert step._cache_size() == 1
    for name, expected in zip("ab", when, strict=True):
        changed = [
            k for k in range(7) if k == 0 or not np.array_equal(seen[k][name], seen[k - 1][name])
        ]
        assert changed == expected


def test_decompositions_happen_under_the_condition_only() -> None:
    tx = ok.project_low_rank(optax.identity(), rank=1, update_proj_gap=3)
    g = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "c": jnp.ones((4, 3))}
    jaxpr = jax.make_jaxpr(tx.update)(g, tx.init(g)).jaxpr
    conds = [e for e in jaxpr.eqns if e.primitive.name == "cond" and " svd" in str(e)]
    outside = [e for e in jaxpr.eqns if e not in conds and " svd" in str(e)]
    assert len(conds) == 1
    assert not outside
    # One for each size, on CPUs and elsewhere.
    assert str(conds[0]).count("= svd[") == 4


@pytest.mark.parametrize(
    ("choice", "expected"), [("keep", [[0, 0], [2, 1]]), ("rotate", [[0, 0], [0, 1]]),
                             ("reset", [[0, 0], [0, 1]])]
)  # fmt: skip
def test_what_a_refresh_does_to_moments(choice: str, expected: list[list[float]]) -> None:
    # The subspace turns from the first direction to the second: momentum 2 has no place in it.
    tx = ok.project_low_rank(optax.trace(1.0), rank=1, update_proj_gap=1, moments_on_refresh=choice)
    state = tx.init(diagonal(1.0, 1.0))
    _, state = tx.update({"kernel": jnp.array([[2.0, 0.0], [0.0, 0.0]])}, state)
    updates, _ = tx.update({"kernel": jnp.array([[0.0, 0.0], [0.0, 1.0]])}, state)
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-6)


def test_rotation_keeps_what_stays_in_the_subspace() -> None:
    # Both directions are kept, in the other order: rotated momentum knows where it belongs.
    tx = ok.project_low_rank(
        ok.scale_by_adam(0.5, 0.5), rank=2, update_proj_gap=1, moments_on_refresh="rotate"
    )
    state = tx.init(diagonal(1.0, 1.0))
    _, state = tx.update(diagonal(4.0, 2.0), state)
    _, state = tx.update(diagonal(2.0, 4.0), state)
    inner, swap = state.inner_state, np.array([[0, 1], [1, 0]])
    np.testing.assert_allclose(swap @ inner.mu["kernel"], np.diag([2.0, 2.5]), atol=1e-5)
    np.testing.assert_allclose(swap @ inner.nu["kernel"], np.diag([6.0, 9.0]), atol=1e-5)


def test_a_bad_gradient_leaves_the_projector() -> None:
    tx = ok.project_low_rank(optax.identity(), rank=1, update_proj_gap=1)
    state = tx.init(diagonal(0.0, 0.0))
    _, state = tx.update(diagonal(1.0, 2.0), state)
    for value in (np.nan, np.inf):
        _, after = tx.update(diagonal(value, 0.0), state)
        np.testing.assert_array_equal(after.projector["kernel"], state.projector["kernel"])


def test_bytes_of_state() -> None:
    params = {"kernel": jnp.zeros((64, 64))}
    assert bytes_of(optax.adamw(0.1), params) == 8 * 64**2 + 4
    few = 4 * 4  # counts and flags
    assert 0 <= bytes_of(ok.galore(0.1, rank=16), params) - 3 * 64**2 <= few
    assert 0 <= bytes_of(ok.fira(0.1, rank=16), params) - 3 * 64**2 <= few + 8
    # 8 bits: one byte an entry of m and v, and a scale for each row of 64 entries.
    eight = bytes_of(ok.galore(0.1, rank=16, state_bits=8, state_min_size=1), params)
    assert 0 <= eight - (4 + 2) * 64 * 16 - 2 * 4 * 16 <= 8 * few
    thin = ok.apollo_mini(0.1, store_projection=False)
    assert 0 <= bytes_of(thin, params) - 8 * 64 <= few + 12
    both = ok.galore(0.1, rank=16, proj_type="full")
    assert 0 <= bytes_of(both, params) - 4 * (16 * 128 + 2 * 16**2) <= few


def test_explicit_refresh() -> None:
    tx = ok.galore(0.1, rank=2, update_proj_gap=None, proj_type="full")
    g = {"kernel": normal(0, (4, 6)), "bias": jnp.ones(3)}
    state = tx.init(g)
    _, state = jax.jit(tx.update)(g, state, g)
    np.testing.assert_array_equal(state[0].projector["kernel"], np.eye(4, 2))
    state = jax.jit(lambda s, g: refresh_projectors(s, g, proj_type="full"))(state, g)
    expected = compute_projector(g["kernel"], 2, 0), compute_projector(g["kernel"], 2, 1)
    np.testing.assert_allclose(state[0].projector["kernel"], expected[0], atol=1e-5)
    np.testing.assert_allclose(state[0].output_projector["kernel"], expected[1], atol=1e-5)
    with pytest.raises(ValueError, match="do not fit proj_type='std'"):
        refresh_projectors(state, g)
    with pytest.raises(ValueError, match="found no state of project_low_rank"):
        refresh_projectors(optax.sgd(0.1).init(g), g)


# -- recipes ------------------------------------------------------------------------------------


def test_fira_adds_what_galore_drops() -> None:
    g = {"kernel": jnp.array([[8.0, 4.0], [0.0, 2.0]])}
    low, wide = ok.galore(0.1, rank=1, scale=1.0), ok.fira(0.1, rank=1)
    inside, state = low.update(g, low.init(g), g)
    both, _ = wide.update(g, wide.init(g), g)
    p = state[0].projector["kernel"]
    r = p.T @ g["kernel"]
    # Adam's first step is a sign, and divides each channel by the size of its coordinate.
    np.testing.assert_allclose(inside["kernel"], -0.1 * p @ jnp.sign(r), rtol=1e-4)
    outside = (g["kernel"] - p @ r) / jnp.abs(r)
    np.testing.assert_allclose(
        both["kernel"], -0.1 * (p @ jnp.sign(r) + outside), rtol=1e-4, atol=1e-6
    )


def test_a_sketch_that_is_not_stored_is_the_same() -> None:
    g = {"kernel": normal(0, (4, 6))}
    results = []
    for store in (True, False):
        tx = ok.apollo(0.1, rank=5, update_proj_gap=2, store_projection=store)
        step, state = jax.jit(tx.update), tx.init(g)
        for _ in range(3):
            u, state = step(g, state, g)
        results.append(u["kernel"])
    np.testing.assert_allclose(*results, rtol=1e-5)


# -- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ok.galore(0.1, rank=0), "rank must be an integer >= 1, got 0"),
        (lambda: ok.fira(0.1, rank=1.5), "rank must be an integer >= 1, got 1.5"),
        (lambda: ok.galore(0.1, projector="qr"), "projector must be one of 'svd', .* got 'qr'"),
        (lambda: ok.apollo(0.1, proj="gram"), "proj must be one of 'random', 'svd', got 'gram'"),
        (lambda: ok.galore(0.1, update_proj_gap=0), "update_proj_gap must be an integer >= 1"),
        (lambda: ok.galore(0.1, proj_type="up"), "proj_type must be one of .* got 'up'"),
        (lambda: ok.fira(0.1, proj_type="full"), "proj_type must be one of .* got 'full'"),
        (lambda: ok.galore(0.1, scale=-1.0), "scale must be >= 0, got -1"),
        (lambda: ok.galore(0.1, moments_on_refresh="x"), "moments_on_refresh must be one of"),
        (lambda: ok.galore(0.1, state_bits=16), "state_bits must be None, 8 or 4, got 16"),
        (
            lambda: ok.galore(0.1, state_bits=8, moments_on_refresh="reset"),
            "state_bits=8 needs moments_on_refresh='keep', got 'reset'",
        ),
        (lambda: ok.apollo(0.1, scale_type="row"), "scale_type must be one of"),
        (lambda: ok.apollo(0.1, proj="svd", store_projection=False), "needs projector 'random'"),
        (
            lambda: ok.galore(0.1, lowrank_leaves=["bias"]).init({"bias": jnp.ones(3)}),
            r"lowrank_leaves: leaf 'bias' of shape \(3,\) is no matrix",
        ),
        (
            lambda: ok.galore(0.1, lowrank_leaves=["mlp*"]).init({"kernel": jnp.ones((2, 3))}),
            r"lowrank_leaves: 'mlp\*' matches none",
        ),
        (lambda: compute_projector(jnp.ones((2, 3)), 1, 2), "axis must be 0, .* got 2"),
        (lambda: compute_projector(jnp.ones((2, 3)), 1, 0, "random"), "it needs key"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_projector_of_another_shape() -> None:
    tx = ok.galore(0.1, rank=2, projector=lambda g, rank, side, refresh, path: g[:, :1])
    g = {"kernel": normal(0, (3, 4))}
    with pytest.raises(ValueError, match=r"shape \(3, 1\) .* 'kernel' .* must give \(3, 2\)"):
        tx.update(g, tx.init(g), g)


def test_a_state_of_another_tree() -> None:
    tx = ok.project_low_rank(optax.identity(), rank=2)
    state = tx.init({"kernel": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match="kernel"):
        tx.update({"kernel": jnp.ones((5, 6))}, state)
