"""Moments in narrow types: what is stored, that rounding by chance is fair, and what it costs."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import optimkit as ok
from optimkit import catalog, protocols
from optimkit.diagnostics import metrics
from optimkit.layout import named_leaves
from optimkit.leaves import moment_paths
from optimkit.transforms.rounding import leaf_keys, random_bits, stochastic_bfloat16
from tests.contract.checks import call

PARAMS: Any = {"dense": {"kernel": jnp.full((8, 4), 0.5), "bias": jnp.ones(4)}}
STOCHASTIC = "bfloat16_stochastic"


def grads_at(step: int) -> Any:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def run(tx: Any, steps: int, state: Any = None, start: int = 0) -> tuple[Any, Any]:
    update = jax.jit(tx.update)
    state = tx.init(PARAMS) if state is None else state
    updates = None
    for step in range(start, start + steps):
        updates, state = update(grads_at(step), state, PARAMS)
    return updates, state


def moments_of(inner: Any, state: Any) -> dict[str, Any]:
    paths = jax.tree.leaves(moment_paths(inner.init, state, PARAMS))
    return {n: x for (n, x), path in zip(named_leaves(state), paths, strict=True) if path}


# -- rounding ---------------------------------------------------------------------------------


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**32 - 1)
)
def test_rounding_gives_a_neighbour_and_stays_finite(value: float, bits: int) -> None:
    x = jnp.float32(value)
    got = np.asarray(stochastic_bfloat16(x, jnp.uint32(bits)))
    down = (np.asarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    up = np.uint32(down.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    assert np.isfinite(got.astype(np.float32))
    assert got.astype(np.float32) in (down, up)
    if down == np.float32(value):
        assert got.astype(np.float32) == down


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.1, 1e-38, 2.5e38])
def test_rounding_is_unbiased_over_all_bits(value: float) -> None:
    x = jnp.full(2**16, value, jnp.float32)
    rounded = stochastic_bfloat16(x, jnp.arange(2**16, dtype=jnp.uint32))
    mean = np.mean(np.asarray(rounded, np.float64))
    np.testing.assert_allclose(mean, float(np.float32(value)), rtol=1e-12)


def test_the_largest_numbers_do_not_become_infinite_and_the_others_pass() -> None:
    bits = jnp.full(6, 0xFFFF, jnp.uint32)
    largest = float(jnp.finfo(jnp.float32).max)
    x = jnp.array([largest, -largest, jnp.inf, -jnp.inf, jnp.nan, 0.0], jnp.float32)
    got = np.asarray(stochastic_bfloat16(x, bits), np.float32)
    top = float(jnp.finfo(jnp.bfloat16).max)
    np.testing.assert_array_equal(got, np.array([top, -top, np.inf, -np.inf, np.nan, 0.0]))


def test_random_bits_are_fair_and_differ_by_entry_leaf_count_and_seed() -> None:
    keys = leaf_keys(0, jnp.int32(5), 2)
    drawn = [
        np.asarray(random_bits(key, (512, 128)))
        for key in (*keys, leaf_keys(0, jnp.int32(6), 1)[0], leaf_keys(1, jnp.int32(5), 1)[0])
    ]
    ones = [np.unpackbits(d.view(np.uint8), bitorder="little").reshape(-1, 32) for d in drawn]
    for flags in ones:
        # 65536 draws: a share's standard deviation is 0.002.
        np.testing.assert_allclose(flags.mean(axis=0), 0.5, atol=0.01)
        along = (flags[1:] == flags[:-1]).mean(axis=0)
        np.testing.assert_allclose(along, 0.5, atol=0.01)
    for a in range(4):
        for b in range(a):
            np.testing.assert_allclose((ones[a] == ones[b]).mean(axis=0), 0.5, atol=0.01)


def test_an_average_that_nearest_rounding_stops_goes_on() -> None:
    ones = {"w": jnp.ones(4096)}
    means = {}
    for policy in ("float32", "bfloat16", STOCHASTIC):
        tx = ok.with_state_dtype(optax.ema(0.999, debias=False), policy, seed=3)

        def step(_: Any, state: Any, tx: Any = tx) -> Any:
            return tx.update(ones, state)[1]

        state = jax.lax.fori_loop(0, 1000, step, tx.init(ones))
        means[policy] = float(jnp.mean(state.inner_state.ema["w"].astype(jnp.float32)))
    exact = 1 - 0.999**1000
    assert means["float32"] == pytest.approx(exact, rel=1e-4)
    assert means["bfloat16"] < 0.5 * exact
    # One step adds a variance of at most (2**-9)**2 / 4; 1000 steps over 4096 entries: 5e-4.
    assert means[STOCHASTIC] == pytest.approx(exact, abs=2.5e-3)


# -- the wrapper ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "bytes_each"),
    [("float32", 8), ("bfloat16", 4), (STOCHASTIC, 4), ({"mu": jnp.bfloat16}, 6),
     ({"mu": STOCHASTIC, "nu": "float16"}, 4)],
)  # fmt: skip
def test_bytes_and_types_stay(policy: Any, bytes_each: int) -> None:
    inner = ok.scale_by_adam()
    tx = ok.with_state_dtype(inner, policy)
    _, state = run(tx, 2)
    held = moments_of(inner, state.inner_state)
    assert sum(x.nbytes for x in held.values()) == bytes_each * (32 + 4)
    before, after = tx.init(PARAMS), state
    assert jax.tree.map(lambda x: (x.dtype, x.shape), before) == jax.tree.map(
        lambda x: (x.dtype, x.shape), after
    )


def test_float32_is_the_inner_one_bit_for_bit() -> None:
    for inner in (ok.stable_spam(1e-2), optax.adamw(1e-2)):
        plain, plain_state = run(inner, 3)
        wrapped, state = run(ok.with_state_dtype(inner, "float32"), 3)
        for a, b in zip(
            jax.tree.leaves((plain, plain_state)),
            jax.tree.leaves((wrapped, state.inner_state)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_the_update_is_made_of_fresh_moments() -> None:
    tx = ok.with_state_dtype(optax.trace(0.5), "bfloat16")
    grads = jnp.array([1 + 2**-10])
    updates, state = tx.update(grads, tx.init(grads))
    assert float(updates[0]) == 1 + 2**-10
    assert float(state.inner_state.trace[0]) == 1
    updates, _ = tx.update(grads, state)
    assert float(updates[0]) == 1.5 + 2**-10  # from the stored one


@pytest.mark.parametrize("name", catalog.records("recipe"))
def test_every_recipe(name: str) -> None:
    record = catalog.find(name, "recipe")
    inner = record.build()
    tx = ok.with_state_dtype(record.build(), STOCHASTIC)
    step = functools.partial(call, record)
    state = jax.eval_shape(tx.init, PARAMS)
    _, after = jax.eval_shape(lambda g, s, p: step(tx, g, s, p), PARAMS, state, PARAMS)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)
    kinds = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    paths = jax.tree.leaves(moment_paths(inner.init, state.inner_state, PARAMS))
    fields = {path.rsplit("/", 1)[-1] for path in paths if path}
    if fields - protocols.PARAMETER_FIELDS:
        assert jnp.dtype(jnp.bfloat16) in kinds


@pytest.mark.parametrize("name", ["adamp", "muon", "schedule_free_adamw", "spam", "stable_spam"])
def test_a_first_step_is_the_inner_ones(name: str) -> None:
    record = catalog.find(name, "recipe")
    inner, tx = record.build(), ok.with_state_dtype(record.build(), STOCHASTIC)

    @jax.jit
    def both(grads: Any, params: Any) -> Any:
        return [tx.update(grads, tx.init(params), params)[0] for tx in (inner, wrapped)]

    wrapped = tx
    plain, rounded = both(grads_at(0), PARAMS)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_copies_of_parameters_stay_unless_named() -> None:
    inner = ok.schedule_free_adamw(0.1)
    for policy, z in (("bfloat16", "float32"), ({"z": "bfloat16"}, "bfloat16")):
        state = ok.with_state_dtype(inner, policy).init(PARAMS)
        kinds = {n.split("/z/")[-1]: x.dtype for n, x in named_leaves(state) if "/z/" in n}
        assert set(kinds.values()) == {jnp.dtype(z)}


def test_moments_wider_than_the_inner_ones() -> None:
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = ok.with_state_dtype(optax.adam(0.1), "float32")  # optax's own are in the params' dtype
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert state.inner_state[0].nu["w"].dtype == jnp.float32
    assert updates["w"].dtype == jnp.bfloat16


def test_a_restart_goes_on_bit_for_bit() -> None:
    tx = ok.with_state_dtype(ok.lion(1e-2), STOCHASTIC)
    straight = run(tx, 4)
    _, half = run(tx, 2)
    raw = [np.asarray(x).tobytes() for x in jax.tree.leaves(half)]
    shell = jax.eval_shape(tx.init, PARAMS)
    restored = jax.tree.unflatten(
        jax.tree.structure(shell),
        [
            jnp.asarray(np.frombuffer(r, x.dtype).reshape(x.shape))
            for r, x in zip(raw, jax.tree.leaves(shell), strict=True)
        ],
    )
    resumed = run(tx, 2, restored, start=2)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_inside_and_around_other_wrappers() -> None:
    make = ok.inject_hyperparams(ok.lion)
    for tx in (
        ok.momentum_reset(ok.with_state_dtype(make(learning_rate=0.1), STOCHASTIC), 2),
        ok.with_state_dtype(ok.skip_bad_steps(make(learning_rate=0.1)), STOCHASTIC),
        ok.skip_bad_steps(ok.with_state_dtype(make(learning_rate=0.1), STOCHASTIC)),
    ):
        _, state = run(tx, 3)
        mu = {x.dtype for n, x in named_leaves(state) if "/mu/" in n}
        assert mu == {jnp.dtype(jnp.bfloat16)}
        assert float(metrics(state)["learning_rate"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("int8", "policy must be a floating-point dtype or 'bfloat16_stochastic', got 'int8'"),
        ("bf16", "policy must be a floating-point dtype or 'bfloat16_stochastic', got 'bf16'"),
        (None, "got None"),
        ({"mu": "half?"}, r"policy\['mu'\] must be a floating-point dtype .* got 'half\?'"),
    ],
)
def test_policies_that_are_none(policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ok.with_state_dtype(optax.sgd(0.1), policy)


def test_a_field_that_is_not_there() -> None:
    tx = ok.with_state_dtype(ok.lion(0.1), {"nu": "bfloat16"})
    with pytest.raises(ValueError, match=r"names the state fields \['nu'\], but .* in \['mu'\]"):
        tx.init(PARAMS)


def test_a_seed_that_is_none() -> None:
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        ok.with_state_dtype(optax.sgd(0.1), "bfloat16", seed=-1)
