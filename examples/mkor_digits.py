"""MKOR against SGD with momentum: an autoencoder of scikit-learn's digits, in seconds.

    python -m examples.mkor_digits

MKOR wants two vectors of every layer: the mean of its inputs and the sum of its output gradients.
``TappedDense`` hands both out as the gradients of two arrays of zeros, so one ``jax.grad`` by
parameters and taps gives all that a step needs.
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
from sklearn.datasets import load_digits

import optimkit as ok
from optimkit.nn import TappedDense, collect_layer_stats

BATCH = 128
RATES = (0.003, 0.01, 0.03, 0.1)
FREQUENCIES = (1, 10, 100)


class Autoencoder(nn.Module):
    """64 pixels to 12 numbers and back."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(batch, 64)``, rebuilt."""
        for width in (48, 12, 48):
            x = nn.tanh(TappedDense(width)(x))
        return TappedDense(64)(x)


def losses_of(tx: optax.GradientTransformation, steps: int, seed: int = 0) -> np.ndarray:
    """Trains with an optimizer; returns the loss of every step."""
    digits: Any = load_digits()
    data = jnp.asarray(digits.data / 16, jnp.float32)
    rng = np.random.default_rng(seed)
    batches = jnp.asarray(rng.integers(len(data), size=(steps, BATCH)))
    model = Autoencoder()
    variables = model.init(jax.random.key(seed), data[:1])
    update = optax.with_extra_args_support(tx).update

    def loss_fn(variables: Any, images: jax.Array) -> jax.Array:
        rebuilt: Any = model.apply(variables, images)
        return 0.5 * jnp.mean(jnp.sum((rebuilt - images) ** 2, axis=-1))

    @jax.jit
    def train(variables: Any) -> jax.Array:
        taps = variables["taps"]  # zeros, now and always

        def step(carry: Any, chosen: jax.Array) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(
                {"params": params, "taps": taps}, data[chosen]
            )
            stats = collect_layer_stats(grads["taps"])
            updates, state = update(grads["params"], state, params, layer_stats=stats, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        params = variables["params"]
        return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

    return np.asarray(train(variables))


def steps_to(losses: np.ndarray, target: float) -> int | None:
    """The first step at which a running mean of the loss is below the target; None if never."""
    smooth = np.convolve(losses, np.ones(10) / 10, mode="valid")
    below = np.flatnonzero(smooth <= target * (1 + 1e-6))
    return int(below[0]) + 10 if below.size else None


def compare(steps: int, rates: Sequence[float] = RATES, seed: int = 0) -> dict[str, np.ndarray]:
    """The losses of each method, with its name and the rate at which it ends lowest."""
    makers = {"sgd": lambda rate: optax.sgd(rate, momentum=0.9)}
    for every in FREQUENCIES:
        makers[f"mkor, refreshed every {every}"] = lambda rate, every=every: ok.mkor(
            rate, b1=0.9, inv_freq=every
        )

    def final(losses: np.ndarray) -> float:
        last = float(np.mean(losses[-10:]))
        return last if np.isfinite(last) else float("inf")

    found = {}
    for name, make in makers.items():
        runs = {rate: losses_of(make(rate), steps, seed) for rate in rates}
        best = min(runs, key=lambda rate: final(runs[rate]))
        found[f"{name}, rate {best:g}"] = runs[best]
    return found


def main(argv: Sequence[str]) -> None:
    """Trains and prints."""
    del argv
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    found = compare(flags.FLAGS.steps)
    target = float(np.mean(next(iter(found.values()))[-10:]))
    for name, losses in found.items():
        print(f"{name:36} loss {np.mean(losses[-10:]):.3f}, sgd's in {steps_to(losses, target)}")


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 400, "training steps of each run", lower_bound=10)
    app.run(main)
