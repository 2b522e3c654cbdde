"""Flax Linen, ``TrainState`` and an optimizer of optimkit on scikit-learn's digits, in seconds.

    python -m examples.linen_digits

``TrainState`` takes any gradient transformation; it hands ``update`` the gradients, the state and
the parameters, which is all that the method used here needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optimkit as ok

BATCH = 64


class Classifier(nn.Module):
    """Two hidden layers, each behind a norm, which makes their weights scale invariant."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(batch, 10)`` of images ``(batch, 64)``."""
        for _ in range(2):
            x = nn.relu(nn.LayerNorm()(nn.Dense(128)(x)))
        return nn.Dense(10)(x)


@jax.jit
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One update; returns the new state and the loss before it."""

    def loss_fn(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(epochs: int = 20, seed: int = 0) -> tuple[list[float], float]:
    """Trains the classifier; returns the mean loss of each epoch and the test accuracy."""
    digits: Any = load_digits()
    images, test_images, labels, test_labels = train_test_split(
        digits.data.astype(np.float32) / 16, digits.target, test_size=360, random_state=seed
    )
    model = Classifier()
    steps = epochs * (len(images) // BATCH)
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(seed), jnp.zeros((1, 64)))["params"],
        tx=ok.adamp(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.01),
    )
    losses = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(images))
        epoch_losses = []
        for i in range(len(images) // BATCH):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            state, loss = train_step(state, images[chosen], labels[chosen])
            epoch_losses.append(loss)
        losses.append(float(np.mean(jax.device_get(epoch_losses))))
    predicted = jnp.argmax(state.apply_fn({"params": state.params}, test_images), -1)
    return losses, float(np.mean(np.asarray(predicted) == np.asarray(test_labels)))


def main(argv: Sequence[str]) -> None:
    """Trains and prints."""
    del argv
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    losses, accuracy = train(flags.FLAGS.epochs)
    print(f"training loss {losses[0]:.3f} -> {losses[-1]:.4f} in {len(losses)} epochs")
    print(f"test accuracy {accuracy:.1%} on 360 digits that were not trained on")


if __name__ == "__main__":
    flags.DEFINE_integer("epochs", 20, "passes over the training digits", lower_bound=1)
    app.run(main)
