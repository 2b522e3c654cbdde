"""The loop around a controller that snapshots, tries and restores a real training state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.controllers.autolrs import AutoLRSController, Command
from optimkit.protocols import PyTree

TrainStep = Callable[[PyTree, Any, float], tuple[PyTree, Any]]
"""``(state, batch, lr) -> (state, loss)``: the loss at the parameters before the step."""


class AutoLRSTraining:
    """A training run under an ``AutoLRSController``, one batch at a time.

    Args:
      train_step: ``(state, batch, lr) -> (state, loss)``. ``state`` is any tree with everything
        that training changes: parameters, optimizer state, statistics. The rate is an argument, or
        set into the injected hyperparameters inside; it is no part of what is restored. It may
        donate its state.
      state: the initial state.
      controller: a fresh one, or one that ``from_dict`` made.
      val_fn: ``state -> validation loss``, asked for from the stage on in which tau has reached its
        largest. Without it the loss of the last training step stands in.
      snapshot: after a restart, the saved snapshot.
      warmup_done: after a restart, the warm-up steps that were made.

    To survive a kill, save ``state`` and ``snapshot`` as trees and ``to_dict()`` as metadata, after
    any ``step``; batches are not rewound by a restore, so the data position is just the number of
    batches taken. A search that is cut short leaves a trial's state in ``state``: ``committed`` is
    the one to evaluate and to ship.

    >>> def train_step(w, batch, lr):
    ...     return w - lr * 2 * w, float(w**2)
    >>> controller = AutoLRSController(0.01, 0.4, tau=20, tau_prime=8, num_lrs=2)
    >>> training = AutoLRSTraining(train_step, jnp.float32(1.0), controller)
    >>> for batch in range(2 * 8 + 20):
    ...     kind = training.step(batch).kind
    >>> kind, bool(training.committed < 1e-2)
    ('stage_done', True)
    """

    def __init__(
        self,
        train_step: TrainStep,
        state: PyTree,
        controller: AutoLRSController,
        val_fn: Callable[[PyTree], Any] | None = None,
        *,
        snapshot: PyTree | None = None,
        warmup_done: int = 0,
    ):
        self.train_step, self.val_fn, self.controller = train_step, val_fn, controller
        self.state = state
        self.snapshot = copy_tree(state) if snapshot is None else snapshot
        self.warmup_done = warmup_done

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        rate = self.controller.warmup_rate(self.warmup_done)
        return self.controller.lr if rate is None else rate

    @property
    def committed(self) -> PyTree:
        """The state of the training proper: in a search, the snapshot."""
        return self.snapshot if self.controller.phase == "search" else self.state

    def step(self, batch: Any) -> Command:
        """One step on one batch; whatever the controller then commands is done on return.

        Raises:
          ValueError: if the first loss is not finite; the state is then the one before the step.
          FloatingPointError: if a stage has diverged at all rates; the state is the snapshot.
        """
        rate = self.controller.warmup_rate(self.warmup_done)
        if rate is not None:
            self.state, _ = self.train_step(self.state, batch, rate)
            self.warmup_done += 1
            return Command("continue", rate)
        if self.controller.phase == "idle":
            self._begin(batch)
        self.state, loss = self.train_step(self.state, batch, self.controller.lr)
        loss = float(loss)
        try:
            command = self._obey(self.controller.step(loss))
        except FloatingPointError:
            self.state = copy_tree(self.snapshot)
            raise
        if command.kind == "evaluate":
            judged = loss if self.val_fn is None else float(self.val_fn(self.state))
            command = self._obey(self.controller.val(judged))
        return command

    def _begin(self, batch: Any) -> None:
        """Starts a stage; the very first one needs the loss before any step, from a step undone."""
        loss = math.nan
        if self.controller.init_loss is None:
            _, loss = self.train_step(copy_tree(self.state), batch, self.controller.lr)
        self._obey(self.controller.start(float(loss)))

    def _obey(self, command: Command) -> Command:
        if command.kind == "snapshot":
            self.snapshot = copy_tree(self.state)
        elif command.kind == "restore":
            self.state = copy_tree(self.snapshot)
        return command

    def to_dict(self) -> dict[str, Any]:
        """The controller and the warm-up as plain JSON."""
        return {"controller": self.controller.to_dict(), "warmup_done": self.warmup_done}

    @classmethod
    def from_dict(
        cls,
        stored: Mapping[str, Any],
        train_step: TrainStep,
        state: PyTree,
        snapshot: PyTree,
        val_fn: Callable[[PyTree], Any] | None = None,
    ) -> AutoLRSTraining:
        """The run that ``to_dict`` described, with its saved state and snapshot."""
        return cls(
            train_step,
            state,
            AutoLRSController.from_dict(stored["controller"]),
            val_fn,
            snapshot=snapshot,
            warmup_done=stored["warmup_done"],
        )


def run_autolrs(
    train_step: TrainStep,
    state: PyTree,
    batches: Iterable[Any],
    controller: AutoLRSController,
    val_fn: Callable[[PyTree], Any] | None = None,
) -> PyTree:
    """Trains on all batches under a controller.

    Args:
      train_step: ``(state, batch, lr) -> (state, loss)``, as in ``AutoLRSTraining``.
      state: the initial training state.
      batches: one a step, those of the search included: about half of them train.
      controller: a fresh ``AutoLRSController``; its ``history`` then has (stage, rate, predicted
        loss) of every trial.
      val_fn: ``state -> validation loss``.

    Returns:
      The training state. Where the batches end in a search, it is that of its snapshot.

    Raises:
      ValueError: if the first loss is not finite.
      FloatingPointError: if a stage diverges at every rate.

    >>> def train_step(w, batch, lr):
    ...     return w - lr * 2 * w, float(w**2)
    >>> controller = AutoLRSController(0.01, 0.4, tau=20, tau_prime=8, num_lrs=2)
    >>> bool(run_autolrs(train_step, jnp.float32(1.0), range(36), controller) < 1e-2)
    True
    """
    training = AutoLRSTraining(train_step, state, controller, val_fn)
    for batch in batches:
        training.step(batch)
    return training.committed


def copy_tree(state: PyTree) -> PyTree:
    """A copy that shares no buffer: the step may donate what it is given."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jnp.copy(leaf)
        return np.copy(leaf) if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(one, state)
