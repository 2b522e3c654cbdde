"""Walking over trees: casts, checks, and finding parameters in a state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit import leaves


def test_map_leaves_computes_wide_and_returns_what_came() -> None:
    seen = []

    def step(g: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen.append((g.dtype, m.dtype))
        return g * 2, m + g

    updates, state = leaves.map_leaves(
        step, {"a": jnp.ones(2, jnp.bfloat16)}, {"a": jnp.zeros(2, jnp.float16)}
    )
    assert seen == [(jnp.float32, jnp.float32)]
    assert updates["a"].dtype == jnp.bfloat16
    assert state["a"].dtype == jnp.float16


def test_map_leaves_keeps_the_statistics_of_a_leaf_scalar() -> None:
    _, total = leaves.map_leaves(
        lambda g, s: (g, s + g.sum()), {"a": jnp.ones(3)}, {"a": jnp.zeros(())}
    )
    assert float(total["a"]) == 3.0


@pytest.mark.parametrize("shape", [(1, 3), (3, 2), (3,), ()])
def test_a_gradient_that_would_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'layer/kernel' has shape .* has \(2, 3\)"):
        leaves.map_leaves(
            lambda g, m: (g, m),
            {"layer": {"kernel": jnp.ones(shape)}},
            {"layer": {"kernel": jnp.ones((2, 3))}},
        )


def test_a_gradient_for_a_scalar_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'t' has shape \(3,\)"):
        leaves.map_leaves(lambda g, m: (g + m, g + m), {"t": jnp.ones(3)}, {"t": jnp.ones(())})


def test_another_tree_is_refused_by_name() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = ok.lion(0.1)
    with pytest.raises(ValueError, match=r"missing leaves \['b'\], unexpected leaves \['c'\]"):
        tx.update({"a": jnp.ones(2), "c": jnp.ones(2)}, tx.init(params), params)


def test_recipe_widens_inside_and_casts_once() -> None:
    seen = {}

    def spy(updates, state, params=None):
        seen["gradient"], seen["params"] = updates.dtype, params.dtype
        return updates * (1 + 2.0**-12), state

    tx = leaves.recipe(
        optax.GradientTransformation(lambda p: optax.EmptyState(), spy), optax.scale(3.0)
    )
    params = jnp.ones(2, jnp.bfloat16)
    updates, _ = tx.update(jnp.ones(2, jnp.bfloat16), tx.init(params), params)
    assert seen == {"gradient": jnp.float32, "params": jnp.float32}
    assert updates.dtype == jnp.bfloat16


def test_complex_and_integer_leaves_get_advice() -> None:
    tx = ok.lion(0.1)
    with pytest.raises(
        TypeError, match=r"'w' has dtype complex64: wrap .*split_real_and_imaginary"
    ):
        tx.init({"w": jnp.ones(2, jnp.complex64)})
    with pytest.raises(TypeError, match=r"'w' has dtype int32: leave it out"):
        tx.init({"w": jnp.ones(2, jnp.int32)})


def test_the_advice_for_complex_leaves_works() -> None:
    tx = optax.contrib.split_real_and_imaginary(ok.lion(0.1))
    params = {"w": jnp.array([1 + 1j, 2 - 1j])}
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], np.array([-0.1 - 0.1j, -0.1 + 0.1j]), rtol=1e-6)


def test_places_of_parameters_are_found() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(())}
    tx = ok.inject_hyperparams(ok.lion)(0.1)
    marks = leaves.map_param_state(
        tx.init, lambda name, leaf: name, lambda leaf: "-", tx.init(params)
    )
    found = sorted(mark for mark in jax.tree.leaves(marks) if mark != "-")
    assert found == ["a", "b"]


def test_moments_are_found_with_the_field_that_holds_them() -> None:
    params = {"mu": {"kernel": jnp.ones((2, 3))}, "scale": jnp.ones(3)}
    tx = optax.chain(
        ok.clip_by_tracked_max(0.9), ok.by_kind(optax.trace(0.9), optax.adam(0.1), ["mu/*"])
    )
    state = tx.init(params)
    paths = leaves.moment_paths(tx.init, state, params)
    assert jax.tree.structure(paths) == jax.tree.structure(state)
    # The clip keeps one number a leaf, which is no moment; nor is a count.
    assert sorted({path for path in jax.tree.leaves(paths) if path}) == [
        "1/inner_states/matrix/inner_state/trace",
        "1/inner_states/vector/inner_state/0/mu",
        "1/inner_states/vector/inner_state/0/nu",
    ]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"a": True}, "leaves ['a'], the parameters have ['a', 'b']"),
        ([True], "tree of bools like the parameters"),
        ({"a": 0.5, "b": True}, "True = decayed, got 0.5"),
        (lambda params: {"c": True}, "leaves ['c']"),
    ],
)
@pytest.mark.parametrize("name", ["lion", "adamp", "decay_after_step"])
def test_a_mask_of_another_structure_is_one_clear_sentence(name, mask, words) -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = getattr(ok, name)(learning_rate=0.1, weight_decay=0.1, mask=mask)
    with pytest.raises(ValueError, match="mask must") as error:
        tx.update(params, tx.init(params), params)
    assert words in str(error.value)
