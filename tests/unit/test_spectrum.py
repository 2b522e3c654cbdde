"""Ranks and decay of spectra that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.diagnostics import (
    alpha_req,
    effective_rank,
    effective_rank_dynamics,
    eigenspectrum,
    rankme,
)

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
