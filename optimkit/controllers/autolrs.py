"""AutoLRS: before each stage of training, try several rates and keep the one that promises most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from optimkit.controllers.forecast import exponential_forecast
from optimkit.controllers.suggest import check_bounds, from_unit, gp_lcb_suggest
from optimkit.numerics import check_count, check_range

BAD_LOSS = 1e6
"""What the search is told of a rate whose loss was not finite."""

_STATE = ("phase", "stage", "validating", "awaiting_val", "tau", "tau_prime", "lr", "counter",
          "init_loss", "previous_lr", "losses", "trials", "history")  # fmt: skip
_VERSION = 1


class Command(NamedTuple):
    """What to do before the next training step, and the rate of that step.

    ``kind``: ``"snapshot"``: keep a copy of the training state; ``"restore"``: go back to that
    copy; ``"continue"``: nothing; ``"evaluate"``: call ``val`` with a validation loss first;
    ``"stage_done"``: the stage is over; call ``start`` or ``step`` for the next one.
    """

    kind: Literal["snapshot", "restore", "continue", "evaluate", "stage_done"]
    lr: float


class AutoLRSController:
    r"""Chooses the rate of each stage of training from short trials; it never sees the model.

    A stage is tau steps at one rate. Before it, ``num_lrs`` rates are tried, tau' steps each, all
    from one snapshot. An exponential, fitted to a trial's losses, predicts the loss after tau
    steps; a Gaussian process over log rates picks the next rate to try. The stage then runs from
    the snapshot at the rate of the lowest prediction. Tau and tau' double from stage to stage until
    tau' reaches ``tau_max / 10``; from then on trials are judged by validation losses. With
    tau' = tau / 10 and ten rates the search costs as many steps as the training itself.

    Call ``start`` with the loss at the initial parameters; do what the command says; train one step
    at its rate and hand the loss of that step to ``step``; and so on. ``run_autolrs`` is this loop.

    Args:
      min_lr: lowest rate, > 0, from a range test.
      max_lr: highest rate.
      tau: steps of the first stage, >= 1. This and the next five are the authors' constants.
      tau_prime: steps of a trial in the first stage, >= 1.
      num_lrs: rates tried a stage, >= 1.
      tau_max: tau' doubles while it is below a tenth of this.
      kappa: weight of the uncertainty in the search, see ``gp_lcb_suggest``.
      seed: of the first rate of every stage, which is drawn evenly in the logarithm.
      warmup_steps: length of a linear warm-up before the first search, see ``warmup_rate``.
      warmup_lr: rate at its end.
      val_evals_per_trial: validation losses a trial, about.
      strict: count messages as the authors' server does: its very first trial and every stage are
        one step longer, and a trial with a non-finite loss runs to its end.

    Raises:
      ValueError: if an argument is out of range.

    A loss that is not finite ends the trial at once; its rate counts as worse than all others. If
    all rates of a stage are bad, the stage runs at a tenth of the last stage's rate, or, in the
    first stage, at ``min_lr`` (our choice; the authors' program fails). A stage that itself runs
    into a non-finite loss is begun again at the next best rate (ours, too). In all these cases the
    command is ``"restore"``, so that the training state is that of the snapshot.

    ``to_dict`` and ``from_dict`` carry everything across a restart, as plain JSON. On several
    hosts, average the loss over them first and run the same controller everywhere.

    >>> controller = AutoLRSController(1e-3, 1e-1, tau=2, tau_prime=1, num_lrs=1)
    >>> losses = iter([2.0, 1.9, 1.8, 1.7])
    >>> [controller.start(2.0).kind] + [controller.step(loss).kind for loss in losses]
    ['snapshot', 'restore', 'continue', 'stage_done', 'snapshot']

    Reference: Jin et al., "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on
    the Fly", ICLR 2021, arXiv 2105.10762. With ``strict``, the replies agree with the authors'
    server message by message.
    """

    def __init__(
        self,
        min_lr: float,
        max_lr: float,
        *,
        tau: int = 1000,
        tau_prime: int = 100,
        num_lrs: int = 10,
        tau_max: int = 8000,
        kappa: float = 1e6,
        seed: int = 0,
        warmup_steps: int = 0,
        warmup_lr: float = 0.0,
        val_evals_per_trial: int = 16,
        strict: bool = False,
    ):
        check_bounds(min_lr, max_lr)
        check_count(least=1, tau=tau, tau_prime=tau_prime, num_lrs=num_lrs, tau_max=tau_max)
        check_count(least=1, val_evals_per_trial=val_evals_per_trial)
        check_count(warmup_steps=warmup_steps, seed=seed)
        check_range(kappa=kappa, warmup_lr=warmup_lr, ge=0)
        self.settings: dict[str, Any] = {
            "min_lr": float(min_lr), "max_lr": float(max_lr), "tau": tau, "tau_prime": tau_prime,
            "num_lrs": num_lrs, "tau_max": tau_max, "kappa": float(kappa), "seed": seed,
            "warmup_steps": warmup_steps, "warmup_lr": float(warmup_lr),
            "val_evals_per_trial": val_evals_per_trial, "strict": bool(strict),
        }  # fmt: skip
        self.phase: Literal["idle", "search", "train"] = "idle"
        self.stage = 0
        self.validating = self.awaiting_val = False
        self.tau, self.tau_prime = tau, tau_prime
        self.lr = float(min_lr)
        self.counter = 0
        self.init_loss: float | None = None
        self.previous_lr: float | None = None
        self.losses: list[float] = []
        self.trials: list[tuple[float, float]] = []
        self.history: list[tuple[int, float, float]] = []

    # -- messages ------------------------------------------------------------------------------

    def start(self, loss: Any) -> Command:
        """Begins a stage: the first with the loss before any step, a later one after the last.

        Raises:
          ValueError: if the first loss is not finite.
          RuntimeError: in the middle of a stage.
        """
        loss = float(loss)
        if self.phase != "idle":
            raise RuntimeError("start was called in the middle of a stage: call step or val")
        if self.init_loss is None:
            if not math.isfinite(loss):
                raise ValueError(f"the loss before the first step must be finite, got {loss}")
            self.init_loss = loss
        return self._begin_stage()

    def step(self, loss: Any) -> Command:
        """Takes the loss of one training step at the rate of the last command.

        Raises:
          RuntimeError: before ``start``, and where ``val`` is due.
          FloatingPointError: if a stage has met a non-finite loss at every rate there is.
        """
        loss = float(loss)
        if self.init_loss is None:
            raise RuntimeError("step was called before start")
        if self.awaiting_val:
            raise RuntimeError("step was called where val is due: the last command was 'evaluate'")
        if self.phase == "idle":
            return self._begin_stage()
        return self._search(loss) if self.phase == "search" else self._train(loss)

    def val(self, loss: Any) -> Command:
        """Takes the validation loss that ``"evaluate"`` asked for.

        Raises:
          RuntimeError: if none was asked for.
        """
        if not self.awaiting_val:
            raise RuntimeError("val was called, but no validation loss was asked for")
        self.awaiting_val, loss = False, float(loss)
        self._keep(loss)
        if not math.isfinite(loss) and not self.settings["strict"]:
            return self._end_trial()
        return Command("continue", self.lr)

    def warmup_rate(self, step: int) -> float | None:
        """The rate of a 0-based step of the warm-up; None from its end on, where ``start`` is due.

        >>> controller = AutoLRSController(1e-3, 1.0, warmup_steps=4, warmup_lr=0.1)
        >>> controller.warmup_rate(0), controller.warmup_rate(3), controller.warmup_rate(4)
        (0.025, 0.1, None)
        """
        steps = self.settings["warmup_steps"]
        return self.settings["warmup_lr"] / steps * (step + 1) if step < steps else None

    # -- rules ---------------------------------------------------------------------------------

    def suggest(self, lrs: Sequence[float], losses: Sequence[float]) -> float:
        """The next rate to try in this stage; override it for another search.

        Args:
          lrs: rates tried in this stage so far.
          losses: their predicted losses; ``BAD_LOSS`` for bad ones.
        """
        low, high, seed = (self.settings[name] for name in ("min_lr", "max_lr", "seed"))
        if not lrs:
            return float(from_unit(np.random.default_rng((seed, self.stage)).random(), low, high))
        return gp_lcb_suggest(lrs, losses, low, high, kappa=self.settings["kappa"], seed=seed)

    @property
    def val_freq(self) -> int:
        """Steps between two validation losses of a trial."""
        return max(1, self.tau_prime // self.settings["val_evals_per_trial"])

    def _next_rate(self) -> float:
        told = [loss if math.isfinite(loss) else BAD_LOSS for _, loss in self.trials]
        return float(self.suggest([lr for lr, _ in self.trials], told))

    def _begin_stage(self) -> Command:
        self.stage += 1
        # The authors' counter begins at 0 once, and at 1 in every other trial.
        self.counter = 0 if self.stage == 1 and self.settings["strict"] else 1
        self.losses, self.trials = [], []
        self.lr, self.phase = self._next_rate(), "search"
        return Command("snapshot", self.lr)

    def _keep(self, loss: float) -> None:
        length = self.tau_prime // self.val_freq if self.validating else self.tau_prime
        self.losses = [*self.losses, loss][-length:]

    def _search(self, loss: float) -> Command:
        aborted = not math.isfinite(loss) and not self.settings["strict"]
        if aborted or not self.validating:
            self._keep(loss)
        if aborted or self.counter == self.tau_prime:
            return self._end_trial()
        self.counter += 1
        if self.validating and self.counter % self.val_freq == 0:
            self.awaiting_val = True
            return Command("evaluate", self.lr)
        return Command("continue", self.lr)

    def _end_trial(self) -> Command:
        predicted = self._predict()
        self.trials.append((self.lr, predicted))
        self.history.append((self.stage, self.lr, predicted))
        self.losses, self.counter = [], 1
        if len(self.trials) < self.settings["num_lrs"]:
            self.lr = self._next_rate()
        else:
            self.phase, self.counter = "train", 0
            self.lr = self._best()
        return Command("restore", self.lr)

    def _predict(self) -> float:
        if not self.losses or not all(map(math.isfinite, self.losses)):
            return math.inf
        if not self.validating:
            return exponential_forecast(self.losses, horizon=self.tau).predicted
        if self.init_loss is not None and max(self.losses) >= self.init_loss:
            return self.losses[-1]
        horizon = max(1, self.tau // self.val_freq)
        return exponential_forecast(self.losses, horizon=horizon, is_training=False).predicted

    def _best(self) -> float:
        """The first of the rates with the lowest prediction; the way out if all are bad."""
        lr, predicted = min(self.trials, key=lambda trial: trial[1])
        if math.isfinite(predicted):
            return lr
        return self.settings["min_lr"] if self.previous_lr is None else self.previous_lr / 10

    def _train(self, loss: float) -> Command:
        if not math.isfinite(loss) and not self.settings["strict"]:
            return self._retreat(loss)
        self.counter += 1
        if self.counter < self.tau + int(self.settings["strict"]):
            return Command("continue", self.lr)
        self.phase, self.counter, self.previous_lr = "idle", 0, self.lr
        if self.tau_prime < self.settings["tau_max"] / 10:
            self.tau_prime, self.tau = 2 * self.tau_prime, 2 * self.tau
        else:
            self.validating = True
        return Command("stage_done", self.lr)

    def _retreat(self, loss: float) -> Command:
        """A stage has diverged: begin it again at the best of the other rates."""
        failed = self.lr
        self.trials = [(lr, math.inf if lr == failed else p) for lr, p in self.trials]
        self.lr, self.counter = self._best(), 0
        if self.lr == failed:
            raise FloatingPointError(
                f"the loss of stage {self.stage} is {loss} at the rate {failed:g}, and every rate "
                "that was tried has failed, too; go back to the snapshot, and lower min_lr"
            )
        return Command("restore", self.lr)

    # -- restart -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Settings and state as plain JSON: numbers, strings, lists; NaN and infinity as text."""
        state = {name: _plain(getattr(self, name)) for name in _STATE}
        return {"version": _VERSION, "settings": dict(self.settings), "state": state}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> AutoLRSController:
        """The controller that ``to_dict`` described; it goes on where that one was.

        Raises:
          ValueError: if something is missing, or of a newer version.

        >>> controller = AutoLRSController(1e-3, 1e-1, seed=3)
        >>> lr = controller.start(1.0).lr
        >>> AutoLRSController.from_dict(controller.to_dict()).step(0.9).lr == lr
        True
        """
        version = stored.get("version")
        if not isinstance(version, int) or version > _VERSION:
            raise ValueError(f"version must be an integer <= {_VERSION}, got {version!r}")
        state = stored.get("state", {})
        missing = [name for name in _STATE if name not in state]
        if missing or "settings" not in stored:
            raise ValueError(f"the stored controller lacks {missing or 'settings'}")
        controller = cls(**stored["settings"])
        for name in _STATE:
            setattr(controller, name, state[name])
        controller.losses = [float(loss) for loss in state["losses"]]
        controller.trials = [(lr, float(loss)) for lr, loss in state["trials"]]
        controller.history = [(stage, lr, float(loss)) for stage, lr, loss in state["history"]]
        return controller


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
