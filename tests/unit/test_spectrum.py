"""Ranks and decay of spectra that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimkit import track_update_spectrum
from optimkit.diagnostics import (
    alpha_req,
    effective_rank,
    effective_rank_dynamics,
    eigenspectrum,
    metrics,
    rankme,
)
from optimkit.protocols import MatrixAxes

X = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)


def test_equal_rows_have_rank_one_and_nothing_divides_by_zero():
    same = jnp.ones((5, 3))
    assert eigenspectrum(same).tolist() == [0, 0, 0]
    for value in (rankme(same), effective_rank(same), effective_rank(same, method="gram")):
        np.testing.assert_allclose(value, 1, atol=1e-4)
    assert effective_rank(X[:1]) == 1


def test_scale_and_dtype_do_not_matter():
    for scale in (1e-15, 1e15):
        np.testing.assert_allclose(rankme(X * scale), rankme(X), rtol=1e-5)
        np.testing.assert_allclose(effective_rank(X * scale, method="gram", eps=0.0),
                                   effective_rank(X, eps=0.0), rtol=1e-3)  # fmt: skip
    np.testing.assert_allclose(rankme(jnp.asarray(X, jnp.bfloat16)), rankme(X), rtol=1e-2)


def test_zero_eigenvalues_take_no_part_in_the_fit():
    values = jnp.concatenate([jnp.arange(1.0, 31.0) ** -1.5, jnp.zeros(34)])
    alpha, r2 = alpha_req(values, fit_range=(5, 60))
    np.testing.assert_allclose((alpha, r2), (1.5, 1), rtol=1e-5)
    assert jnp.isnan(alpha_req(jnp.zeros(64))[0])


def test_padding_behind_and_between_changes_nothing():
    ranks, velocity, acceleration = effective_rank_dynamics(X, stride=4)
    padded = np.full((40, 6), 7.0, np.float32)
    mask = np.zeros(40, bool)
    places = np.r_[2:20, 25:31]
    padded[places], mask[places] = X, True
    fn = jax.jit(lambda h, mask: effective_rank_dynamics(h, stride=4, mask=mask))
    found = fn(padded, mask)
    for got, want in zip(found, (ranks, velocity, acceleration), strict=True):
        np.testing.assert_allclose(got[: len(want)], want, atol=1e-3)
        assert np.all(np.isnan(got[len(want) :]))
    last = effective_rank_dynamics(X, stride=4, max_len=10)[0]
    np.testing.assert_allclose(last, effective_rank_dynamics(X[-10:], stride=4)[0], rtol=1e-5)
    assert [len(x) for x in effective_rank_dynamics(X, stride=30)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rankme(X[:0]), "representations must be"),
        (lambda: eigenspectrum(X[0]), "representations must be"),
        (lambda: effective_rank(X, method="qr"), "method must be one of"),
        (lambda: rankme(X, variant="x"), "variant must be one of"),
        (lambda: alpha_req(X), "holds fewer than three of the 6 eigenvalues"),
        (lambda: effective_rank_dynamics(X[0]), "h must be"),
        (lambda: effective_rank_dynamics(X, stride=0), "stride must be an integer >= 1"),
        (lambda: effective_rank_dynamics(X, mask=[True]), "mask must have shape"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- in the middle of training -------------------------------------------------------------------


def spectrum_after(grads, times=1, **arguments):
    tx = optax.chain(track_update_spectrum(**{"every": 2, **arguments}), optax.scale(-1.0))
    state = tx.init(grads)
    for scale in range(1, times + 1):
        given = jax.tree.map(lambda g, scale=scale: g * scale, grads)
        updates, state = tx.update(given, state)
        np.testing.assert_array_equal(updates["kernel"], -given["kernel"])
    return {k: float(v) for k, v in metrics(state).items() if "/" in k}


def test_ranks_and_decay_are_measured_and_the_update_stays():
    found = spectrum_after({"kernel": jnp.diag(jnp.array([3.0, 1.0])), "bias": jnp.ones(2)})
    shares = np.array([0.75, 0.25])
    want = [np.exp(-np.sum(shares * np.log(shares))), 10 / 9, 0]
    assert list(found) == [
        f"{k}/kernel" for k in ("effective_rank", "stable_rank", "spectral_decay")
    ]
    np.testing.assert_allclose(list(found.values()), want, rtol=1e-6)
    decaying = {"kernel": jnp.diag(jnp.arange(1.0, 9.0) ** -1.5)}
    for method in ("svd", "gram"):
        alpha = spectrum_after(decaying, fit_range=(0, 9), method=method)["spectral_decay/kernel"]
        np.testing.assert_allclose(alpha, 3, rtol=1e-3)


def test_a_matrix_without_a_spectrum_has_rank_one():
    found = spectrum_after({"kernel": jnp.zeros((4, 5))}, fit_range=(0, 4))
    assert list(found.values()) == [1, 1, 0]


def test_only_every_so_many_steps_are_measured():
    tx = track_update_spectrum(2)
    state = tx.init({"kernel": jnp.zeros((2, 2))})
    ranks = []
    for matrix in (jnp.eye(2), jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.eye(2)):
        state = tx.update({"kernel": matrix}, state)[1]
        ranks.append(state.stable_rank["kernel"].tolist())
    np.testing.assert_allclose(ranks, [[2], [2], [1], [1]], rtol=1e-6)


def test_layers_of_a_stack_are_measured_apart_and_reported_together():
    stack = jnp.stack([jnp.eye(3), jnp.ones((3, 3))])
    axes = {"*": MatrixAxes((0,), (1,), (2,))}
    tx = track_update_spectrum(1, matrix_axes=axes)
    state = tx.update({"stack": stack}, tx.init({"stack": stack}))[1]
    np.testing.assert_allclose(state.effective_rank["stack"], [3, 1], rtol=1e-3)
    np.testing.assert_allclose(metrics(state)["effective_rank/stack"], 2, rtol=1e-3)


def test_tables_are_measured_if_they_are_chosen():
    grads = {"kernel": jnp.eye(2), "embedding": jnp.eye(3)}
    assert "effective_rank/embedding" not in spectrum_after(grads)
    assert "effective_rank/kernel" not in spectrum_after(grads, matrix_leaves=["embedding"])
    found = spectrum_after(grads, matrix_leaves=["embedding"])
    np.testing.assert_allclose(found["effective_rank/embedding"], 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"method": "qr"}, "method must be one of"),
        ({"fit_range": (2, 4)}, r"fit_range must hold at least three indices, got \(2, 4\)"),
        ({"fit_range": (-1, 4)}, "fit_range must be an integer >= 0, got -1"),
        ({"matrix_leaves": ["bias"]}, "matrix_leaves chooses leaf 'bias'"),
    ],
)
def test_bad_arguments_of_the_tracker(arguments, message):
    with pytest.raises(ValueError, match=message):
        track_update_spectrum(**{"every": 1, **arguments}).init({"bias": jnp.ones(2)})
