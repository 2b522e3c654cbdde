"""Ghost batch norm against Flax's own, by virtual batch, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from optimkit import nn

X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (6, 2, 4)), jnp.float32)


def train(layer, x, variables=None):
    variables = variables or layer.init(jax.random.key(0), x, False)
    return layer.apply(variables, x, False, mutable=["batch_stats"])


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


def test_one_virtual_batch_is_batch_norm():
    ours, theirs = nn.GhostBatchNorm(6, momentum=0.9), linen.BatchNorm(momentum=0.9)
    assert_close(train(ours, X), train(theirs, X))


def test_virtual_batches_are_batch_norms_one_after_another():
    y, stats = train(nn.GhostBatchNorm(2), X)
    layer, variables, parts = linen.BatchNorm(momentum=0.9), None, []
    for part in jnp.split(X, 3):
        out, renewed = train(layer, part, variables)
        params = layer.init(jax.random.key(0), part, False)["params"]
        variables = {"params": params, **renewed}
        parts.append(out)
    assert_close((y, stats["batch_stats"]), (jnp.concatenate(parts), renewed["batch_stats"]))


def test_evaluation_uses_the_running_statistics_for_any_batch():
    layer = nn.GhostBatchNorm(4, use_scale=False, use_bias=False, epsilon=0.0)
    stats = {"mean": jnp.full(4, 1.0), "var": jnp.full(4, 4.0)}
    y = layer.apply({"batch_stats": stats}, X[:3], True)
    np.testing.assert_allclose(y, (X[:3] - 1) / 2, rtol=1e-6)


def test_initialisation_leaves_the_statistics_alone_and_half_precision_keeps_them_in_f32():
    layer = nn.GhostBatchNorm(3, param_dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), X.astype(jnp.bfloat16), False)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    y, renewed = train(layer, X.astype(jnp.bfloat16), variables)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(renewed)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"virtual_batch_size": 4}, r"a multiple of virtual_batch_size=4, got the shape \(6, 2, 4"),
        ({"virtual_batch_size": 7}, "the batch must be a multiple of virtual_batch_size=7"),
        ({"virtual_batch_size": 0}, "virtual_batch_size must be an integer >= 1, got 0"),
        ({"momentum": 1.5}, "momentum must be >= 0 and <= 1, got 1.5"),
        ({"epsilon": -1.0}, "epsilon must be >= 0, got -1"),
        ({"use_running_average": True}, "must be given once, .*, got True and False"),
    ],
)
def test_bad_layers(attributes, message):
    with pytest.raises(ValueError, match=message):
        train(nn.GhostBatchNorm(**{"virtual_batch_size": 3, **attributes}), X)


def test_training_or_evaluation_must_be_said():
    with pytest.raises(ValueError, match="use_running_average must be given once"):
        nn.GhostBatchNorm(3).init(jax.random.key(0), X)
