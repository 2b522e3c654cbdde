"""Stable-SPAM and its pieces on numbers that a reader can check by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest

import optimkit as ok
from optimkit.optimizers.stable_spam import momentum_decay_scale
from optimkit.transforms.tracked_max import restarted_count


def run(tx, params, gradients):
    """Updates after each gradient, at the same parameters, and the last state."""
    step, state, out = jax.jit(tx.update), tx.init(params), []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        out.append(updates)
    return out, state


def normal(steps: int, shape: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return list(jnp.asarray(rng.normal(size=(steps, *shape)), jnp.float32))


class UpdateMathTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_normalize_by_tracked_norm(self):
        tx = ok.normalize_by_tracked_norm(0.5, 0.75, 0.0)
        update = self.variant(tx.update)
        state = self.variant(tx.init)(jnp.zeros(2))
        first, state = update(jnp.array([3.0, 4.0]), state)
        np.testing.assert_allclose(first, [0.6, 0.8], rtol=1e-6)  # norm 5 both ways
        second, state = update(jnp.array([0.0, 1.0]), state)
        mean = (0.5 * 2.5 + 0.5 * 1.0) / 0.75
        rms = np.sqrt((0.75 * 6.25 + 0.25 * 1.0) / (1 - 0.75**2))
        np.testing.assert_allclose(second, [0.0, mean / rms], rtol=1e-6)
        chex.assert_shape([state.norm_mean, state.norm_mean_square], ())

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_first_step_of_stable_spam_is_that_of_adam(self):
        tx = ok.stable_spam(0.1, weight_decay=0.5)
        params, grads = jnp.array([1.0, -2.0]), jnp.array([1e-3, -40.0])
        updates, _ = self.variant(tx.update)(grads, tx.init(params), params)
        np.testing.assert_allclose(updates, [-0.1 - 0.05, 0.1 + 0.1], rtol=1e-2)


# -- normalisation ----------------------------------------------------------------------------


def test_the_scale_is_called_with_the_zero_based_count() -> None:
    table = jnp.array([1.0, 0.5, 0.0])
    tx = ok.normalize_by_tracked_norm(0.8, 0.0, 0.0, scale=lambda count: table[count])
    out, state = run(tx, jnp.zeros(1), [jnp.array([1.0]), jnp.array([2.0]), jnp.array([4.0])])
    # q = 0.8, then 0.4, then 0; powers of the current q.
    np.testing.assert_allclose(out[0], [1.0], rtol=1e-6)
    np.testing.assert_allclose(out[1], [(0.4 * 0.2 + 0.6 * 2) / (1 - 0.4**2) / 2], rtol=1e-6)
    np.testing.assert_allclose(out[2], [1.0], rtol=1e-6)
    np.testing.assert_allclose(state.norm_mean, 4.0)


def test_zero_gradients_pass_and_move_the_means_only() -> None:
    out, state = run(
        ok.normalize_by_tracked_norm(), jnp.zeros(2), [jnp.zeros(2), jnp.zeros(2), jnp.ones(2)]
    )
    np.testing.assert_array_equal(out[1], [0.0, 0.0])
    assert np.all(np.asarray(out[2]) > 0.1)
    _, later = run(ok.normalize_by_tracked_norm(), jnp.zeros(2), [jnp.ones(2), jnp.zeros(2)])
    assert float(later.norm_mean) < float(state.norm_mean)


@pytest.mark.parametrize("size", [1e30, 1e15, 1e-4, 1e-10, 1e-20, 1e-30, 1e-44])
def test_sizes_at_the_ends_of_float32(size: float) -> None:
    gradients = [jnp.full((100,), size)] * 3 + [jnp.ones(100)] * 3
    out, _ = run(ok.normalize_by_tracked_norm(), jnp.zeros(100), gradients)
    chex.assert_tree_all_finite(out)
    norms = [float(jnp.linalg.norm(u)) for u in out]
    assert max(norms) < 1.5
    if 1e-5 < size < 1e16:  # below, eps shows
        np.testing.assert_allclose(norms[:3], 1.0, rtol=1e-3)
    assert min(norms[3:]) > (1e-16 if size > 1 else 0.1)  # small after a burst, but not dead


def test_restarted_count() -> None:
    counts = [int(restarted_count(jnp.int32(t), 4)) for t in range(1, 11)]
    assert counts == [1, 2, 3, 4, 2, 3, 4, 5, 2, 3]


# -- resets -----------------------------------------------------------------------------------


def test_published_reset_of_a_constant_gradient() -> None:
    b1, b2 = 0.9, 0.999
    tx = ok.momentum_reset(ok.scale_by_adam(b1, b2, 0.0), 10, moments="after", counts="before")
    out, _ = run(tx, jnp.zeros(1), [jnp.ones(1)] * 12)
    steps = [float(u[0]) for u in out]
    np.testing.assert_allclose(steps[:9], 1.0, rtol=1e-4)
    # Step 10: the old moments, corrected as if they were one step old.
    at_reset = (1 - b1**10) / (1 - b1) / np.sqrt((1 - b2**10) / (1 - b2))
    np.testing.assert_allclose(steps[9], at_reset, rtol=1e-4)
    # Step 11: empty moments, corrected as if they were two steps old.
    after = (1 - b1) / (1 - b1**2) / np.sqrt((1 - b2) / (1 - b2**2))
    np.testing.assert_allclose(steps[10], after, rtol=1e-4)


def test_styles_differ_at_the_reset_and_not_before() -> None:
    gradients = normal(9, (3, 2))
    published, _ = run(ok.stable_spam(0.1, reset_interval=5), jnp.zeros((3, 2)), gradients)
    paper, _ = run(
        ok.stable_spam(0.1, reset_interval=5, reset_style="paper"), jnp.zeros((3, 2)), gradients
    )
    off, _ = run(ok.stable_spam(0.1, reset_interval=0), jnp.zeros((3, 2)), gradients)
    chex.assert_trees_all_close(published[:4], paper[:4], off[:4], rtol=1e-5)
    for a, b in ((published, paper), (published, off), (paper, off)):
        assert all(float(jnp.max(jnp.abs(x - y))) > 1e-3 for x, y in zip(a[4:], b[4:], strict=True))


def test_the_paper_style_is_the_chain_of_its_pieces() -> None:
    gradients = normal(8, (4,))
    chain = optax.chain(
        ok.clip_by_tracked_max(0.999),
        ok.normalize_by_tracked_norm(0.7, 0.9),
        ok.momentum_reset(ok.scale_by_adam(), 3),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )
    expected, _ = run(chain, jnp.ones(4), gradients)
    tx = ok.stable_spam(0.01, weight_decay=0.1, reset_interval=3, reset_style="paper")
    got, _ = run(tx, jnp.ones(4), gradients)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


# -- decay of the momenta ---------------------------------------------------------------------


def test_momentum_decay_scale_holds_at_its_end() -> None:
    scales = [float(momentum_decay_scale(jnp.int32(c), 9, 0.2)) for c in range(30)]
    np.testing.assert_allclose(scales[4], 0.6, rtol=1e-6)  # half way: t = 5 of 10
    np.testing.assert_allclose(scales[9:], 0.2, rtol=1e-6)
    assert np.all(np.diff(scales[:10]) < 0)


def test_the_schedule_of_b1_does_not_restart() -> None:
    tx = ok.stable_spam(0.1, b1=0.8, total_steps=8, eta_min=0.0, reset_interval=4)
    _, state = run(tx, jnp.zeros(1), [jnp.ones(1)] * 9)
    # At t = 9 the scale is 0, so the moment is that of the last gradient alone.
    out, _ = run(
        optax.chain(
            ok.clip_by_tracked_max(count_restart=4),
            ok.normalize_by_tracked_norm(
                scale=lambda c: momentum_decay_scale(c, 8, 0.0), count_restart=4
            ),
        ),
        jnp.zeros(1),
        [jnp.ones(1)] * 9,
    )
    np.testing.assert_allclose(optax.tree.get(state, "mu"), out[-1], rtol=1e-5)


def test_gamma1_none_is_b1() -> None:
    gradients = normal(5, (4,))
    a, _ = run(ok.stable_spam(0.1, b1=0.6, gamma1=None), jnp.zeros(4), gradients)
    b, _ = run(ok.stable_spam(0.1, b1=0.6, gamma1=0.6), jnp.zeros(4), gradients)
    chex.assert_trees_all_equal(a, b)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("gamma2", 1.0), ("eta_min", 2.0), ("reset_style", "code"), ("total_steps", 0), ("eps", -1.0)],
)
def test_arguments_out_of_range(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        ok.stable_spam(0.1, **{argument: value})


if __name__ == "__main__":
    absltest.main()
