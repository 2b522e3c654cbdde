r"""Trains the byte-level language model with any optimizer and any schedule of the catalog.

    python -m examples.lm.train --optimizer=adamp --opt_args="weight_decay=0.1,b2=0.95" \
        --learning_rate=3e-3 --schedule=wsd_schedule \
        --schedule_args="warmup_steps=20,stable_steps=220,decay_steps=60" --steps=300

``--optimizer=adamw`` is optax's AdamW, the baseline. A run with ``--out=FOLDER
--checkpoint_every=50`` can be stopped or killed, and gone on with by the same command with
``--resume``. ``--branch-from=200 --cooldown=20`` finishes a model from a saved step, and
``--extend=100`` makes a saved run longer: see ``branches.py``.

From Python: ``run(Config(steps=100))``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from examples.lm import report, taps
from examples.lm.branches import Branch, Extended, branch_schedule, folder_of, main_line, resolved
from examples.lm.checkpoints import CheckpointHook, Resume, Stopped, checkpoints_of
from examples.lm.config import (
    Config,
    ConfigError,
    DivergedError,
    command,
    config_from_flags,
    define_flags,
    parse_keywords,
    settings,
    underscored,
)
from examples.lm.data import python_manual
from examples.lm.model import LanguageModel, Linear, ModelConfig
from examples.lm.spikes import spike_gradients
from optimkit import catalog
from optimkit.nn import z_loss

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


def build_schedule(config: Config) -> optax.Schedule:
    """The schedule by its name; its first argument, the peak, is the learning rate if not given."""
    with settings("--schedule"):
        keywords = parse_keywords(config.schedule_args)
        if config.schedule == "constant":
            if keywords:
                raise ValueError(f"constant takes no --schedule_args, got {config.schedule_args!r}")
            made = optax.constant_schedule(config.learning_rate)
            keywords = {"peak_value": config.learning_rate}
        else:
            factory = catalog.find(config.schedule, "schedule").factory
            peak = next(iter(inspect.signature(factory).parameters))
            keywords = {peak: config.learning_rate, **keywords}
            made = catalog.make(config.schedule, "schedule", **keywords)
    return branch_schedule(config, keywords) if config.branch_from else made


def build_optimizer(config: Config, rate: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer by its name, at a rate or a schedule."""
    with settings("--optimizer"):
        keywords = parse_keywords(config.opt_args)
        if config.optimizer == "adamw":
            factory: Callable[..., Any] = optax.adamw
        else:
            record = catalog.find(config.optimizer, "recipe")
            factory = record.factory
            if missing := set(record.needs) - {"params", *GIVEN_EXTRAS}:
                raise ValueError(
                    f"{record.name} needs {sorted(missing)} in every update, which this trainer "
                    "does not compute"
                )
        if taps.wants_stats(config):
            keywords = {**taps.DEFAULTS, **keywords}
        if "learning_rate" in inspect.signature(factory).parameters:
            keywords = {"learning_rate": rate, **keywords}
        catalog.check_keywords(factory, keywords)
        return optax.with_extra_args_support(factory(**keywords))


def build_mesh(config: Config) -> jax.sharding.Mesh:
    """A mesh with one axis, ``data``, over the first devices."""
    with settings("--mesh"):
        sizes = parse_keywords(config.mesh)
        if list(sizes) != ["data"] or not isinstance(sizes["data"], int) or sizes["data"] < 1:
            raise ValueError(f"write data=N with N devices, got {config.mesh!r}")
        count, found = sizes["data"], jax.device_count()
        if count > found:
            raise ValueError(
                f"data={count} needs {count} devices and there are {found}; on a CPU, set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        if config.batch_size % count:
            raise ValueError(f"--batch_size {config.batch_size} must be a multiple of {count}")
        return jax.make_mesh(
            (count,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
        )


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

GIVEN_EXTRAS = ("value", "grad", "value_fn", "layer_stats")
"""Extra arguments that the step hands to the optimizer."""


def make_steps(
    graphdef: Any,
    zeros: Any,
    tx: optax.GradientTransformationExtraArgs,
    z_coefficient: float = 0.0,
) -> tuple[Any, Any]:
    """The two pure functions of a run: ``train_step`` and ``eval_step``.

    Training minimises the cross-entropy and ``z_coefficient`` times the z-loss; what is reported is
    the cross-entropy alone. ``zeros`` are the taps of the model, see ``taps.py``.
    """

    def losses(params: Any, zeros: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params, zeros)(batch[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
        return loss + z_loss(logits, z_coefficient) if z_coefficient else loss, loss

    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        return losses(params, zeros, batch)[1]

    def train_step(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, Any, Any]:
        both = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)
        (value, loss), (grads, tap_grads) = both(params, zeros, batch)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            value=value,
            grad=grads,
            value_fn=lambda params: losses(params, zeros, batch)[0],
            **taps.extras_of(tap_grads),
        )
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), opt_state, metrics

    return train_step, loss_fn


class Trainer:
    """A run that can be stopped, looked at and gone on with.

    ``params``, ``opt_state`` and ``step`` are its whole state: the schedule counts inside
    ``opt_state``, and the data position is the step.

    Args:
      config: the settings.
      hooks: what happens around the steps, in this order.
      tx: an optimizer to use in place of the one that the settings name, for example
        ``optax.chain(something, build_optimizer(config, build_schedule(config)))``.
      linear: what makes the projections of the blocks, see ``LanguageModel``; by default
        ``nnx.Linear``, with taps if the optimizer wants statistics of the layers.

    Raises:
      ConfigError: if a setting is wrong.
    """

    def __init__(
        self,
        config: Config,
        hooks: Sequence[report.Hook] = (),
        *,
        tx: optax.GradientTransformation | None = None,
        linear: Linear | None = None,
    ):
        self.config = config = resolved(config)
        self.hooks = tuple(hooks)
        self.schedule = build_schedule(config)
        tx = tx or build_optimizer(config, self.schedule)
        if config.spike_rate:
            with settings("--spike_rate"):
                spikes = spike_gradients(config.spike_rate, config.spike_factor, config.spike_seed)
            tx = optax.chain(spikes, tx)
        self.tx = optax.with_extra_args_support(tx)
        mesh = build_mesh(config)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(mesh, PartitionSpec("data"))
        with settings("settings"):
            if min(config.steps, config.val_every) < 1:
                raise ValueError("--steps and --val_every must be at least 1")
            self.data = python_manual(
                seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
            )
            if config.z_loss < 0:
                raise ValueError(f"--z_loss must not be negative, got {config.z_loss}")
            shape = ModelConfig(
                width=config.width, depth=config.depth, heads=config.heads, qk_norm=config.qk_norm
            )
        linear = linear or taps.linear_for(config)
        model = LanguageModel(shape, rngs=nnx.Rngs(config.seed), linear=linear)
        graphdef, params, zeros = taps.split(model)
        train_step, eval_step = make_steps(graphdef, zeros, self.tx, config.z_loss)
        # The old parameters and state are donated: their memory becomes that of the new ones.
        self.train_step = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=replicated)
        self.eval_step = jax.jit(eval_step)
        self.params = jax.device_put(params, replicated)
        with settings("--opt_args"):
            self.opt_state = jax.jit(self.tx.init, out_shardings=replicated)(self.params)
        self.step = 0
        self.history = report.History(
            parameters=sum(x.size for x in jax.tree.leaves(self.params)),
            optimizer_bytes=sum(x.nbytes for x in jax.tree.leaves(self.opt_state)),
        )

    @property
    def title(self) -> str:
        """One line that says what runs."""
        c = self.config
        size = f"{self.history.parameters / 1e6:.2f}M parameters"
        return f"{c.optimizer}, {c.schedule} rate {c.learning_rate:g}, {size}, {c.mesh}"

    def place(self, batch: np.ndarray) -> jax.Array:
        """Puts a batch on the devices, a part of the sequences on each."""
        return jax.device_put(batch, self.batch_sharding)

    def validate(self) -> float:
        """The mean loss over the fixed validation batches."""
        batches = self.data.validation_batches()
        return float(np.mean([self.eval_step(self.params, self.place(b)) for b in batches]))

    def run(self) -> report.History:
        """Trains from the present step to the last one.

        Raises:
          DivergedError: at the first loss that is not finite.
        """
        config = self.config
        # All at once: calling a schedule step by step on the host would cost more than the step.
        rates = np.asarray(jax.vmap(self.schedule)(jnp.arange(config.steps)))
        with contextlib.ExitStack() as finish:
            for hook in self.hooks:
                hook.start(self)
                finish.callback(hook.finish, self)
            while self.step < config.steps:
                row = self._one_step(float(rates[self.step]))
                for hook in self.hooks:
                    hook.step(self, row)
                if not math.isfinite(row.loss):
                    raise DivergedError(
                        f"the loss is {row.loss} at step {row.step} of {self.title}; try a "
                        "smaller --learning_rate, a longer warm-up, or a clip"
                    )
        return self.history

    def _one_step(self, rate: float) -> report.Row:
        began = time.perf_counter()
        self.params, self.opt_state, metrics = self.train_step(
            self.params, self.opt_state, self.place(self.data.batch(self.step))
        )
        metrics = jax.device_get(metrics)  # waits for the step, so the time below is its own
        step_time = time.perf_counter() - began
        self.step += 1
        due = self.step % self.config.val_every == 0 or self.step == self.config.steps
        row = report.Row(
            step=self.step,
            loss=float(metrics["loss"]),
            rate=rate,
            gradient_norm=float(metrics["gradient_norm"]),
            step_time=step_time,
            val_loss=self.validate() if due else math.nan,
        )
        self.history.rows.append(row)
        return row


def run(config: Config, hooks: Sequence[report.Hook] = (), **kwargs: Any) -> report.History:
    """Trains one model; the keywords are ``Trainer``'s."""
    return Trainer(config, hooks, **kwargs).run()


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def standard_hooks(config: Config) -> list[report.Hook]:
    """What the command line shows and writes."""
    hooks: list[report.Hook] = []
    extend, config = config.extend, resolved(config)
    folder = folder_of(config)
    if config.branch_from:
        first_step: report.Hook = Branch(main_line(config), config.branch_from)
        if config.resume and checkpoints_of(config, folder).steps():
            first_step = Resume(checkpoints_of(config, folder))
        hooks.append(first_step)
    elif config.resume:
        with settings("--resume"):
            hooks.append(Resume(checkpoints_of(config, folder)))
    if extend:
        hooks.append(Extended())
    hooks.append(report.ProgressBar(config.optimizer))
    if config.out:
        hooks += [report.CsvLog(folder), report.Curves(folder)]
    if config.tensorboard:
        with settings("--tensorboard"):
            hooks.append(report.TensorBoardLog(folder if config.out else Path("out")))
    if config.checkpoint_every:
        with settings("--checkpoint_every"):
            hooks.append(CheckpointHook(checkpoints_of(config, folder), config.checkpoint_every))
    return hooks


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say.

    Exit status 2: a wrong setting; 1: the loss was not finite; 128 + the signal: stopped by it.
    """
    logging.set_verbosity(logging.WARNING)  # no notes about backends that are not there
    config = config_from_flags(flags.FLAGS)
    try:
        if argv[1:]:
            raise ConfigError(f"every setting is a --flag=value, got {list(argv[1:])}")
        trainer = Trainer(config, standard_hooks(config))
        config = trainer.config
        print(trainer.data.source)
        print(trainer.title, flush=True)
        history = trainer.run()
    except (ConfigError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except Stopped as stop:
        again = command(dataclasses.replace(config, resume=True))
        print(f"{stop}, which is saved; go on with\n    {again}")
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        print("stopped; nothing was saved: that needs --out and --checkpoint_every")
        sys.exit(128 + signal.SIGINT)
    print(
        f"final training loss {history.final_loss:.4f}, validation loss {history.val_loss:.4f} "
        f"nats a byte; median step {1e3 * history.step_time:.1f} ms; optimizer "
        f"{history.bytes_per_parameter:.2f} bytes a parameter"
    )
    if config.out:
        folder = folder_of(config)
        print(f"wrote {folder / 'metrics.csv'} and {folder / 'curves.png'}")


if __name__ == "__main__":
    define_flags()
    app.run(main, argv=underscored(sys.argv))
