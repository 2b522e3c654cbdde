"""Training all settings at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optimkit.numerics import check_count, compute_dtype, hyperparameter_dtype
from optimkit.protocols import Array, PyTree
from optimkit.sweep.result import SweepResult
from optimkit.sweep.settings import check_factory, make_settings, name_of


def sweep(
    factory: Callable[..., optax.GradientTransformation],
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batches: Iterable[Any],
    /,
    *,
    fixed: Mapping[str, Any] | None = None,
    combine: str = "product",
    score_fn: Callable[[PyTree], Array] | None = None,
    score_last: int | None = None,
    extras: Callable[[PyTree, PyTree, Any], Mapping[str, Any]] | None = None,
    mesh: Mesh | None = None,
    keep_params: bool = False,
    progress: bool = False,
    **values: Iterable[float],
) -> SweepResult:
    """Trains one model a setting, all at once from the same start on the same batches.

    Args:
      factory: makes the optimizer: one of optimkit's, of optax's, or a function of your own such as
        ``lambda learning_rate: ok.lion(ok.rex_schedule(learning_rate, 100))``.
      loss_fn: ``(params, batch) -> scalar``.
      params: the initial parameters, the same for every setting.
      batches: the data, one batch an update. All have the shapes of the first.
      fixed: arguments of the factory that all settings share, of any kind.
      combine: ``"product"`` trains every combination of the lists, the last list running fastest;
        ``"zip"`` the first entries together, then the second ones, and so on.
      score_fn: ``params -> scalar`` of the trained parameters by which the settings are ranked,
        smaller is better: a validation loss. Without it, the mean of the last losses.
      score_last: how many last losses; default: a tenth of the steps, at least 1.
      extras: ``(params, grads, batch) -> dict`` of extra arguments for every update, beside
        ``value``, ``grad``, ``value_fn`` and ``grad_fn``, which are always given.
      mesh: devices to spread the settings over, along all axes of the mesh. Settings that do not
        fill the last round are trained twice. Default: all settings on the default device.
      keep_params: whether the result holds the trained parameters of all settings.
      progress: whether to show a bar; needs rich.
      **values: a list of numbers for each swept argument. A catalogued method allows the arguments
        that its record calls traced.

    Returns:
      A ``SweepResult``: all settings with their curves, and the best one.

    Raises:
      TypeError: for an argument that the factory lacks, or that cannot be traced.
      ValueError: if a list is wrong, a value is out of the factory's range, the method needs extras
        that are not given, or there is no batch.
      FloatingPointError: if every setting diverged.

    Compiled once for all settings: other values, with the same functions, shapes and number of
    settings, compile nothing. Memory holds the parameters, the gradient and the optimizer state of
    every setting. One process only. The numbers are those of separate runs up to the order in which
    products are summed. A setting diverges on its own: others are not touched.

    >>> import optax
    >>> def loss_fn(w, batch):
    ...     return (w - batch) ** 2
    >>> found = sweep(optax.sgd, loss_fn, jnp.zeros(()), [1.0] * 4, learning_rate=[0.1, 0.5, 1e30])
    >>> found.best, found.best_losses.tolist(), found.diverged.tolist()
    ({'learning_rate': 0.5}, [1.0, 0.0, 0.0, 0.0], [False, False, True])
    """
    fixed = dict(fixed or {})
    if score_last is not None:
        check_count(score_last=score_last, least=1)
    check_factory(factory, values, fixed, extras)
    settings = make_settings(values, combine)
    for setting in settings:
        factory(**fixed, **setting)  # its range checks see concrete values here, and only here
    problem = _Problem(
        factory,
        loss_fn,
        score_fn,
        extras,
        tuple((name, _Same(value)) for name, value in sorted(fixed.items())),
        mesh,
    )
    trained = _train(problem, settings, params, batches, keep_params, progress)
    losses, scores, finite, kept = trained
    if score_fn is None:
        last = max(1, losses.shape[1] // 10) if score_last is None else score_last
        scores = losses[:, -last:].mean(axis=1)
    diverged = ~(np.isfinite(losses).all(axis=1) & finite & np.isfinite(scores))
    if diverged.all():
        bad = ~np.isfinite(losses)
        last = int(np.where(bad.any(axis=1), bad.argmax(axis=1), losses.shape[1]).max())
        raise FloatingPointError(
            f"every one of the {len(settings)} settings diverged, the last one after {last} "
            f"updates: try smaller values of {', '.join(values)}"
        )
    best = int(np.argmin(np.where(diverged, np.inf, scores)))
    return SweepResult(settings, losses, scores, diverged, best, kept)


def _train(
    problem: _Problem,
    settings: tuple[dict[str, float], ...],
    params: PyTree,
    batches: Iterable[Any],
    keep: bool,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, PyTree]:
    """Losses, scores, whether the parameters are finite, and those to keep; one a setting."""
    count = len(settings)
    mesh = problem.mesh
    padding = -count % mesh.size if mesh is not None else 0
    padded = (*settings, *[settings[-1]] * padding)
    values = {
        name: np.asarray([setting[name] for setting in padded], hyperparameter_dtype())
        for name in settings[0]
    }
    programs = _programs(problem)
    values, params = programs.spread(values), programs.share(params)
    total = len(batches) if isinstance(batches, Sized) else None
    losses: list[Array] = []
    state = None
    with _bar(progress, total, count) as show:
        for batch in batches:
            batch = programs.share(batch)
            if not losses:
                params, state = programs.start(values, params)
            params, state, loss = programs.step(values, params, state, batch)
            losses.append(loss)
            show(losses)
    if not losses:
        raise ValueError("batches must hold at least one batch, got none")
    scores, finite = jax.device_get(programs.finish(params))
    curves = np.stack(jax.device_get(losses), axis=1)[:count]
    kept = jax.tree.map(lambda leaf: leaf[:count], jax.device_get(params)) if keep else None
    return curves, np.asarray(scores)[:count], np.asarray(finite)[:count], kept


# ---------------------------------------------------------------------------------------------
# The compiled programs
# ---------------------------------------------------------------------------------------------


class _Same:
    """A fixed argument as part of a key: plain values by value, everything else by identity."""

    def __init__(self, value: Any):
        self.value = value
        plain = isinstance(value, (bool, int, float, str, type(None)))
        self.key = (type(value), value) if plain else id(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """All that the programs depend on beside arrays; equal problems share their programs."""

    factory: Callable[..., optax.GradientTransformation]
    loss_fn: Callable[[PyTree, Any], Array]
    score_fn: Callable[[PyTree], Array] | None
    extras: Callable[[PyTree, PyTree, Any], Mapping[str, Any]] | None
    fixed: tuple[tuple[str, _Same], ...]
    mesh: Mesh | None

    def optimizer(self, values: Mapping[str, Array]) -> optax.GradientTransformationExtraArgs:
        """The optimizer of one setting, with traced values."""
        fixed = {name: same.value for name, same in self.fixed}
        try:
            return optax.with_extra_args_support(self.factory(**fixed, **values))
        except jax.errors.ConcretizationTypeError as error:
            raise TypeError(
                f"{name_of(self.factory)} needs to know {' or '.join(values)} when it is built, so "
                "it cannot be swept: give it in fixed, one sweep a value"
            ) from error


class _Programs(NamedTuple):
    """``spread`` puts one value a setting in place, ``share`` one for all; the rest is compiled."""

    spread: Callable[[PyTree], PyTree]
    share: Callable[[PyTree], PyTree]
    start: Callable[..., tuple[PyTree, PyTree]]
    step: Callable[..., tuple[PyTree, PyTree, Array]]
    finish: Callable[[PyTree], tuple[Array, Array]]


@functools.lru_cache(maxsize=8)
def _programs(problem: _Problem) -> _Programs:
    def start(values: Mapping[str, Array], params: PyTree) -> tuple[PyTree, PyTree]:
        return params, problem.optimizer(values).init(params)

    def step(
        values: Mapping[str, Array], params: PyTree, state: PyTree, batch: Any
    ) -> tuple[PyTree, PyTree, Array]:
        def value_fn(params: PyTree) -> Array:
            return problem.loss_fn(params, batch)

        loss, grads = jax.value_and_grad(value_fn)(params)
        given = {"value": loss, "grad": grads, "value_fn": value_fn, "grad_fn": jax.grad(value_fn)}
        if problem.extras is not None:
            given.update(problem.extras(params, grads, batch))
        updates, state = problem.optimizer(values).update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state, loss.astype(compute_dtype(loss))

    def finish(params: PyTree) -> tuple[Array, Array]:
        finite = [jnp.isfinite(leaf).all() for leaf in (0.0, *jax.tree.leaves(params))]
        score = jnp.nan if problem.score_fn is None else problem.score_fn(params)
        return jnp.asarray(score, compute_dtype(score)), jnp.stack(finite).all()

    def over_settings(function: Callable[..., Any], *shared: bool) -> Callable[..., Any]:
        """One call a setting, each device with settings of its own; shared arguments go to all."""
        run = jax.vmap(function, in_axes=tuple(None if s else 0 for s in shared), out_axes=0)
        if problem.mesh is None:
            return run
        return jax.shard_map(
            run,
            mesh=problem.mesh,
            in_specs=tuple(P() if s else P(problem.mesh.axis_names) for s in shared),
            out_specs=P(problem.mesh.axis_names),
            check_vma=False,  # nothing travels, and constants inside a loop need no annotation
        )

    def place(spec: P) -> Callable[[PyTree], PyTree]:
        if problem.mesh is None:
            return lambda tree: jax.tree.map(jnp.asarray, tree)
        return functools.partial(jax.device_put, device=NamedSharding(problem.mesh, spec))

    return _Programs(
        spread=place(P() if problem.mesh is None else P(problem.mesh.axis_names)),
        share=place(P()),
        start=jax.jit(over_settings(start, False, True)),
        step=jax.jit(over_settings(step, False, False, False, True), donate_argnums=(1, 2)),
        finish=jax.jit(over_settings(finish, False)),
    )


# ---------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(shown: bool, total: int | None, settings: int) -> Iterator[Callable[[list[Array]], None]]:
    """A function to call after every step. The bar reads the losses a hundred times a run."""
    if not shown:
        yield lambda losses: None
        return
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        raise ImportError("progress=True needs rich: pip install rich", name="rich") from None
    every = max(1, (total or 1000) // 100)
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn(f"{settings} settings"), *columns, TextColumn("{task.description}")
    ) as bar:
        task = bar.add_task("compiling ...", total=total)

        def show(losses: list[Array]) -> None:
            made = len(losses)
            if made % every == 0 or made == total:
                now = np.asarray(losses[-1])
                least = np.min(now, where=np.isfinite(now), initial=np.inf)
                bar.update(task, completed=made, description=f"lowest loss {least:.4g}")

        yield show
