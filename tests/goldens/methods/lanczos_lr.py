"""A tiny network's Hessian and Gauss-Newton matrix, found by products alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from optimkit.diagnostics import hessian_extremes, hessian_trace, sharpness
from optimkit.gradients import (
    fisher_product,
    gauss_newton_product,
    hessian_product,
    lanczos,
    slq_density,
)
from tests.goldens.adapters import arrays_of
from tests.goldens.golden import Golden, relative_error

NOT_COMPARED = {
    **dict.fromkeys(("x", "y", "v0", "params0"), "input"),
    "hess_var_mean": "an input of noisy_extreme",
}


def run(golden: Golden, **overrides: Any) -> dict[str, float]:
    del overrides
    x, y, v0 = (jnp.asarray(golden.arrays[name]) for name in ("x", "y", "v0"))
    params = arrays_of(golden, "params0")
    _, unravel = ravel_pytree(params)
    depth = len(params)

    def logits_of(params: Any) -> Any:
        h = x
        for index in range(depth):
            layer = params[f"dense_{index}"]
            h = h @ layer["kernel"] + layer["bias"][None]
            h = jnp.tanh(h) if index < depth - 1 else h
        return h

    def losses_of(logits: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def loss(params: Any, batch: Any = None) -> Any:
        del batch
        return losses_of(logits_of(params)).mean()

    def hessian(v: Any) -> Any:
        return hessian_product(loss, params, v)

    def gauss_newton(v: Any) -> Any:
        return gauss_newton_product(logits_of, lambda z: losses_of(z).mean(), params, v)

    def fisher(v: Any) -> Any:
        return fisher_product(lambda p: losses_of(logits_of(p)), params, v)

    def trace(product: Any) -> Any:
        """Exactly, by every unit vector."""
        rows = jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0])(jnp.eye(v0.size))
        return jnp.trace(rows)

    start, key = unravel(v0), jax.random.key(0)
    image = ravel_pytree(hessian(start))[0]
    eigs, ggn = golden.arrays["hessian_eigs"], golden.arrays["ggn_eigs"]
    whole = lanczos(hessian, start, v0.size)
    nodes, weights = slq_density(whole.alphas, whole.betas)
    basis = jax.vmap(lambda v: ravel_pytree(v)[0])(whole.basis)
    curved = lanczos(gauss_newton, start, v0.size)
    ritz = slq_density(curved.alphas, curved.betas)[0]
    few = lanczos(hessian, start, golden.kwargs["num_iters"])
    found = slq_density(few.alphas, few.betas)
    powers = np.arange(5)
    nodes_few, weights_few = (np.asarray(part) for part in found)
    moments = np.sum(weights_few * nodes_few ** powers[:, None], axis=1)
    exact = np.sum(golden.arrays["v0_weights"] * eigs ** powers[:, None], axis=1)
    extremes = hessian_extremes(loss, params, None, key, v0.size)
    estimate = hessian_trace(loss, params, None, key, num_samples=400)
    # Four standard errors, by the bound that the function states.
    off = jnp.abs(estimate - golden.arrays["hessian_trace"])
    likely = off <= 4 * jnp.sqrt(2 * golden.arrays["hessian_fro2"] / 400)
    ends = np.array([eigs.min(), eigs.max()])
    alive = np.asarray(jnp.sum(basis**2, axis=1)) > 0.5
    ours = {
        "loss": relative_error(loss(params), golden.arrays["loss"]),
        "Hv0": relative_error(image, golden.arrays["Hv0"]),
        "v0_Hv0": relative_error(whole.alphas[0], golden.arrays["v0_Hv0"]),
        "hessian_eigs (ends)": relative_error(nodes[jnp.array([0, -1])], ends),
        "hessian_eigs (random start)": relative_error(
            jnp.stack([extremes["lambda_min"], extremes["lambda_max"]]), ends
        ),
        "hessian_eigs (sharpness)": relative_error(
            sharpness(loss, params, None, key, v0.size), ends[1]
        ),
        "ggn_eigs (ends)": relative_error(
            ritz[jnp.array([0, -1])], np.array([ggn.min(), ggn.max()])
        ),
        "v0_weights (moments)": relative_error(moments, exact),
        "hessian_trace (exact)": relative_error(trace(hessian), golden.arrays["hessian_trace"]),
        "hessian_trace (estimate)": 0.0 if likely else float("inf"),
        "hessian_fro2 (density)": relative_error(
            jnp.sum(
                jax.vmap(lambda e: jnp.sum(ravel_pytree(hessian(unravel(e)))[0] ** 2))(
                    jnp.eye(v0.size)
                )
            ),
            golden.arrays["hessian_fro2"],
        ),
        "ggn_trace": relative_error(trace(gauss_newton), golden.arrays["ggn_trace"]),
        "emp_fisher_trace": relative_error(trace(fisher), golden.arrays["emp_fisher_trace"]),
        "v0 (basis)": relative_error(basis[alive] @ basis[alive].T, np.eye(int(alive.sum()))),
    }
    assert jnp.all(weights >= 0)
    return ours
