"""Weights of samples, importances of parameters, and dampening by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.gradients import (
    MomentumDifficulty,
    beta_kernel_weight,
    fisher_importance,
    selective_synaptic_dampening,
    ssd_statistics,
    upsample_hard_cluster,
    weighted_mean,
)

W = {"a": jnp.array([1.0, 2.0, 3.0, 4.0]), "b": jnp.array([5.0])}
FULL = {"a": jnp.array([1.0, 1.0, 0.0, 0.0]), "b": jnp.array([jnp.nan])}
FORGET = {"a": jnp.array([4.0, 1.0, 2.0, 0.0]), "b": jnp.array([1.0])}


def test_weights_at_the_ends_and_without_any():
    p = jnp.array([0.0, 1.0])
    assert beta_kernel_weight(p, a=0.0, b=1.0).tolist() == [1, 0]
    assert beta_kernel_weight(p, normalize=True).tolist() == [0, 0]
    slope = jax.grad(lambda p: beta_kernel_weight(p, a=0.5).sum())(p)
    assert slope.tolist() == [0, 0]
    assert weighted_mean(jnp.ones(2), jnp.zeros(2)) == 0
    assert weighted_mean(jnp.array([jnp.inf, 3.0]), jnp.array([0.0, 2.0])) == 3
    assert weighted_mean(jnp.ones(2), jnp.array([1.0, 0.0]), normalize=False) == 0.5


def test_difficulty_is_a_running_mean():
    difficulty = MomentumDifficulty(2, decay=0.75, boost=2.0)
    np.testing.assert_allclose(difficulty.weights([0, 1]), 1)
    difficulty.update([0, 1], [4.0, 1.0])
    difficulty.update([0], [8.0])
    np.testing.assert_allclose(difficulty.difficulty, [5, 1])
    np.testing.assert_allclose(difficulty.weights([0, 1]), np.array([25, 1]) / 13)


def test_erased_halved_and_left():
    new = selective_synaptic_dampening(W, FULL, FORGET, alpha=2.0)
    assert new["a"].tolist() == [0.25, 2, 0, 4]
    assert new["b"].tolist() == [5]  # NaN selects nothing
    found = ssd_statistics(W, FULL, FORGET, alpha=2.0)
    assert (found["a"].fraction, found["a"].factor) == (0.5, 0.125)
    assert (found["b"].fraction, found["b"].factor) == (0, 1)
    kept = selective_synaptic_dampening(W, FULL, FORGET, alpha=2.0, mask=["b"])
    jax.tree.map(np.testing.assert_array_equal, kept, W)


def test_importances_of_batches_of_examples_and_without_a_loss():
    def loss(w, x):
        return jnp.mean(x) * w

    batches = [jnp.array([1.0, 3.0]), jnp.array([-4.0])]
    w = jnp.bfloat16(1.0)
    assert fisher_importance(loss, w, batches) == 10
    assert fisher_importance(loss, w, batches, mode="absolute_batch_gradient") == 3
    np.testing.assert_allclose(fisher_importance(loss, w, batches, per_example=True), 26 / 3)
    assert fisher_importance(loss, w, iter(batches)).dtype == jnp.float32


def test_the_hard_half_of_each_class_is_repeated():
    rng = np.random.default_rng(0)
    far = np.repeat([0.0, 8.0, 0.0, 8.0], 10)
    outputs = far[:, None] + rng.normal(size=(40, 2))
    labels, losses = np.repeat([0, 1], 20), np.where(far > 0, 2.0, 0.5)
    losses[20:] = 3 - losses[20:]
    found = upsample_hard_cluster(outputs, losses, labels, key=jax.random.key(1))
    assert found.tolist() == np.repeat([1, 2, 2, 1], 10).tolist()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: beta_kernel_weight(jnp.array([1.5])), "pass_rate must be >= 0 and <= 1"),
        (lambda: beta_kernel_weight(jnp.ones(1), a=-1.0), "a must be >= 0, got -1"),
        (lambda: weighted_mean(jnp.ones(2), jnp.ones(3)), "must be of one shape"),
        (lambda: weighted_mean(jnp.ones(0), jnp.ones(0)), "with a sample in it"),
        (lambda: MomentumDifficulty(2, decay=1.0, boost=1.0), "decay must be >= 0 and < 1"),
        (lambda: MomentumDifficulty(2, decay=0.5, boost=1.0).update([0], [-1.0]), "finite and"),
        (lambda: fisher_importance(lambda w, x: w, jnp.ones(()), []), "batches holds no batch"),
        (lambda: fisher_importance(lambda w, x: w, W, [], mode="x"), "mode must be one of"),
        (lambda: selective_synaptic_dampening(W, FULL, FORGET, alpha=-1.0), "alpha must be >= 0"),
        (lambda: selective_synaptic_dampening(W, {"a": W["a"]}, FORGET), "missing leaves"),
        (lambda: upsample_hard_cluster(W["a"], W["a"], W["a"], key=None), "outputs must be"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
