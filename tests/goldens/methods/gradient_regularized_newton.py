"""A problem given by its data: gradients are taken where we are, and every step is compared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tests.goldens.adapters import build, compare_named
from tests.goldens.golden import Golden, relative_error

NOT_COMPARED = dict.fromkeys(("A0", "b", "mu", "params0"), "input: the problem")


def loss_of(golden: Golden) -> tuple[Any, Any]:
    """f(x) = mu logsumexp((A x - b) / mu), and the products of its weighted Gauss-Newton matrix."""
    a, b, mu = (jnp.asarray(golden.arrays[name]) for name in ("A0", "b", "mu"))

    def loss(params: Any) -> Any:
        return mu * jax.nn.logsumexp((a @ params["x"] - b) / mu)

    def product(params: Any, v: Any) -> Any:
        weights = jax.nn.softmax((a @ params["x"] - b) / mu)
        return {"x": a.T @ (weights * (a @ v["x"])) / mu}

    return loss, product if golden.kwargs["hessian"] == "gauss_newton" else None


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    loss, product = loss_of(golden)
    errors = {}
    for solver in ("dense", "cg"):
        # The authors' test has no tolerance for rounding.
        changes = {"solver": solver, "noise_tolerance": 0, "cg_tol": 1e-15, **overrides}
        tx = build(golden, **changes)

        def step(carry: Any, _: Any, tx: Any = tx) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(
                grads, state, params, value=value, value_fn=loss, hvp_fn=product
            )
            moved: Any = optax.apply_updates(params, updates)
            norm = optax.tree.norm(jax.grad(loss)(moved))
            seen = (moved["x"], loss(moved), norm, state[0].gamma, state[0].solves)
            return (moved, state), seen

        start = {"x": jnp.asarray(golden.arrays["params0/x"])}
        first = tx.init(start)
        before = (loss(start), jnp.linalg.norm(jax.grad(loss)(start)["x"]), *first[0][1:])
        _, (xs, *after) = jax.lax.scan(step, (start, first), None, length=golden.meta["steps"])
        values, norms, gammas, solves = (
            jnp.concatenate([jnp.asarray(b)[None], a]) for b, a in zip(before, after, strict=True)
        )
        named = {"func": values, "grad_norm": norms, "gamma": gammas, "inner_solves": solves}
        found = compare_named(golden, named)
        origin = golden.arrays["params0/x"]
        found["params/x"] = relative_error(xs, golden.arrays["params/x"], origin)
        # CG stops at its tolerance; gamma and the number of solves must still be the same.
        loose = 1.0 if solver == "dense" else 1e-4
        errors |= {f"{name} ({solver})": loose * error for name, error in found.items()}
    return errors
