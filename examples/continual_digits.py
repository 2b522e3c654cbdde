"""Five tasks one after the other on scikit-learn's digits: what is forgotten, and when.

    python -m examples.continual_digits

Every method is judged after every iteration, on the test images of all tasks met so far. Two
streams of tasks, two hidden layers without biases:

- split: 0 or 1, 2 or 3, ..., 8 or 9. One head for all tasks says whether the digit is odd: the
  tasks pull at the same weights, and accuracy falls right after each switch (the stability gap).
- permuted: all ten digits, with pixels in another order for each task, and a head for each task,
  which is told. Tasks meet in the hidden layers alone, which CoSO and GaLore project.

Replay keeps 100 images of the tasks met so far and adds 32 of them to each batch of 32. Rehearsal
draws its batch of 64 from the same memory and the current task: the longer ago a task was met, the
less likely it is. Prints a table for each stream and three claims with what was measured, that of
CoSO also at a smaller rate, where it does more; draws the accuracies. ``--search`` repeats the
search of the rates below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from rich.console import Console

import optimkit as ok
from examples import digits
from examples.continual_report import claims, draw, table
from optimkit.controllers.rehearsal import power_law_sampler

TASKS, WIDTH, BATCH, MEMORY = 5, 128, 32, 100
STREAMS = ("split", "permuted")
HIDDEN, SLOW = ["hidden*"], 3e-3

SGD_RATES, ADAGRAD_RATES = (0.03, 0.1, 0.3, 1.0), (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


class Method(NamedTuple):
    """An optimizer by its rate, the rates tried, those chosen by stream, and what comes beside.

    Chosen: highest ACC at the end on the validation images, mean of seeds 100 and 101. ``memory``
    says how old tasks come back.
    """

    make: Callable[[Any], optax.GradientTransformation]
    tried: tuple[float, ...]
    chosen: tuple[float, float]
    memory: Literal["none", "replay", "rehearsal"] = "none"
    end_task: Callable[[Any], Any] = lambda state: state


METHODS = {
    "SGD": Method(optax.sgd, SGD_RATES, (0.03, 0.3)),
    "AdamW": Method(optax.adamw, ADAM_RATES, (1e-3, 3e-3)),
    "AdaGrad": Method(optax.adagrad, ADAGRAD_RATES, (0.02, 0.2)),
    "SGD, replay": Method(optax.sgd, SGD_RATES, (0.3, 0.3), "replay"),
    "AdamW, replay": Method(optax.adamw, ADAM_RATES, (3e-3, 3e-3), "replay"),
    "AdamW, rehearsal": Method(optax.adamw, ADAM_RATES, (1e-3, 3e-3), "rehearsal"),
    "CLASSP": Method(ok.classp, ADAGRAD_RATES, (0.1, 0.1)),
    "GaLore": Method(
        lambda rate: ok.galore(
            rate,
            rank=15,
            update_proj_gap=1,
            scale=1.0,
            proj_type="left",
            lowrank_leaves=HIDDEN,
            projector="subspace",
        ),
        ADAM_RATES,
        (3e-3, 1e-2),
    ),
    "CoSO": Method(
        lambda rate: ok.coso(rate, sketch_rank=30, lowrank_leaves=HIDDEN, projector="subspace"),
        ADAM_RATES,
        (1e-2, 1e-2),
        end_task=ok.coso_end_task,
    ),
}


class Stream(NamedTuple):
    """Images (tasks, images, 64) and labels (tasks, images) to train on and to judge with."""

    images: Any
    labels: Any
    test_images: Any
    test_labels: Any


def load(name: str, seed: int, *, validation: bool = False) -> Stream:
    """A stream; with ``validation``, other images than those of the table judge it."""
    data = digits.load(seed)
    if name == "permuted":
        rng = np.random.default_rng(seed)
        orders = [np.arange(64), *(rng.permutation(64) for _ in range(TASKS - 1))]
        parts = (data.train, data.validation if validation else data.test)
        streams = [
            (np.stack([images[:, order] for order in orders]), np.tile(labels, (TASKS, 1)))
            for images, labels in parts
        ]
        return Stream(*streams[0], *streams[1])
    images, labels = (np.concatenate(part) for part in zip(*data, strict=True))
    own = np.stack([np.flatnonzero(labels // 2 == task)[:354] for task in range(TASKS)])
    train, first, second = np.split(own, [254, 304], axis=1)
    test = first if validation else second
    return Stream(images[train], labels[train] % 2, images[test], labels[test] % 2)


def batches(memory: str, images: int, steps: int, seed: int) -> np.ndarray:
    """The task and the image of every example: (tasks, steps, examples, 2)."""
    rng = np.random.default_rng([seed, 1])
    kept = np.stack([rng.permutation(images)[:MEMORY] for _ in range(TASKS)])
    found = []
    for task in range(TASKS):
        whose = np.full((steps, BATCH), task)
        if memory == "replay":
            old = rng.integers(max(task, 1), size=(steps, BATCH))
            whose = np.concatenate([whose, old], axis=1)
        elif memory == "rehearsal":
            whose = np.asarray(rehearsed(task, seed, (steps, 2 * BATCH)))
        room = MEMORY // max(task, 1)  # of each old task
        old = kept[whose, rng.integers(room, size=whose.shape)]
        which = np.where(whose == task, rng.integers(images, size=whose.shape), old)
        found.append(np.stack([whose, which], axis=-1))
    return np.stack(found)


@partial(jax.jit, static_argnames="shape")
def rehearsed(task: Any, seed: Any, shape: tuple[int, int]) -> jax.Array:
    """Tasks by how many others came since; those that have not come yet are left out."""
    rested = jnp.where(jnp.arange(TASKS) <= task, task - jnp.arange(TASKS), jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), task)
    drawn = power_law_sampler(rested, exponent=1.0, key=key, size=shape[0] * shape[1])
    return drawn.reshape(shape)


def init_params(seed: int, heads: int, classes: int) -> dict[str, Any]:
    """Two hidden layers, and heads of zeros."""
    keys = jax.random.split(jax.random.key(seed), 2)
    hidden = {
        f"hidden_{i}": {"kernel": jax.random.normal(key, (n, WIDTH)) * (2 / n) ** 0.5}
        for i, (key, n) in enumerate(zip(keys, (64, WIDTH), strict=True))
    }
    kernel, bias = jnp.zeros((WIDTH, heads, classes)), jnp.zeros((heads, classes))
    return {**hidden, "heads": {"kernel": kernel, "bias": bias}}


def logits(params: Any, images: Any, tasks: Any) -> jax.Array:
    """The scores of each image by the head of its task, or by the only one."""
    x = images
    for i in range(2):
        x = jax.nn.relu(x @ params[f"hidden_{i}"]["kernel"])
    heads = params["heads"]
    scores = jnp.einsum("bw,wkc->bkc", x, heads["kernel"]) + heads["bias"][None]
    tasks = jnp.minimum(tasks, scores.shape[1] - 1)
    return jnp.take_along_axis(scores, tasks[:, None, None], axis=1)[:, 0]


def curves(method: Method, rate: Any, stream: Stream, chosen: Any, params: Any) -> jax.Array:
    """Accuracy on all tasks after every iteration: (tasks, steps, tasks)."""
    tx = method.make(rate)
    tasks, size = stream.test_labels.shape
    whose = jnp.repeat(jnp.arange(tasks), size)
    test_images, test_labels = stream.test_images.reshape(-1, 64), stream.test_labels.reshape(-1)

    def loss_fn(params: Any, images: Any, labels: Any, tasks: Any) -> jax.Array:
        scores = logits(params, images, tasks)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def iteration(carry: Any, picked: Any) -> Any:
        params, state = carry
        task, which = picked[:, 0], picked[:, 1]
        batch = (stream.images[task, which], stream.labels[task, which], task)
        updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
        params = optax.apply_updates(params, updates)
        right = jnp.argmax(logits(params, test_images, whose), -1) == test_labels
        return (params, state), jnp.mean(right.reshape(tasks, size), axis=1)

    def one_task(carry: Any, picked: Any) -> Any:
        (params, state), accuracy = jax.lax.scan(iteration, carry, picked)
        return (params, method.end_task(state)), accuracy

    return jax.lax.scan(one_task, (params, tx.init(params)), chosen)[1]


def train(
    name: str,
    stream: str,
    steps: int,
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    *,
    validation: bool = False,
) -> np.ndarray:
    """Accuracies by rate (default: the chosen one), seed, task being learned, iteration and task.

    All runs are one program, one after the other: side by side, by ``vmap``, they take as long.
    """
    method = METHODS[name]
    rates = rates or (method.chosen[STREAMS.index(stream)],)
    classes, heads = (10, TASKS) if stream == "permuted" else (2, 1)

    def given(seed: int) -> Any:
        data = load(stream, seed, validation=validation)
        chosen = batches(method.memory, data.labels.shape[1], steps, seed)
        return data, chosen, init_params(seed, heads, classes)

    runs = jax.tree.map(lambda *each: jnp.stack(each), *map(given, seeds))

    def over_seeds(rate: Any) -> jax.Array:
        return jax.lax.map(lambda run: curves(method, rate, *run), runs)

    return np.asarray(jax.jit(lambda rates: jax.lax.map(over_seeds, rates))(jnp.array(rates)))


def search(steps: int) -> None:
    """Prints the final ACC on the validation images for every rate tried, of every method."""
    for stream in STREAMS:
        for name, method in METHODS.items():
            runs = train(name, stream, steps, (100, 101), method.tried, validation=True)
            final = 100 * runs[:, :, -1, -1].mean(axis=(1, 2))
            tried = ", ".join(f"{r:g} {x:.1f}" for r, x in zip(method.tried, final, strict=True))
            print(f"{stream:9} {name:17} {tried}", flush=True)


def main(argv: Sequence[str]) -> None:
    """Trains, prints the tables and the claims, draws the picture."""
    del argv
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    values = flags.FLAGS
    if values.search:
        search(values.steps)
        return
    began, found, sentences = time.perf_counter(), {}, []
    size = (values.steps, range(values.seeds))
    for stream in STREAMS:
        found[stream] = {name: train(name, stream, *size)[0] for name in METHODS}
        rates = {name: method.chosen[STREAMS.index(stream)] for name, method in METHODS.items()}
        Console().print(table(stream, found[stream], rates))
        sentences += claims(stream, found[stream])
        slow = {name: train(name, stream, *size, (SLOW,))[0] for name in ("CoSO", "GaLore")}
        sentences += claims(f"{stream}, both at rate {SLOW:g}", slow)
    print("\n".join(sentences))
    path = Path(values.out) / "continual_digits.png"
    draw(found, path)
    print(f"{time.perf_counter() - began:.0f} s; the picture is {path.resolve()}")


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 120, "iterations of each task", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "runs with other images and weights", lower_bound=1)
    flags.DEFINE_string("out", "out", "folder of continual_digits.png")
    flags.DEFINE_bool("search", False, "try the rates on validation images of other seeds instead")
    app.run(main)
