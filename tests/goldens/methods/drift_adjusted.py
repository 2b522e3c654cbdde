"""The rate, its norms and the loss of every step; and games of two players.

The gradients of the recordings depend on the parameters, and are taken where we are: a finite
difference between there and a recorded gradient multiplies rounding by some 300 a step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.gradients import drift_coefficients, hessian_gradient, two_player_drift_gradients
from optimkit.numerics import tree_norm
from tests.goldens.adapters import arrays_of, build, compare_named
from tests.goldens.golden import Golden, before_each_step, flatten, nest

NOT_COMPARED = {
    "quad": "input: the loss is w'Aw/2 - b'w + c sum(w^4)/4",
    "game": "input: the matrices of the two losses",
    "disc0": "input: where player 1 starts",
    "gen0": "input: where player 2 starts",
}


def loss_of(golden: Golden) -> Any:
    quad = {name: jnp.asarray(value) for name, value in golden.tree("quad").items()}
    order = list(golden.meta["leaves"])

    def loss(params: Any) -> Any:
        flat = flatten(params)
        x = jnp.concatenate([jnp.ravel(flat[name]) for name in order])
        return x @ quad["A"] @ x / 2 - quad["b"] @ x + quad["c"] * jnp.sum(x**4) / 4

    return loss


def extras(golden: Golden) -> dict[str, Any]:
    """The extra arguments of every update of a trajectory."""
    return {"value_fn": loss_of(golden)}


def gradient(golden: Golden) -> Any:
    """The gradient at any parameters, which then replaces the recorded ones."""
    return jax.grad(loss_of(golden))


def observe(golden: Golden, params: Any, states: Any) -> dict[str, Any]:
    before = nest(before_each_step(golden, params))
    return {
        **measured(golden, before),
        "learning_rate": optax.tree.get(states, "learning_rate"),
        **given_products(golden),
    }


def measured(golden: Golden, before: Any) -> dict[str, Any]:
    """Loss and norms at the parameters before every step."""
    loss = loss_of(golden)

    def at(params: Any) -> dict[str, Any]:
        grads = jax.grad(loss)(params)
        curved = hessian_gradient(loss, params, grads, golden.kwargs["hvp"])
        return {"loss": loss(params), "grad_norm": tree_norm(grads), "hg_norm": tree_norm(curved)}

    return jax.vmap(at)(before)


def given_products(golden: Golden) -> dict[str, Any]:
    """The run once more, given the Hessian's products instead of a loss."""
    loss, tx, start = loss_of(golden), build(golden), arrays_of(golden, "params0")

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params)
        curved = hessian_gradient(loss, params, grads, golden.kwargs["hvp"])
        updates, state = tx.update(grads, state, params, hg=curved)
        params = optax.apply_updates(params, updates)
        return (params, state), {"grads": grads, "params": params}

    _, seen = jax.lax.scan(step, (start, tx.init(start)), None, length=golden.meta["steps"])
    return flatten(seen)


def run(golden: Golden) -> dict[str, float]:
    """A game, played with the corrected gradients."""
    game = {name: jnp.asarray(value) for name, value in golden.tree("game").items()}
    kwargs = golden.kwargs

    def loss_1(d: Any, g: Any) -> Any:
        coupled = game["c1"] * jnp.sum(d**2) * jnp.sum(g**2)
        return d @ game["D1"] @ d / 2 + d @ game["B1"] @ g + g @ game["G1"] @ g / 2 + coupled

    def loss_2(d: Any, g: Any) -> Any:
        coupled = game["c2"] * jnp.sum(d**2) * jnp.sum(g**2)
        return d @ game["D2"] @ d / 2 - d @ game["B2"] @ g + g @ game["G2"] @ g / 2 + coupled

    names, rates = ("disc", "gen"), kwargs["learning_rates"]
    losses, turns = (loss_1, loss_2), ((0, 1), (1, 0))[kwargs["first_player"] == "second"]
    at = [jnp.asarray(golden.arrays["disc0"]), jnp.asarray(golden.arrays["gen0"])]
    history: dict[str, list[Any]] = {}
    for _ in range(golden.meta["steps"]):
        here = list(at)
        for player in turns:
            for _ in range(1 if kwargs["simultaneous"] else kwargs["num_updates"][player]):
                where = here if kwargs["simultaneous"] else list(at)
                corrected = two_player_drift_gradients(loss_1, loss_2, *where, **kwargs)[player]
                plain = jax.grad(losses[player], argnums=player)(*where)
                at[player] = at[player] - rates[player] * corrected
            history.setdefault(f"{names[player]}_grad", []).append(plain)
            history.setdefault(f"{names[player]}_reg", []).append(corrected - plain)
            history.setdefault(names[player], []).append(at[player])
    scales = {name: kwargs[name] for name in ("simultaneous", "first_player", "num_updates")}
    coefficients = jnp.asarray(drift_coefficients(tuple(rates), **scales))
    # The recording has a third column, of a term that is never used.
    named = {"coeffs": jnp.pad(coefficients, ((0, 0), (0, 1)))}
    named |= {name: jnp.stack(values) for name, values in history.items()}
    return compare_named(golden, named)
