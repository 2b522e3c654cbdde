"""The settings of a run: one dataclass, whose fields are the flags of the command line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags


class ConfigError(ValueError):
    """A setting is wrong; the message is one sentence that says which and what to write."""


class DivergedError(FloatingPointError):
    """The loss is no longer a finite number."""


def _option(default: Any, text: str, *, shapes: bool = True) -> Any:
    """``shapes``: whether another value makes another run, so that it cannot be resumed with it."""
    return dataclasses.field(default=default, metadata={"help": text, "shapes": shapes})


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Every field is a flag of the same name; ``--help`` prints what they mean."""

    optimizer: str = _option("adamw", "a recipe of the catalog, or adamw for optax's")
    opt_args: str = _option("", "its other keywords, such as weight_decay=0.1,b2=0.95")
    learning_rate: float = _option(3e-3, "the rate, or the peak of the schedule")
    schedule: str = _option("constant", "a schedule of the catalog, or constant")
    schedule_args: str = _option("", "its keywords; the first one is --learning_rate if not given")
    steps: int = _option(300, "updates", shapes=False)
    batch_size: int = _option(16, "sequences a batch, over all devices")
    seq_len: int = _option(128, "bytes a sequence")
    seed: int = _option(0, "chooses the initial weights and the order of the batches")
    mesh: str = _option("data=1", "devices to share each batch, such as data=2", shapes=False)
    width: int = _option(128, "length of the residual stream")
    depth: int = _option(4, "blocks")
    heads: int = _option(4, "attention heads")
    qk_norm: bool = _option(False, "normalise queries and keys, against growing attention logits")
    z_loss: float = _option(0.0, "weight of the z-loss in training, such as 1e-4; 0: none")
    spike_rate: float = _option(0.0, "share of the steps in which an array's gradient is spoilt")
    spike_factor: float = _option(1000.0, "what a spoilt gradient is multiplied by")
    spike_seed: int = _option(0, "chooses which gradients are spoilt")
    val_every: int = _option(
        50, "steps between validations; the last step has one in any case", shapes=False
    )
    out: str = _option(
        "", "folder for metrics.csv, curves.png and checkpoints; needed to write any", shapes=False
    )
    checkpoint_every: int = _option(
        0, "steps between checkpoints in --out, also after the last step; 0: none", shapes=False
    )
    keep: int = _option(3, "checkpoints to keep", shapes=False)
    branch_from: int = _option(
        0, "saved step of the run in --out to branch from, see branches.py; 0: none", shapes=False
    )
    cooldown: int = _option(0, "steps of a branch, over which the rate decays", shapes=False)
    extend: int = _option(0, "steps to make the saved run in --out longer by", shapes=False)
    resume: bool = _option(False, "go on from the newest whole checkpoint in --out", shapes=False)
    tensorboard: bool = _option(False, "also write TensorBoard scalars into --out", shapes=False)


def short_run(steps: int, learning_rate: float, **changes: Any) -> Config:
    """A run for a comparison: a tenth of the steps warms up, the last three tenths decay."""
    warmup, decay = max(1, steps // 10), max(1, 3 * steps // 10)
    return Config(
        learning_rate=learning_rate,
        schedule="wsd_schedule",
        schedule_args=f"warmup_steps={warmup},stable_steps={max(0, steps - warmup - decay)},"
        f"decay_steps={decay}",
        steps=steps,
        val_every=max(1, steps // 6),
        **changes,
    )


@contextlib.contextmanager
def settings(where: str) -> Iterator[None]:
    """Turns what a factory says about its arguments into one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error.args[0] if error.args else error}") from error


def parse_keywords(text: str) -> dict[str, Any]:
    """Reads ``"a=1,b='x',c=(1, 2)"``. Values are Python literals; nothing is evaluated.

    Raises:
      ValueError: if it is anything else.
    """
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not a list of keywords")
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("two stars")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            f"cannot read {text!r}; write keywords with plain values, and text in quotes, such as "
            "weight_decay=0.1,decay='linear'"
        ) from None


_DEFINE = {
    "str": flags.DEFINE_string,
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "bool": flags.DEFINE_boolean,
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag for every field of ``Config``."""
    for field in dataclasses.fields(Config):
        _DEFINE[str(field.type)](
            field.name, field.default, field.metadata["help"], flag_values=values
        )


def underscored(arguments: Sequence[str]) -> list[str]:
    """Lets a flag's name be written with hyphens.

    >>> underscored(["train", "--branch-from=20", "--opt_args=a=-1"])
    ['train', '--branch_from=20', '--opt_args=a=-1']
    """

    def one(argument: str) -> str:
        name, equals, value = argument.partition("=")
        is_flag = name.startswith("--") and name != "--"
        return "--" + name[2:].replace("-", "_") + equals + value if is_flag else argument

    return [one(argument) for argument in arguments]


def config_from_flags(values: flags.FlagValues) -> Config:
    """The settings that the flags hold."""
    return Config(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Config)})


def command(config: Config) -> str:
    """The command line that has these settings."""
    changed = [
        f"--{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != field.default
    ]
    return shlex.join(["python", "-m", "examples.lm.train", *changed])
