"""scikit-learn's digits and a small classifier in plain JAX, for the sweeps and budgets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Batch = tuple[Any, Any]
"""Images ``(batch, 64)`` in [0, 1] and labels ``(batch,)``."""


class Digits(NamedTuple):
    """1797 images, shuffled by a seed: 1197 to train on, 300 to choose with, 300 to report on."""

    train: Batch
    validation: Batch
    test: Batch

    def batches(self, steps: int, seed: int, size: int = 64) -> Iterator[Batch]:
        """The first batches of epochs in random orders; the last images of an epoch are left."""
        images, labels = self.train
        a_round = len(images) // size
        for step in range(steps):
            epoch, place = divmod(step, a_round)
            order = np.random.default_rng([seed, epoch]).permutation(len(images))
            chosen = order[place * size :][:size]
            yield images[chosen], labels[chosen]


def load(seed: int = 0) -> Digits:
    """Reads the digits and splits them."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images, labels = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(images))
    parts = np.split(order, [len(order) - 600, len(order) - 300])
    return Digits(*((images[part], labels[part]) for part in parts))


def init_params(seed: int, width: int = 64) -> dict[str, Any]:
    """Two hidden layers with ReLU: 9,034 parameters at width 64."""
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = (64, width, width, 10)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(key, (n, m)) * np.float32(np.sqrt(2 / n)),
            "bias": jnp.zeros(m),
        }
        for i, (key, n, m) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def logits(params: Any, images: Any) -> jax.Array:
    """The scores of the ten digits."""
    *hidden, last = params.values()
    x = images
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


def loss_fn(params: Any, batch: Batch) -> jax.Array:
    """Mean cross-entropy of a batch, in nats."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()


def error_rate(params: Any, batch: Batch) -> jax.Array:
    """The share of wrong answers."""
    images, labels = batch
    return jnp.mean(jnp.argmax(logits(params, images), -1) != labels)
