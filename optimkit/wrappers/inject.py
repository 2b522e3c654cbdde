"""Hyperparameters that live in the state: change or schedule them without a new compilation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import optax

from optimkit.numerics import hyperparameter_dtype
from optimkit.protocols import GradientTransformation, record_of


def inject_hyperparams(
    inner_factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
) -> Callable[..., GradientTransformation]:
    """Moves a factory's hyperparameters into the optimizer state.

    Numbers become entries of ``state.hyperparams``, which may be read and replaced between steps;
    schedules are called with the step count. Nothing recompiles when a value changes.

    Args:
      inner_factory: an optimkit or optax factory.
      static_args: arguments to leave alone, in addition to those that the factory's own record
        calls static (structure, dtypes, masks, callables that are no schedules).

    Returns:
      A factory with the same signature. Its state is
      ``optax.InjectStatefulHyperparamsState(count, hyperparams, hyperparams_states, inner_state)``.

    Built on ``optax.inject_hyperparams``, with two differences: hyperparameters are f32 (f64 under
    x64) whatever the parameters are, where optax casts them to the parameters' dtype, so that
    b2 = 0.999 becomes 1.0 beside bfloat16 parameters; and an integer given for a traced argument
    becomes a float, so that assigning 0.5 later does not recompile.

    >>> import optimkit as ok, jax.numpy as jnp
    >>> tx = ok.inject_hyperparams(ok.lion)(learning_rate=0.1)
    >>> params = jnp.ones(2, jnp.bfloat16)
    >>> state = tx.init(params)
    >>> round(float(state.hyperparams["b2"]), 4), state.hyperparams["b2"].dtype.name
    (0.99, 'float32')
    """
    record = record_of(inner_factory)
    named = {static_args} if isinstance(static_args, str) else set(static_args)
    static = named | set(record.static if record else ())
    traced = set(record.traced if record else ()) - static
    signature = inspect.signature(inner_factory)

    @functools.wraps(inner_factory)
    def build(*args: Any, **kwargs: Any) -> GradientTransformation:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if name in traced and isinstance(value, int) and not isinstance(value, bool):
                bound.arguments[name] = float(value)
        injected = optax.inject_hyperparams(
            inner_factory, static_args=static, hyperparam_dtype=hyperparameter_dtype()
        )
        return injected(*bound.args, **bound.kwargs)

    return build
