"""Accumulation: equal to optax.MultiSteps, one buffer, and a step only when it is due."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}


def grads_at(step: int) -> Any:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def test_equal_to_multisteps_around_a_chain() -> None:
    inner = optax.chain(optax.clip_by_global_norm(1.0), ok.lion(1e-2, weight_decay=0.1))
    ours: Any = ok.accumulate(inner, 3)
    theirs: Any = optax.MultiSteps(inner, 3)
    step, other = jax.jit(ours.update), jax.jit(theirs.update)
    state, reference = ours.init(PARAMS), theirs.init(PARAMS)
    for number in range(7):
        g = grads_at(number)
        u, state = step(g, state, PARAMS)
        v, reference = other(g, reference, PARAMS)
        for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert all(bool(jnp.any(x)) == (number % 3 == 2) for x in jax.tree.leaves(u))
    assert int(optax.tree.get(state.inner_state, "mu")["w"].size) == 12
    assert int(state.count) == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_stochastic"])
def test_a_narrow_buffer(dtype: str) -> None:
    tx: Any = ok.accumulate(optax.sgd(1.0), 64, dtype)
    step = jax.jit(tx.update)
    g = u = jnp.full(4096, 0.3)
    state = tx.init(g)
    assert state.gradient_mean.dtype == jnp.bfloat16
    for _ in range(64):
        u, state = step(g, state, g)
    assert not np.any(np.asarray(state.gradient_mean, np.float32))
    assert float(jnp.mean(u)) == pytest.approx(-0.3, rel=1e-3 if "_" in dtype else 0.05)


def test_one_conditional_holds_the_inner_step() -> None:
    tx: Any = ok.accumulate(ok.scale_by_adam(), 2)
    program = jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    conditionals = [e for e in program.eqns if e.primitive.name == "cond"]
    assert len(conditionals) == 1
    waiting, due = map(str, conditionals[0].params["branches"])
    assert "sqrt" in due
    assert "sqrt" not in waiting
    assert str(program).count("sqrt") == due.count("sqrt")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        ok.accumulate(optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype .* got 'int8'"):
        ok.accumulate(optax.sgd(0.1), 2, "int8")
    tx: Any = ok.accumulate(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match="gradient leaf 'w' has shape"):
        tx.update({**PARAMS, "w": jnp.ones(3)}, tx.init(PARAMS), PARAMS)
