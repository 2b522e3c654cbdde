"""Three tasks on scikit-learn's digits that pull a narrow trunk apart: surgeries beside the sum.

The digit, whether it is odd, and how much ink there is are read from 12 shared features. The shared
weights go through a combiner, each head takes its own task's gradient. Prints a table and draws the
losses::

    python -m examples.multitask_digits --seeds 3 --picture multitask_digits.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import digits
from optimkit import multitask

TASKS = ("digit", "parity", "ink")
RATE = 3e-3

COMBINERS: dict[str, Any] = {
    "sum": multitask.sum_combiner,
    "pcgrad": multitask.pcgrad,
    "cagrad": lambda: multitask.cagrad(0.5, scale_by_num_tasks=True),
    "gradnorm": lambda: multitask.gradnorm(weight_optimizer=optax.adam(RATE)),
    "sam_gs": lambda: multitask.sam_gs(gamma=0.7, scale_by_num_tasks=True, max_norm=1.0),
    "gcond": lambda: multitask.gcond(0.9, conflict_tolerance=1e-5),
}


def init_params(seed: int, width: int = 12) -> dict[str, Any]:
    """A trunk of one hidden layer, and a linear head for each task."""
    rng = np.random.default_rng(seed)

    def dense(n: int, m: int) -> dict[str, Any]:
        kernel = rng.normal(size=(n, m)) * np.sqrt(2 / n)
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(m)}

    heads = zip(TASKS, (10, 2, 1), strict=True)
    return {"trunk": dense(64, width), "heads": {name: dense(width, m) for name, m in heads}}


def losses_fn(params: Any, batch: digits.Batch) -> jax.Array:
    """Cross-entropies of digit and parity, and ten times the squared error of the ink."""
    images, labels = batch

    def linear(layer: Any, x: Any) -> Any:
        return x @ layer["kernel"] + layer["bias"][None]

    x = jax.nn.relu(linear(params["trunk"], images))
    digit, odd, ink = (linear(params["heads"][name], x) for name in TASKS)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    wanted = 10 * (jnp.mean(images, axis=1) - 0.3)
    return jnp.stack(
        [
            jnp.mean(entropy(digit, labels)),
            jnp.mean(entropy(odd, labels % 2)),
            10 * jnp.mean(jnp.square(ink[:, 0] - wanted)),
        ]
    )


def optimizer(combiner: Any, b1: float) -> optax.GradientTransformationExtraArgs:
    """Adam behind the combiner for the trunk, and behind the sum for the heads."""
    tasks = len(TASKS)
    trunk = multitask.with_combiner(combiner, optax.adam(RATE, b1=b1), num_tasks=tasks)
    heads = multitask.with_combiner(multitask.sum_combiner(), optax.adam(RATE), num_tasks=tasks)
    labels = {"trunk": "trunk", "heads": "heads"}
    return optax.partition({"trunk": trunk, "heads": heads}, labels)


def train(name: str, seed: int, steps: int) -> tuple[np.ndarray, float, float]:
    """Test losses after training, the share of steps in conflict, and the mean smallest cosine."""
    data = digits.load()
    tx = optimizer(COMBINERS[name](), b1=0.0 if name == "gcond" else 0.9)
    batches = [np.stack(parts) for parts in zip(*data.batches(steps, seed), strict=True)]

    @jax.jit
    def run(params: Any, batches: Any, key: Any) -> Any:
        def step(carry: Any, given: Any) -> Any:
            params, state = carry
            index, *batch = given
            losses, grads = multitask.task_gradients(losses_fn, params, batch)
            extra = {"losses": losses, "key": jax.random.fold_in(key, index)}
            updates, state = tx.update(grads, state, params, **extra)
            cosine = jnp.min(multitask.task_cosines(grads["trunk"]))
            return (optax.apply_updates(params, updates), state), cosine

        start = (params, tx.init(params))
        (params, _), cosines = jax.lax.scan(step, start, (jnp.arange(steps), *batches))
        return params, cosines

    params, cosines = run(init_params(seed), batches, jax.random.key(seed))
    losses = jax.jit(losses_fn)(params, data.test)
    return np.asarray(losses), float(jnp.mean(cosines < 0)), float(jnp.mean(cosines))


def draw(found: dict[str, np.ndarray], path: str) -> None:
    """Bars of every task's test loss over the plain sum's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for place, task in enumerate(TASKS):
        heights = [losses[place] / found["sum"][place] for losses in found.values()]
        axes.bar(np.arange(len(found)) + 0.25 * (place - 1), heights, 0.25, label=task)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(np.arange(len(found)), list(found))
    axes.set_ylabel("test loss over the sum's")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Trains with every combiner; returns the mean test losses of the tasks by name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", default="")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    found = {}
    print(f"{'combiner':10}" + "".join(f"{task:>10}" for task in TASKS) + "  conflict  cosine")
    for name in COMBINERS:
        runs = [train(name, seed, args.steps) for seed in range(args.seeds)]
        losses, shares, cosines = zip(*runs, strict=True)
        found[name] = np.mean(losses, axis=0)
        share, cosine = np.mean(shares), np.mean(cosines)
        shown = "".join(f"{loss:10.4f}" for loss in found[name])
        print(f"{name:10}{shown}{share:10.2f}{cosine:8.2f}")
    print(f"test losses, mean of {args.seeds} seeds; {time.perf_counter() - started:.0f} s")
    if args.picture:
        draw(found, args.picture)
    return found


if __name__ == "__main__":
    main()
