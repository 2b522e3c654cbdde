"""Sixteen settings of an optimizer trained at once, beside sixteen separate runs: a table.

    python -m examples.sweep_digits

Both sides train the same classifier on the same batches of scikit-learn's digits, from the same
start, with AdamP at eight rates and two weight decays. A separate run is what one would write
without ``optimkit.sweep``: a jitted step of its own, with its rate inside, and so a compilation of
its own. JAX's cache of compiled programs on disk is switched off for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import optimkit as ok
from examples import digits
from examples.lm.report import save_figure
from optimkit.sweep import SweepResult, plot, sweep

VALUES: dict[str, Any] = {
    "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    "weight_decay": [0.0, 0.1],
}
FACTORY = ok.adamp


class Comparison(NamedTuple):
    """Seconds and compilations of both sides, and how far their losses are apart."""

    together: SweepResult
    seconds: float
    compilations: int
    again_seconds: float
    again_compilations: int
    separate_seconds: float
    separate_compilations: int
    apart: float

    @property
    def speedup(self) -> float:
        """How many times faster the sweep is than all separate runs."""
        return self.separate_seconds / self.seconds


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """What the work returns, its seconds, and how many programs XLA compiled for it."""
    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    try:
        result = work()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return result, time.perf_counter() - began, len(compiled)


def separate_run(setting: dict[str, Any], params: Any, batches: list[Any]) -> list[float]:
    """One training run, as a user would write it; gives its losses."""
    tx = FACTORY(**setting)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(digits.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = jax.jit(tx.init)(params), []
    for batch in batches:
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    return jax.device_get(losses)


def compare(steps: int, seed: int = 0) -> Comparison:
    """Trains all settings both ways; the sweep also with other rates, which compiles nothing."""
    data, params = digits.load(seed), digits.init_params(seed)
    batches = list(data.batches(steps, seed))

    def score_fn(params: Any) -> jax.Array:
        return digits.loss_fn(params, data.validation)

    def together(values: dict[str, Any]) -> SweepResult:
        return sweep(FACTORY, digits.loss_fn, params, batches, score_fn=score_fn, **values)

    jax.block_until_ready(digits.loss_fn(params, batches[0]))  # neither side pays for the start
    found, seconds, compilations = measured(lambda: together(VALUES))
    other = {**VALUES, "learning_rate": [2 * rate for rate in VALUES["learning_rate"]]}
    _, again_seconds, again_compilations = measured(lambda: together(other))
    losses, separate_seconds, separate_compilations = measured(
        lambda: [separate_run(setting, params, batches) for setting in found.settings]
    )
    early = slice(0, min(steps, 10))  # later, rounding has grown in the runs with a high rate
    apart = np.abs(found.losses[:, early] / np.array(losses)[:, early] - 1).max()
    return Comparison(
        found,
        seconds,
        compilations,
        again_seconds,
        again_compilations,
        separate_seconds,
        separate_compilations,
        float(apart),
    )


def tables(made: Comparison) -> tuple[Table, Table]:
    """What it cost, and what each setting reached."""
    count = len(made.together.settings)
    cost = Table(title=f"{count} settings, {made.together.losses.shape[1]} steps each")
    for heading in ("", "seconds", "programs compiled", "times faster"):
        cost.add_column(heading, justify="right" if heading else "left")
    first, again = made.separate_seconds / made.seconds, made.separate_seconds / made.again_seconds
    for name, seconds, compilations, ratio in (
        (f"{count} separate runs", made.separate_seconds, made.separate_compilations, 1.0),
        ("one sweep", made.seconds, made.compilations, first),
        ("again, other rates", made.again_seconds, made.again_compilations, again),
    ):
        cost.add_row(name, f"{seconds:.2f}", str(compilations), f"{ratio:.1f}")
    cost.caption = f"Losses of the first ten steps differ by at most {made.apart:.0e} of themselves"

    reached = Table(title="Validation loss")
    rates = VALUES["learning_rate"]
    for heading in ("weight decay", *(f"rate {rate:g}" for rate in rates)):
        reached.add_column(heading, justify="right")
    scores = dict(zip(range(count), made.together.scores, strict=True))
    decays = VALUES["weight_decay"]
    for column, decay in enumerate(decays):
        places = range(column, count, len(decays))  # the last list runs fastest
        shown = ("diverged" if made.together.diverged[i] else f"{scores[i]:.3f}" for i in places)
        reached.add_row(f"{decay:g}", *shown)
    best = ", ".join(f"{name}={value:g}" for name, value in made.together.best.items())
    reached.caption = f"Best: {best}, loss {made.together.best_score:.3f}"
    return cost, reached


def draw(result: SweepResult, path: Path) -> None:
    """The validation loss against the rate, and the training curves of the best four."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    against_rate, curves = figure.subplots(1, 2)
    plot(result, ax=against_rate)
    against_rate.set(title="After the last step", ylabel="validation loss (nats)", yscale="log")
    for place in result.ranking[:4]:
        label = ", ".join(f"{name}={value:g}" for name, value in result.settings[place].items())
        curves.plot(np.arange(1, result.losses.shape[1] + 1), result.losses[place], label=label)
    curves.set(title="The four best", xlabel="step", ylabel="training loss (nats)", yscale="log")
    curves.legend()
    for axes in (against_rate, curves):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{FACTORY.__name__}: {len(result.settings)} settings in one sweep, digits")
    save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    """Trains, prints the tables, draws the picture."""
    del argv
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    jax.config.update("jax_enable_compilation_cache", False)
    made = compare(flags.FLAGS.steps)
    console = Console()
    for table in tables(made):
        console.print(table)
    path = Path(flags.FLAGS.out) / "sweep_digits.png"
    draw(made.together, path)
    print(f"The picture is {path.resolve()}")


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 100, "updates of each setting", lower_bound=1)
    flags.DEFINE_string("out", "out", "folder of sweep_digits.png")
    app.run(main)
