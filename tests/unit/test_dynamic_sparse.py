"""Dynamic sparse training: what is dropped and grown, what stays zero or frozen, and messages."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.transforms import apply_masks, erk_densities, init_masks, update_masks
from optimkit.transforms.choose_entries import above_smallest, largest_entries

KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def number(mask: Any) -> int:
    return int(np.sum(mask))


# -- choosing entries -------------------------------------------------------------------------


def test_entries_chosen_by_rank_are_those_of_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        ranks = rng.choice([0, 1, 2, 2**31 - 1], 16)
        eligible, count = rng.random(16) < 0.7, int(rng.integers(0, 18))
        order = [i for i in np.argsort(-ranks, kind="stable") if eligible[i]][:count]
        got = largest_entries(jnp.asarray(ranks, jnp.int32), jnp.asarray(eligible), count)
        assert np.flatnonzero(got).tolist() == sorted(order)

        x = rng.integers(-3, 4, 16).astype(np.float32)
        limit = np.sort(abs(x))[min(count, 16) - 1] if count else 0
        np.testing.assert_array_equal(above_smallest(x, min(count, 16)), abs(x) > limit)


# -- densities and first masks ----------------------------------------------------------------


def test_erk_keeps_the_total_and_makes_narrow_layers_dense() -> None:
    shapes = {"a": (3, 3, 8, 16), "b": (256, 64), "c": (64, 3)}
    found = erk_densities(shapes, 0.2)
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    assert found["c"] == 1
    kept = sum(found[name] * sizes[name] for name in shapes)
    assert kept == pytest.approx(0.2 * sum(sizes.values()))
    assert erk_densities(shapes, 0.2, power_scale=0) == pytest.approx(dict.fromkeys(shapes, 0.2))
    assert erk_densities(shapes, 1.0) == pytest.approx(dict.fromkeys(shapes, 1.0))
    assert erk_densities({}, 0.2) == {}


def test_first_masks_by_leaf() -> None:
    params = {
        "a": {"kernel": jnp.zeros((100, 100)), "bias": jnp.zeros(100)},
        "norms": {"scale": jnp.zeros((4, 100))},
    }
    masks = init_masks(params, 0.2, key=KEY)
    assert number(masks["a"]["kernel"]) == pytest.approx(2000, abs=160)  # four deviations
    assert masks["a"]["kernel"].dtype == bool
    assert masks["a"]["bias"].shape == masks["norms"]["scale"].shape == ()
    named = init_masks(params, {"norms/scale": 0.5}, key=KEY)
    assert named["norms"]["scale"].shape == (4, 100)
    assert named["a"]["kernel"].shape == ()
    again = init_masks({"a": params["a"]}, 0.2, key=KEY)
    np.testing.assert_array_equal(again["a"]["kernel"], masks["a"]["kernel"])


# -- moving masks -----------------------------------------------------------------------------

MASK = jnp.array([True, True, True, True, False, False, False, False])
WEIGHTS = jnp.array([3.0, 0.5, -0.5, 2.0, 9.0, 0.0, 0.0, 0.0])  # what the mask hides does not count


@pytest.mark.parametrize(
    ("rate", "scores", "expected"),
    [
        # One of four is to go; the two that tie go together, and two others grow.
        (0.25, [0, 0, 0, 0, 1, 5, 4, 3], [0, 3, 5, 6]),
        (0.25, [9, 9, 9, 9, 0, 0, 0, 1], [0, 1, 2, 3]),  # what was just dropped may come back
        (0.25, [0] * 8, [0, 1, 2, 3]),  # equal scores: the first in order
        (0.25, [0, 0, 0, 0, jnp.nan, -2, 0, 1], [0, 3, 5, 7]),
        (0.0, [0, 0, 0, 0, 1, 5, 4, 3], [0, 1, 2, 3]),
        (1.0, [0, 0, 0, 0, 1, 5, 4, 3], [4, 5, 6, 7]),
    ],
)
def test_gradient_growth(rate: float, scores: list[float], expected: list[int]) -> None:
    score = jnp.asarray(scores, jnp.float32)
    new = update_masks(MASK, WEIGHTS, score, rate, growth="gradient")
    assert np.flatnonzero(new).tolist() == expected
    assert np.flatnonzero(update_masks(MASK, WEIGHTS, None, rate, growth="none")).tolist() == [
        i for i, w in enumerate(WEIGHTS[:4]) if abs(w) > {0.0: 0, 0.25: 0.5, 1.0: 3}[rate]
    ]


def test_a_rate_of_zero_drops_exact_zeros_alone() -> None:
    new = update_masks(MASK, WEIGHTS.at[1].set(0), None, 0.0, growth="none")
    assert np.flatnonzero(new).tolist() == [0, 2, 3]


@pytest.mark.parametrize("growth", ["random", "random_unfired"])
def test_random_growth_counts_and_eligibility(growth: Any) -> None:
    masks = init_masks({"w": jnp.zeros((40, 50))}, 0.3, key=KEY)
    params, active = {"w": normal(1, 40, 50)}, number(masks["w"])
    kept = update_masks(masks, params, None, 0.5, growth="none")["w"]
    dropped = int(np.ceil(0.5 * active))
    assert number(kept) == active - dropped

    def moved(seed: int, **more: Any) -> Any:
        given = {"growth": growth, "key": jax.random.key(seed), "fired": masks, **more}
        return np.asarray(update_masks(masks, params, None, 0.5, **given)["w"])

    first, second = moved(1, exact_growth=True), moved(2, exact_growth=True)
    for new in (first, second):
        assert number(new) == active
        assert np.all(new[kept])
    assert np.any(first != second)
    coins = np.mean([number(moved(seed)) for seed in range(8)])
    assert coins == (active if growth == "random_unfired" else pytest.approx(active, abs=40))
    regrown = number(first & masks["w"] & ~kept)
    assert regrown == 0 if growth == "random_unfired" else regrown > 0


def test_too_few_unfired_entries_leave_the_rest_to_chance() -> None:
    masks = {"w": jnp.arange(1000) < 500}
    params, fired = {"w": normal(2, 1000)}, {"w": jnp.arange(1000) < 900}
    given = {"growth": "random_unfired", "key": KEY, "fired": fired}
    exact = update_masks(masks, params, None, 0.5, **given, exact_growth=True)["w"]
    chance = update_masks(masks, params, None, 0.5, **given)["w"]
    assert number(exact) == 500
    assert abs(number(chance) - 500) < 50
    assert np.all(exact[900:])
    assert np.all(chance[900:])


# -- the wrapper ------------------------------------------------------------------------------

PARAMS = {"kernel": normal(3, 8, 6), "bias": jnp.ones(6)}


def train(tx: Any, params: Any, steps: int, scale: float = 1.0) -> tuple[Any, list[Any]]:
    @jax.jit
    def step(params: Any, state: Any, seed: Any) -> Any:
        def draw(p: Any) -> Any:
            return scale * jax.random.normal(jax.random.key(seed), p.shape, p.dtype)

        updates, state = tx.update(jax.tree.map(draw, params), state, params)
        return optax.apply_updates(params, updates), state

    states = [tx.init(params)]
    for seed in range(steps):
        params, state = step(params, states[-1], seed)
        states.append(state)
    return params, states


def test_weights_outside_the_masks_are_exact_zeros() -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = ok.dynamic_sparse(
        optax.adamw(0.01), density=0.5, growth="random_unfired", total_steps=4, update_every=2
    )
    params, states = train(tx, params, 4)
    masks = [np.asarray(state.masks["kernel"]) for state in states]
    assert np.all(params["kernel"][~masks[-1]] == 0)
    assert np.all(params["kernel"][masks[-1] & masks[2]] != 0)
    assert np.all(params["kernel"][masks[-1] & ~masks[3]] == 0)  # grown in this step
    assert [np.any(a != b) for a, b in itertools.pairwise(masks)] == [0, 1, 0, 1]
    np.testing.assert_array_equal(states[-1].fired["kernel"], masks[0] | masks[2] | masks[4])
    assert np.all(params["bias"] != 0)


@pytest.mark.parametrize("mask_inner_moments", [None, True, False])
def test_which_moments_are_masked(mask_inner_moments: bool | None) -> None:
    inner = optax.chain(ok.scale_by_adam(), optax.trace(0.9), optax.scale(-0.1))
    tx = ok.dynamic_sparse(inner, total_steps=1, mask_inner_moments=mask_inner_moments)
    _, states = train(tx, PARAMS, 2)
    outside = ~np.asarray(states[-1].masks["kernel"])
    adam, trace, _ = states[-1].inner_state
    assert np.all(trace.trace["kernel"][outside] == 0) == (mask_inner_moments is not False)
    assert np.all(adam.mu["kernel"][outside] == 0) == (mask_inner_moments is True)
    assert np.all(trace.trace["bias"] != 0)


def test_frozen_entries_do_not_move() -> None:
    fixed = np.zeros((8, 6), bool)
    fixed[2:5] = True
    tx = ok.dynamic_sparse(
        optax.adamw(0.1, weight_decay=0.5),
        frozen={"kernel": fixed, "bias": True},
        total_steps=4,
        update_every=2,
    )
    params, states = train(tx, PARAMS, 4)
    np.testing.assert_array_equal(params["kernel"][fixed], PARAMS["kernel"][fixed])
    np.testing.assert_array_equal(params["bias"], PARAMS["bias"])
    moved = states[-1].masks["kernel"] & states[-2].masks["kernel"] & ~fixed
    assert np.all(params["kernel"][moved] != PARAMS["kernel"][moved])
    assert np.all(optax.tree.get(states[-1], "mu")["kernel"][fixed] == 0)
    first, last = (np.asarray(state.masks["kernel"]) for state in (states[0], states[-1]))
    np.testing.assert_array_equal(first[fixed], last[fixed])
    assert np.any(first != last)


def test_frozen_entries_do_not_count() -> None:
    frozen = jnp.array([False, True, True, False, True, False, False, False])
    score = jnp.array([0.0, 0.0, 0.0, 0.0, 9.0, 1.0, 2.0, 3.0])
    new = update_masks(MASK, WEIGHTS, score, 0.5, growth="gradient", frozen=frozen)
    assert np.flatnonzero(new).tolist() == [0, 1, 2, 7]  # of 3 and 2, the 2 went


def test_update_every_zero_is_a_static_mask() -> None:
    tx = ok.dynamic_sparse(optax.sgd(0.1), total_steps=1, update_every=0, sparse_init="ERK")
    _, states = train(tx, PARAMS, 2)
    np.testing.assert_array_equal(states[0].masks["kernel"], states[2].masks["kernel"])


def test_explicit_densities_and_masks() -> None:
    def masks(sparse_init: Any) -> Any:
        tx = ok.dynamic_sparse(optax.sgd(0.1), total_steps=1, sparse_init=sparse_init)
        state: Any = tx.init(PARAMS)
        return state.masks

    for densities in ({"bias": 0.5}, {"kernel": None, "bias": 0.5}):
        assert masks(densities)["bias"].shape == (6,)
        assert masks(densities)["kernel"].shape == ()
    given = np.arange(6) % 2
    found = masks({"kernel": None, "bias": given})
    np.testing.assert_array_equal(found["bias"], given == 1)
    assert found["kernel"].shape == ()


# -- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "density must be > 0 and <= 1, got 0"),
        ({"density": 1.5}, "density must be > 0 and <= 1, got 1.5"),
        ({"growth": "taylor"}, "growth must be one of 'random'.*got 'taylor'"),
        ({"drop": "SET"}, "drop must be one of 'magnitude'"),
        ({"sparse_init": "erk"}, "sparse_init must be one of 'uniform', 'ERK'"),
        ({"sparse_init": {"kernel": 1.5}}, "density of 'kernel' must be > 0"),
        ({"sparse_init": {"kernels": 0.5}}, "'kernels' is none of the leaves"),
        ({"sparse_init": {"kernel": jnp.ones((8, 6), bool)}}, r"sparse_init and .*\['bias'\]"),
        (
            {"sparse_init": {"kernel": jnp.ones(3, bool), "bias": None}},
            r"'kernel' has shape \(3,\)",
        ),
        ({"sparse_init": {"kernel": False, "bias": None}}, "one False for all of 'kernel'"),
        ({"sparse_init": {"bias": 0.5}, "sparse_leaves": ["bias"]}, "sparse_leaves"),
        ({"frozen": {"kernel": np.ones(6, bool), "bias": None}}, "frozen: the mask of 'kernel'"),
        ({"drop_rate": 1.5}, "drop_rate"),
        ({"total_steps": 0}, "total_steps"),
        ({"growth": "momentum"}, "growth='momentum' needs .* trace or mu; it holds no moments"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ok.dynamic_sparse(optax.sgd(0.1), **{"total_steps": 1, **arguments}).init(PARAMS)


def test_wrong_trees() -> None:
    masks = init_masks(PARAMS, 0.5, key=KEY)
    for given, message in (
        ({"growth": "gradient"}, "scores is missing"),
        ({"growth": "random"}, "key is missing"),
        ({"growth": "random_unfired", "key": KEY}, "fired is missing"),
        ({"growth": "forest"}, "growth must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            update_masks(masks, PARAMS, None, 0.5, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masks and the parameters .*\['bias'\]"):
        apply_masks(PARAMS, {"kernel": masks["kernel"]})
    with pytest.raises(ValueError, match=r"masks: .*'kernel' has shape \(6, 8\)"):
        apply_masks(PARAMS, {"kernel": masks["kernel"].T, "bias": None})
    tx = ok.dynamic_sparse(optax.sgd(0.1), total_steps=1)
    with pytest.raises(ValueError, match="dynamic_sparse needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
