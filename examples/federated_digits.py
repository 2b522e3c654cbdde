"""Ten clients that hold two digits each train one classifier: a table and a picture.

    python -m examples.federated_digits

scikit-learn's digits are sorted by label and dealt out, so that no client's data look like those of
the others. FedAvg, FedAvg-M, SCAFFOLD-M and FedHyper train on them with all clients in every round,
and with three drawn at random. Each method gets the local rate, of four, with which it does best on
the validation images; the table shows the test images. All rates and seeds of a method are one
program.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from examples import digits
from examples.lm.report import save_figure
from optimkit.federated import (
    FederatedMethod,
    fedavg_m,
    federated_averaging,
    fedhyper,
    scaffold_m,
)

CLIENTS, LOCAL_STEPS, BATCH, WIDTH = 10, 10, 16, 32
RATES = (0.03, 0.1, 0.3, 1.0)
BETA = 0.3
METHODS = ("FedAvg", "FedAvg-M", "SCAFFOLD-M", "FedHyper")


class Problem(NamedTuple):
    """One seed: the clients' data on a leading axis, the held-out images, the start."""

    images: Any
    labels: Any
    validation: digits.Batch
    test: digits.Batch
    params: Any


class Result(NamedTuple):
    """Errors by rate, seed and round, in percent."""

    validation: np.ndarray
    test: np.ndarray

    @property
    def best(self) -> int:
        """The rate with the lowest validation error over the last tenth of the rounds."""
        return int(np.argmin(late(self.validation).mean(-1)))


def late(errors: np.ndarray) -> np.ndarray:
    """The mean over the last tenth of the rounds, which sampling makes noisy."""
    return errors[..., -max(1, errors.shape[-1] // 10) :].mean(-1)


def problem(seed: int) -> Problem:
    """Sorts the training images by label and deals two pieces, of one digit mostly, to a client."""
    data = digits.load(seed)
    images, labels = data.train
    pieces = np.array_split(np.argsort(labels, kind="stable"), 2 * CLIENTS)
    size = min(map(len, pieces))
    order = np.random.default_rng(seed).permutation(2 * CLIENTS)
    own = np.stack([pieces[i][:size] for i in order]).reshape(CLIENTS, 2 * size)
    params = digits.init_params(seed, WIDTH)
    return Problem(images[own], labels[own], data.validation, data.test, params)


def build(name: str, rate: Any, taking_part: int) -> FederatedMethod:
    """A method at one local rate; its server is that of FedAvg."""
    gradient = jax.grad(digits.loss_fn)
    momentum: Any = {
        "local_learning_rate": rate,
        "server_learning_rate": rate * LOCAL_STEPS,
        "beta": BETA,
        "local_steps": LOCAL_STEPS,
    }
    if name == "FedAvg-M":
        return fedavg_m(gradient, **momentum)
    if name == "SCAFFOLD-M":
        return scaffold_m(gradient, **momentum)
    if name == "FedHyper":
        return fedhyper(
            gradient,
            variant="global",
            local_learning_rate=rate,
            local_steps=LOCAL_STEPS,
            clients_per_round=taking_part,
            momentum=0.0,
        )
    return federated_averaging(gradient, optax.sgd(rate), local_steps=LOCAL_STEPS)


def curves(name: str, rate: Any, given: Problem, key: Any, taking_part: int, rounds: int) -> Any:
    """Validation and test error after every round."""
    method = build(name, rate, taking_part)

    def one(state: Any, round: Any) -> Any:
        who_key, batch_key = jax.random.split(jax.random.fold_in(key, round))
        who = jax.random.permutation(who_key, CLIENTS)[:taking_part]
        shape = (taking_part, LOCAL_STEPS, BATCH)
        drawn = jax.random.randint(batch_key, shape, 0, given.labels.shape[1])
        whose = who[:, None, None]
        state, _ = method.round(
            state, (given.images[whose, drawn], given.labels[whose, drawn]), who
        )
        held_out = (given.validation, given.test)
        return state, tuple(100 * digits.error_rate(state.params, batch) for batch in held_out)

    return jax.lax.scan(one, method.init(given.params, CLIENTS), jnp.arange(rounds))[1]


def train(name: str, taking_part: int, rounds: int, seeds: int) -> Result:
    """All rates and seeds of one method at once."""
    given = jax.tree.map(lambda *each: np.stack(each), *map(problem, range(seeds)))
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))

    def run(rate: Any, given: Problem, key: Any) -> Any:
        return curves(name, rate, given, key, taking_part, rounds)

    over_seeds = jax.vmap(run, in_axes=(None, 0, 0))
    over_rates = jax.vmap(over_seeds, in_axes=(0, None, None))
    return Result(*map(np.asarray, jax.jit(over_rates)(jnp.array(RATES), given, keys)))


def compare(rounds: int, seeds: int) -> dict[int, dict[str, Result]]:
    """Every method, with all clients and with three of them, by that number."""
    return {
        taking_part: {name: train(name, taking_part, rounds, seeds) for name in METHODS}
        for taking_part in (CLIENTS, 3)
    }


def table(found: dict[int, dict[str, Result]]) -> Table:
    """Test errors at each method's best rate: mean and standard error over the seeds."""
    rounds = next(iter(found[CLIENTS].values())).test.shape[-1]
    made = Table(title=f"Test error (%), {rounds} rounds of {LOCAL_STEPS} local steps")
    made.add_column("")
    for taking_part in found:
        for heading in (f"{taking_part} of {CLIENTS} clients", f"after {rounds // 4}", "rate"):
            made.add_column(heading, justify="right")
    for name in METHODS:
        cells = []
        for results in found.values():
            result = results[name]
            errors = result.test[result.best]
            last, early = late(errors), late(errors[:, : max(1, rounds // 4)])
            spread = last.std(ddof=1) / len(last) ** 0.5 if len(last) > 1 else 0.0
            rate = f"{RATES[result.best]:g}"
            cells += [f"{last.mean():.1f} ± {spread:.1f}", f"{early.mean():.1f}", rate]
        made.add_row(name, *cells)
    made.caption = "Means over the last tenth of the rounds, ± standard error over the seeds"
    return made


def draw(found: dict[int, dict[str, Result]], path: Path) -> None:
    """Test error against rounds, with all clients and with three."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, (taking_part, results) in zip(figure.subplots(1, 2), found.items(), strict=True):
        for name, result in results.items():
            mean = result.test[result.best].mean(0)
            axes.plot(
                np.arange(1, mean.size + 1), mean, label=f"{name}, rate {RATES[result.best]:g}"
            )
        axes.set(
            title=f"{taking_part} of {CLIENTS} clients a round",
            xlabel="round",
            ylabel="test error (%)",
            yscale="log",
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Digits on ten clients with two digits each; the best of four rates")
    save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    """Trains, prints the table, draws the picture."""
    del argv
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    found = compare(flags.FLAGS.rounds, flags.FLAGS.seeds)
    Console().print(table(found))
    path = Path(flags.FLAGS.out) / "federated_digits.png"
    draw(found, path)
    print(f"The picture is {path.resolve()}")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 120, "rounds of each run", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "runs with data dealt out differently", lower_bound=1)
    flags.DEFINE_string("out", "out", "folder of federated_digits.png")
    app.run(main)
