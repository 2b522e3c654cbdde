"""ROOT: coefficients by size, their fit, and the chain of clipping and Newton-Schulz."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimkit as ok
from optimkit.matrices import ROOT_COEFFS, fit_ns_coefficients, newton_schulz
from optimkit.matrices.coefficients import (
    POWERS,
    coefficients_by_size,
    gaussian_spectrum,
    nelder_mead,
    orthogonality_error,
    power_spectrum,
)
from optimkit.matrices.newton_schulz import KELLER

PARAMS = {"up": {"kernel": jnp.zeros((4, 6))}, "down": {"kernel": jnp.zeros((6, 4))}}


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def first_step(tx, params, grads):
    return tx.update(grads, tx.init(params), params)[0]


# -- coefficients -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", ROOT_COEFFS)
def test_published_coefficients_beat_kellers(size):
    spectrum = gaussian_spectrum(*size)
    assert np.linalg.norm(spectrum) * np.sqrt(min(size) / len(spectrum)) == pytest.approx(1)
    published = orthogonality_error(ROOT_COEFFS[size], spectrum)
    assert published < 0.85 * orthogonality_error(KELLER, spectrum)


@pytest.mark.parametrize("size", [(2048, 2048), (2048, 16384)])
def test_fitted_coefficients_beat_the_published(size):
    random = gaussian_spectrum(*size)

    def heavy(coeffs):
        return sum(orthogonality_error(coeffs, power_spectrum(*size, p)) for p in POWERS)

    fitted = fit_ns_coefficients(*size)
    assert fitted == fit_ns_coefficients(*reversed(size))
    error = orthogonality_error(fitted, random)
    assert error < orthogonality_error(ROOT_COEFFS[size], random)
    # On random matrices alone the fit is closer there, and worse elsewhere.
    narrow = fit_ns_coefficients(*size, mixture=1.0)
    assert orthogonality_error(narrow, random) < error
    assert heavy(narrow) > heavy(fitted)


def test_the_spectrum_is_that_of_a_random_matrix():
    x = np.random.default_rng(0).normal(size=(120, 480))
    values = np.linalg.svd(x, compute_uv=False)[::-1]
    np.testing.assert_allclose(
        gaussian_spectrum(480, 120, points=120), values / np.linalg.norm(values), atol=2.5e-3
    )


def test_the_fit_predicts_what_newton_schulz_does():
    x = np.random.default_rng(0).normal(size=(64, 256))
    fitted = fit_ns_coefficients(64, 256, 3, spectra=[np.linalg.svd(x, compute_uv=False)])

    def error(coeffs):
        done = np.asarray(newton_schulz(jnp.asarray(x, jnp.float32), 3, coeffs), np.float64)
        return np.mean(np.square(np.square(np.linalg.svd(done, compute_uv=False)) - 1))

    assert error(fitted) < 0.5 * error(KELLER)
    predicted = orthogonality_error(fitted, gaussian_spectrum(64, 256), 3)
    assert error(fitted) == pytest.approx(predicted, rel=0.1)


def test_minimax_lowers_the_worst_spectrum():
    def worst(coeffs):
        spectra = [power_spectrum(32, 64, p) for p in POWERS]
        return max(orthogonality_error(coeffs, s) for s in [*spectra, gaussian_spectrum(32, 64)])

    assert worst(fit_ns_coefficients(32, 64, objective="minimax")) < worst(
        fit_ns_coefficients(32, 64)
    )


def test_the_simplex_walks_round_what_is_infinite():
    def valley(x):
        return (x[0] - 3) ** 2 + (x[1] + 1) ** 2 if x[0] < 2 else float("inf")

    np.testing.assert_allclose(nelder_mead(valley, np.zeros(2)), [2.0, -1.0], atol=1e-2)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"m": 0}, "m must be an integer >= 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer >= 1"),
        ({"mixture": 2}, "mixture must be >= 0 and <= 1, got 2"),
        ({"objective": "mean"}, "objective must be one of 'mse', 'minimax', got 'mean'"),
        ({"spectra": [np.ones((2, 2))]}, "spectra must be lists of finite singular values"),
        ({"spectra": [[1.0, float("nan")]]}, "spectra must be lists of finite"),
    ],
)
def test_bad_arguments_of_the_fit(keywords, message):
    with pytest.raises(ValueError, match=message):
        fit_ns_coefficients(**{"m": 8, "n": 8, **keywords})


def test_sizes_are_found_in_either_order():
    find = coefficients_by_size({(6, 4): "dion", "3x3": (1.5, -0.5, 0.0)}, KELLER, 5)
    assert find(4, 6) == find(6, 4) == "dion"
    assert find(3, 3) == (1.5, -0.5, 0.0)
    assert find(4, 4) == KELLER


# -- the recipe -------------------------------------------------------------------------------


def test_first_step_by_hand():
    # Entries 4 and 3 are cut to 2, which makes two equal singular values, 1/sqrt(2) of the norm.
    tx = ok.root(
        0.1, weight_decay=0.5, threshold=2.0, ns_steps=1, coeff_table={"2x2": (1.5, -0.5, 0.0)}
    )
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.array([2.0])}
    grads = {"kernel": jnp.array([[0.0, 3.0], [-4.0, 0.0]]), "bias": jnp.array([-7.0])}
    updates = first_step(tx, params, grads)
    s = 0.2 * np.sqrt(2) * (1.5 - 0.5 / 2) / np.sqrt(2)
    expected = -0.1 * (np.array([[0.0, s], [-s, 0.0]]) + 0.5)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [-0.1 * (-1 + 0.5 * 2)], atol=1e-7)


def test_without_clipping_and_with_kellers_table_it_is_muon():
    grads = random_like(PARAMS)
    ours = ok.root(0.1, quantile=1.0, coeff_table={})
    muon = ok.muon(
        0.1, weight_decay=0.1, scaling="moonlight", momentum_form="sum", ns_dtype="float32"
    )
    for got, expected in zip(
        jax.tree.leaves(first_step(ours, PARAMS, grads)),
        jax.tree.leaves(first_step(muon, PARAMS, grads)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_one_spike_does_not_turn_the_step():
    grads = random_like({"kernel": jnp.zeros((16, 16))})
    spiked = {"kernel": grads["kernel"].at[3, 5].set(1e4)}

    def turned(tx):
        clean, other = (first_step(tx, grads, g)["kernel"] for g in (grads, spiked))
        return float(jnp.linalg.norm(clean - other) / jnp.linalg.norm(clean))

    clipped = turned(ok.root(0.1, weight_decay=0.0, coeff_table={}))
    assert clipped < 0.5 < turned(ok.root(0.1, weight_decay=0.0, coeff_table={}, quantile=1.0))


def test_only_the_default_table_warns_of_other_sizes():
    with pytest.warns(UserWarning, match=r"root: no coefficients .* 4x6 \('down/kernel'\)"):
        ok.root(0.1).init(PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ok.root(0.1, coeff_table={}).init(PARAMS)
        ok.root(0.1).init({"embed": {"embedding": jnp.ones((5, 2))}, "bias": jnp.ones(2)})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"coeff_table": {"4x6": (1.0, 2.0)}}, r"coeff_table\['4x6'\]: ns_coeffs must be a name"),
        ({"coeff_table": {(4, 6): [(1, 2, 3)] * 3}}, r"\(4, 6\)\]: .*3 steps, ns_steps is 5"),
        ({"coeff_table": {"four": KELLER}}, "a key must be two sides, .* got 'four'"),
        ({"coeff_table": {(4, 6, 8): KELLER}}, r"two sides, .* got \(4, 6, 8\)"),
        ({"fallback_coeffs": "kellar"}, "fallback_coeffs: .*'kellar'"),
        ({"scaling": "adam"}, "scaling must be one of .*'moonlight'.* got 'adam'"),
        ({"quantile": 90}, "quantile must be >= 0 and <= 1, got 90"),
        ({"threshold": -1.0}, "threshold must be >= 0, got -1"),
        ({"momentum_form": "mean"}, "form must be one of 'ema', 'sum', got 'mean'"),
        ({"ns_steps": 0}, "ns_steps must be an integer >= 1"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        ok.root(0.1, **keywords)


def test_a_vector_is_no_matrix():
    tx = ok.root(0.1, coeff_table={}, matrix_leaves=["bias"])
    with pytest.raises(ValueError, match=r"leaf 'bias' of shape \(2,\).*no matrix"):
        tx.init({"bias": jnp.ones(2)})
