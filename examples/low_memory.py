"""What a smaller optimizer state costs in quality: one language model, one rate schedule, a table.

    python -m examples.low_memory

Trains the byte-level model of ``examples.lm`` with AdamW in f32, with its moments in fewer bits,
and with methods that keep them for a subspace only; then with half of the weights, and with all
projections as products of two factors. Each runs at the rate that was best for it in the small
sweep recorded below; what is measured is the validation loss after the same number of steps,
against f32 AdamW's, and the bytes of the live state.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from absl import app, flags, logging
from flax import nnx
from rich.console import Console
from rich.table import Table

import optimkit as ok
from examples.lm import report
from examples.lm.config import ConfigError, DivergedError, short_run
from examples.lm.model import Linear
from examples.lm.train import Trainer, build_schedule
from optimkit.layout import is_hidden_matrix

RANK = 32
"""A quarter of the model's width."""

ADAM: dict[str, Any] = {"b2": 0.95, "weight_decay": 0.1}
LOW_RANK: dict[str, Any] = {
    "rank": RANK,
    "update_proj_gap": 50,
    "lowrank_leaves": is_hidden_matrix,
}
"""Embedding and head keep whole moments, as the authors have it."""


class FactoredLinear(nnx.Module):
    """A projection whose kernel is the product of two factors."""

    def __init__(
        self, inputs: int, outputs: int, *, use_bias: bool, kernel_init: Any, rngs: nnx.Rngs
    ):
        del use_bias
        self.lora_a = nnx.Param(kernel_init(rngs.params(), (inputs, RANK)))
        self.lora_b = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (RANK, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The inputs through both factors."""
        return x @ self.lora_a[...] @ self.lora_b[...]


def _adamw(rate: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, **ADAM)


def _in_format(name: Any) -> Callable[[Any], optax.GradientTransformation]:
    return lambda rate: ok.quantize_state(_adamw(rate), format=name)


def _coso(rate: Any) -> optax.GradientTransformation:
    sizes: dict[str, Any] = {"proj_rank": RANK, "sketch_rank": RANK, "history_capacity": RANK}
    return ok.coso(rate, **ADAM, **sizes, update_proj_gap=50, lowrank_leaves=is_hidden_matrix)


def _half_of_the_weights(rate: Any) -> optax.GradientTransformation:
    return ok.dynamic_sparse(
        _adamw(rate),
        density=0.5,
        growth="gradient",
        total_steps=300,
        update_every=50,
        sparse_leaves=is_hidden_matrix,
    )


def _refactorized(rate: Any) -> optax.GradientTransformation:
    inner = optax.chain(
        ok.momentum_reset(ok.scale_by_adam(b2=ADAM["b2"]), 100, moments="after", counts="after"),
        optax.add_decayed_weights(ADAM["weight_decay"]),
        optax.scale_by_learning_rate(rate),
    )
    return ok.refactorized(inner, interval=100, reset_state=False)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
      label: its name in the table.
      make: the optimizer at a schedule.
      tried: learning rate -> validation loss after 300 steps, seed 0, on CPython 3.11's text. The
        rate with the smallest loss is used. ``--sweep`` measures them again.
      linear: what makes the model's projections, None for ``nnx.Linear``.
    """

    label: str
    make: Callable[[Any], optax.GradientTransformation]
    tried: Mapping[float, float]
    linear: Linear | None = None

    @property
    def learning_rate(self) -> float:
        """The best rate of the sweep."""
        return min(self.tried, key=lambda rate: self.tried[rate])


ENTRIES = (
    Entry("adamw, f32", _adamw, {1e-3: 1.555, 3e-3: 1.548}),
    Entry("adamw, bfloat16", lambda r: ok.with_state_dtype(_adamw(r), "bfloat16"), {3e-3: 1.519}),
    Entry("adamw, bf16_sr", _in_format("bf16_sr"), {3e-3: 1.533}),
    Entry("adamw, dynamic8", _in_format("dynamic8"), {3e-3: 1.508}),
    Entry("adamw, companded8", _in_format("companded8"), {3e-3: 1.531}),
    Entry("adamw, dynamic4", _in_format("dynamic4"), {1e-3: 1.547, 3e-3: 1.560}),
    Entry("adamw_8bit", lambda r: ok.adamw_8bit(r, **ADAM), {3e-3: 1.525}),
    Entry(
        "galore",
        lambda r: ok.galore(r, **ADAM, **LOW_RANK),
        {3e-3: 1.780, 1e-2: 1.499, 3e-2: 1.418},
    ),
    Entry("fira", lambda r: ok.fira(r, **ADAM, **LOW_RANK), {3e-3: 1.469, 1e-2: 1.458}),
    Entry(
        "gradnormlorp",
        lambda r: ok.gradnormlorp(r, **ADAM, **LOW_RANK),
        {1e-3: 1.719, 3e-3: 1.496, 1e-2: 1.497},
    ),
    Entry(
        "apollo",
        lambda r: ok.apollo(r, **ADAM, **LOW_RANK),
        {3e-3: 1.577, 1e-2: 1.399, 3e-2: 1.492},
    ),
    Entry(
        "apollo_mini",
        lambda r: ok.apollo_mini(r, **ADAM, **{**LOW_RANK, "rank": 1}),
        {3e-3: 1.619, 1e-2: 1.678},
    ),
    Entry("coso", _coso, {3e-3: 1.622, 1e-2: 1.569, 3e-2: 1.768}),
    Entry("half of the weights", _half_of_the_weights, {3e-3: 1.514}),
    Entry("factors, adamw", _adamw, {1e-3: 1.701, 3e-3: 1.871, 1e-2: 2.448}, FactoredLinear),
    Entry(
        "factors, balanced",
        _refactorized,
        {1e-3: 1.727, 3e-3: 1.895, 1e-2: 2.321},
        FactoredLinear,
    ),
)


def train(entry: Entry, steps: int, learning_rate: float, **changes: Any) -> report.History:
    """One run of one entry; ``changes`` are further settings."""
    config = short_run(steps, learning_rate, **changes)
    hooks = [report.ProgressBar(f"{entry.label} {learning_rate:g}")]
    return Trainer(config, hooks, tx=entry.make(build_schedule(config)), linear=entry.linear).run()


def sweep(steps: int, only: Sequence[str] = ()) -> None:
    """Measures every rate of every entry again, and prints the validation losses."""
    for entry in ENTRIES:
        if not only or entry.label in only:
            losses = {rate: round(train(entry, steps, rate).val_loss, 3) for rate in entry.tried}
            print(f"{entry.label}: {losses}", flush=True)


def table(histories: Mapping[str, report.History], steps: int) -> Table:
    """What each method reached, and what it kept."""
    base = histories[ENTRIES[0].label].val_loss
    made = Table(title=f"The same model and batches, {steps} steps")
    for heading in ("optimizer", "rate", "val loss", "against f32", "bytes/param", "step (ms)"):
        made.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for entry in ENTRIES:
        history = histories[entry.label]
        made.add_row(
            entry.label,
            f"{entry.learning_rate:g}",
            f"{history.val_loss:.3f}",
            f"{100 * (history.val_loss / base - 1):+.1f}%",
            f"{history.bytes_per_parameter:.2f}",
            f"{1e3 * history.step_time:.0f}",
        )
    made.caption = (
        "val loss: nats a byte, after the last step; bytes/param: the live arrays of the "
        "optimizer state; step: median, with the model's forward and backward pass."
    )
    return made


def draw(histories: Mapping[str, report.History], path: Path) -> None:
    """Validation losses as bars, with the bytes of state beside them."""
    figure, (axes,) = report.figure_with_axes(1, width=9, height=0.36 * len(histories) + 1.5)
    losses = {label: history.val_loss for label, history in histories.items()}
    base = losses[ENTRIES[0].label]
    axes.axvspan(base, 1.02 * base, color="#009e73", alpha=0.2, label="within 2% of f32 AdamW")
    axes.barh(list(losses), list(losses.values()), color="#0072b2", height=0.7)
    for label, history in histories.items():
        text = f" {history.bytes_per_parameter:.2f} bytes a parameter"
        axes.text(history.val_loss, label, text, va="center", fontsize=9)
    least, most = min(losses.values()), max(losses.values())
    axes.set_xlim(least - 0.3 * (most - least) - 0.01, most + 0.5 * (most - least) + 0.01)
    axes.invert_yaxis()
    axes.set(xlabel="validation loss (nats per byte)", title="Quality against memory")
    axes.legend(loc="upper right")
    report.save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    """Trains, prints the table, draws the picture."""
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    began = time.perf_counter()
    steps, path = flags.FLAGS.steps, Path(flags.FLAGS.out) / "low_memory.png"
    try:
        if flags.FLAGS.sweep:
            sweep(steps, argv[1:])
            return
        print(f"Training {len(ENTRIES)} models of {steps} steps; some ten minutes on two cores.")
        histories = {entry.label: train(entry, steps, entry.learning_rate) for entry in ENTRIES}
    except (ConfigError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    Console().print(table(histories, steps))
    draw(histories, path)
    print(f"{time.perf_counter() - began:.0f} s in all. The picture is in {path.resolve()}")


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 300, "updates of each run", lower_bound=2)
    flags.DEFINE_string("out", "out", "folder of low_memory.png")
    flags.DEFINE_boolean("sweep", False, "measure the recorded learning rates again, and stop")
    app.run(main)
