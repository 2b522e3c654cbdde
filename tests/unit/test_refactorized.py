"""Balanced factors, the wrapper that jumps to them, and the schedule that follows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optimkit as ok
from optimkit.matrices import refactorize, refactorize_params

balance = jax.jit(refactorize)


def factors(seed, *batch, inputs=6, rank=3, outputs=5, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(*batch, inputs, rank)), rng.normal(size=(*batch, rank, outputs))
    return jnp.asarray(a, dtype), jnp.asarray(30 * b, dtype)


# -- factors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 7])  # more columns than rows too
def test_the_product_stays_and_both_grams_are_its_singular_values(rank):
    a, b = factors(0, 2, rank=rank)
    new_a, new_b = map(np.asarray, balance(a, b))
    assert new_a.shape == a.shape
    assert new_b.shape == b.shape
    products = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    for product, x, y in zip(products, new_a, new_b, strict=True):
        values = np.zeros(rank)
        values[: min(rank, 5)] = np.linalg.svd(product)[1][:rank]
        close = {"rtol": 2e-6, "atol": 2e-6 * values[0]}
        np.testing.assert_allclose(x @ y, product, **close)
        np.testing.assert_allclose(x.T @ x, np.diag(values), **close)
        np.testing.assert_allclose(y @ y.T, np.diag(values), **close)


def test_low_precision_is_computed_in_f32_and_cast_once():
    given = factors(1, dtype=jnp.bfloat16)
    wide = balance(*(x.astype(jnp.float32) for x in given))
    for got, exact in zip(balance(*given), wide, strict=True):
        np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_whose_product_underflows_or_overflows(size):
    a, b = factors(2)
    ordinary, extreme = balance(a, b), balance(a * size, b * size)
    np.testing.assert_allclose(extreme[0] / size, ordinary[0], rtol=1e-4, atol=1e-5)


def test_pairs_without_a_product_stay():
    a, b = factors(3, 4)
    a = a.at[1].set(0).at[2, 0, 0].set(jnp.nan)
    # What the third of them adds up to is rounding error alone.
    line = jnp.outer(jnp.ones(6), jnp.array([1.0, 1.0, 0.0]))
    a, b = a.at[3].set(line), b.at[3].set(jnp.outer(jnp.array([1.0, -1.0, 0.0]), jnp.ones(5)))
    new_a, new_b = balance(a, b)
    np.testing.assert_array_equal(new_a[1:], a[1:])
    np.testing.assert_array_equal(new_b[1:], b[1:])
    assert float(jnp.max(jnp.abs(new_a[0] - a[0]))) > 1


def test_lost_rank_leaves_columns_without_gradient():
    a, b = factors(4)
    a = a.at[:, 2].set(a[:, 1])  # rank 2
    new_a, new_b = balance(a, b)
    np.testing.assert_allclose(new_a @ new_b, a @ b, rtol=1e-5, atol=1e-4)
    assert float(jnp.linalg.norm(new_a[:, 2])) < 1e-2 * float(jnp.linalg.norm(new_a[:, 1]))


# -- trees ------------------------------------------------------------------------------------


class Layer(NamedTuple):
    a: jax.Array
    b: jax.Array
    bias: jax.Array


def test_pairs_in_every_container():
    a, b = factors(5)
    stack = factors(6, 2)
    params = {
        "query": {"lora_a": a, "lora_b": b, "kernel": jnp.ones((6, 5))},
        "linen": {"lora_a": {"kernel": a}, "lora_b": {"kernel": b}},
        "layer": Layer(a, b, jnp.ones(5)),
        "stack": {"lora_A": stack[0], "lora_B": stack[1]},
        "norm": {"b": jnp.ones(5)},
    }
    new = jax.jit(refactorize_params)(params)
    expected = balance(a, b)
    for found in (
        (new["query"]["lora_a"], new["query"]["lora_b"]),
        (new["linen"]["lora_a"]["kernel"], new["linen"]["lora_b"]["kernel"]),
        new["layer"][:2],
    ):
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(new["stack"].values(), balance(*stack), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new["query"]["kernel"], params["query"]["kernel"])


def test_nnx_state():
    model = nnx.LoRA(6, 3, 5, rngs=nnx.Rngs(0))
    model.lora_b[...] = factors(7)[1]
    state = nnx.state(model, nnx.LoRAParam)
    new = jax.jit(refactorize_params)(state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    before, after = (s["lora_a"][...] @ s["lora_b"][...] for s in (state, new))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    a, b = new["lora_a"][...], new["lora_b"][...]
    np.testing.assert_allclose(a.T @ a, b @ b.T, rtol=1e-4, atol=1e-4)


def either(first, second):
    return {first, second} == {"x", "y"}


@pytest.mark.parametrize(
    ("shapes", "is_pair", "message"),
    [
        ({"q/lora_a": (4, 2)}, None, "'q/lora_a' has no partner: there is no matrix 'q/lora_b'"),
        ({"q/lora_b": (2, 4)}, None, "'q/lora_b' has no partner: there is no matrix 'q/lora_a'"),
        (
            {"q/lora_a": (4, 2), "q/lora_b": (3, 4)},
            None,
            r"'q/lora_a' of shape \(4, 2\) and 'q/lora_b' of shape \(3, 4\) do not fit",
        ),
        ({"a": (4, 2), "b": (3, 4)}, None, r"'a' of shape \(4, 2\) and 'b' of shape \(3, 4\)"),
        ({"x": (2,), "y": (2, 3)}, lambda a, b: a == "x" and b == "y", "'x' of shape"),
        (
            {"x": (2, 2), "y": (2, 2)},
            either,
            r"two pairs of factors, \['y', 'x'\] and \['x', 'y'\]",
        ),
        ({"kernel": (4, 2), "b": (4,)}, None, r"no pair of factors .* are \['b', 'kernel'\]"),
    ],
)
def test_bad_pairs(shapes, is_pair, message):
    params = {}
    for name, shape in shapes.items():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.ones(shape)
    with pytest.raises(ValueError, match=message):
        refactorize_params(params, is_pair)
    with pytest.raises(ValueError, match=message):
        ok.refactorized(optax.sgd(0.1), 2, is_pair=is_pair).init(params)


def test_bad_factors():
    with pytest.raises(ValueError, match=r"'a' of shape \(2, 3\) and 'b' of shape \(2, 3\)"):
        refactorize(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="int32"):
        refactorize(jnp.ones((2, 3), int), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="interval must be an integer >= 0, got -1"):
        ok.refactorized(optax.sgd(0.1), -1)


# -- the wrapper ------------------------------------------------------------------------------


def training(tx, steps, a, b):
    """Losses before and after each update by the gradient alone, and the parameters."""
    params = {"lora_a": a, "lora_b": b, "bias": jnp.zeros(5)}
    target = jnp.asarray(np.random.default_rng(9).normal(size=(6, 5)), jnp.float32)

    def loss(p):
        return jnp.sum((p["lora_a"] @ p["lora_b"] + p["bias"][None] - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, loss(params))

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=steps)[1])
    return run(params)


def test_a_trigger_moves_the_factors_and_not_the_function():
    a, b = factors(8)
    plain, plain_losses = training(optax.sgd(1e-5), 3, a, b)
    jumps, losses = training(ok.refactorized(optax.sgd(1e-5), 3), 3, a, b)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-5)
    np.testing.assert_allclose(jumps["bias"], plain["bias"], rtol=1e-5)
    np.testing.assert_allclose(jumps["lora_a"][:2], plain["lora_a"][:2], rtol=1e-6)
    landed = balance(plain["lora_a"][2], plain["lora_b"][2])
    for name, wanted in zip(("lora_a", "lora_b"), landed, strict=True):
        np.testing.assert_allclose(jumps[name][2], wanted, rtol=1e-5, atol=1e-5)


def test_state_is_made_anew_after_a_trigger():
    tx = ok.refactorized(optax.adam(0.1), 2)
    params = {"a": jnp.full((2, 1), 4.0), "b": jnp.ones((1, 2))}
    grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    counts = []
    for _ in range(5):
        _, state = tx.update(grads, state, params)
        counts.append(int(optax.tree.get(state.inner_state, "count")))
    assert counts == [1, 2, 1, 2, 1]
    assert int(state.count) == 5


def test_interval_zero_is_the_inner_one():
    a, b = factors(10)
    plain, _ = training(optax.sgd(1e-5), 3, a, b)
    off, _ = training(ok.refactorized(optax.sgd(1e-5), 0), 3, a, b)
    jax.tree.map(np.testing.assert_array_equal, off, plain)


# -- the schedule -----------------------------------------------------------------------------


def rates(n, **kwargs):
    return np.asarray(ok.cosine_quick_recovery_schedule(2.0, 8, **kwargs)(np.arange(n)))


def test_recoveries_lead_back_to_the_cosine():
    plain = rates(12, warmup_steps=2, restart_interval=0)
    np.testing.assert_allclose(plain[[0, 1, 2, 5, 8, 11]], [0, 1, 2, 1.1, 0.2, 1.1], rtol=1e-6)
    got = rates(12, warmup_steps=2, restart_interval=6, recovery_steps=3)
    np.testing.assert_array_equal(got[[4, 5, 10, 11]], plain[[4, 5, 10, 11]])
    ramp = np.array([0.001, 0.5005, 1.0])
    np.testing.assert_allclose(got[:3], plain[3] * ramp, rtol=1e-6)
    np.testing.assert_allclose(got[6:9], plain[9] * ramp, rtol=1e-6)


@pytest.mark.parametrize("recovery_steps", [0, 1])
def test_recovery_without_a_ramp(recovery_steps):
    got = rates(8, warmup_steps=0, restart_interval=4, recovery_steps=recovery_steps)
    plain = rates(9, warmup_steps=0, restart_interval=0)
    np.testing.assert_array_equal(got[[1, 2, 3, 5, 6, 7]], plain[[1, 2, 3, 5, 6, 7]])
    np.testing.assert_array_equal(got[[0, 4]], plain[[recovery_steps, 4 + recovery_steps]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_value": -1.0}, "peak_value must be >= 0, got -1"),
        ({"min_ratio": 1.5}, "min_ratio must be >= 0 and <= 1, got 1.5"),
        ({"total_steps": -1}, "total_steps must be >= 0, got -1"),
        ({"restart_interval": -1}, "restart_interval must be >= 0, got -1"),
        ({"recovery_steps": -1}, "recovery_steps must be >= 0, got -1"),
    ],
)
def test_bad_schedule(change, message):
    kwargs = {"peak_value": 1.0, "total_steps": 8, "warmup_steps": 0, "restart_interval": 4}
    with pytest.raises(ValueError, match=message):
        ok.cosine_quick_recovery_schedule(**{**kwargs, **change})
