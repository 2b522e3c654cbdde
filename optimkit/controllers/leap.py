"""Leap+Verify: predict the parameters some steps ahead, and keep them if the loss says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimkit.controllers.predictors import (
    FORMS,
    Form,
    predict_adam_momentum,
    predict_linear,
    predict_quadratic,
)
from optimkit.controllers.regimes import REGIMES, activation_similarity, regime_from_similarity
from optimkit.controllers.run import copy_tree
from optimkit.controllers.verify import CRITERIA, Criterion, accept
from optimkit.numerics import check_choice, check_count, check_range
from optimkit.protocols import STATE_FIELDS, PyTree, ScalarOrSchedule

NEEDED = {"linear": 2, "quadratic": 3, "momentum": 1}
"""Checkpoints that each predictor needs."""
MOMENTS = ("mu", "nu", "trace")
_VERSION = 1


class LeapDecision(NamedTuple):
    """What to train on with.

    ``params``, ``opt_state``, ``step``: after an accepted leap, those leapt to; else as given.
    ``accepted``. ``regime``: its name, at a checkpoint, or None between two. ``pred_loss``: loss at
    the prediction, NaN where none was made.
    """

    params: PyTree
    opt_state: PyTree
    step: int
    accepted: bool
    regime: str | None
    pred_loss: float


class LeapController:
    """Skips training steps where the parameters move predictably; verifies before it does.

    At a checkpoint every ``interval`` steps it compares the network's activations on fixed inputs
    with those of the checkpoint before, which tells how calm training is. If calm enough, it
    extrapolates the parameters K steps ahead and evaluates a held-out loss there. Only if that loss
    passes, training goes on from the prediction, K steps further; else nothing has happened.

    Call ``observe`` after every step, or at checkpoints alone.

    Args:
      interval: steps between checkpoints, >= 1.
      K: steps to leap, >= 1.
      predictor: ``"linear"``, ``"quadratic"`` or ``"momentum"``. The author's program runs
        ``"momentum"``, which the paper's own tables show to fail; the default is what they favour.
      criterion: see ``accept``; for ``"adaptive"`` the deviation is that of the losses so far.
      regimes: names of regimes to leap in.
      confirm: checkpoints in a row whose regime must be one of these, >= 1.
      reset_moments: return moments (``mu``, ``nu``, ``trace``) to zero after a leap, as the author
        does; counts stay. With Adam the next step is then about three times as long as usual.
      tau_low: see ``regime_from_similarity``; so is the next.
      tau_high: see there.
      pct: see ``accept``.
      form: see ``predict_quadratic``.
      max_acceleration_ratio: see there.
      learning_rate: rate, or schedule over the step, for ``"momentum"``. Where given, nothing
        leaps at rate 0.
      scales: for ``"momentum"``: scales to try; the best is judged.

    Raises:
      ValueError: if an argument is out of range.

    It costs a copy of the parameters (two for ``"quadratic"``), the activations, one held-out loss
    a checkpoint and one a leap. After a leap the parameters leapt to are the first checkpoint.
    Batches are not skipped. The published runs score most predictions without applying them, and
    show no training that got faster: count your steps to a given loss with and without.

    >>> controller = LeapController(interval=10, K=5)
    >>> probes = jnp.ones((3, 2))
    >>> for step, w in ((0, 4.0), (10, 3.0)):
    ...     decision = controller.observe(step, jnp.float32(w), (), probes, lambda w: w**2)
    >>> float(decision.params), decision.step, decision.accepted, decision.regime
    (2.5, 15, True, 'stable')

    Reference: McEntire, "Leap+Verify: Regime-Adaptive Speculative Weight Prediction for
    Accelerating Neural Network Training", 2026, arXiv 2602.19580. Where paper and code differ, it
    follows the code.
    """

    def __init__(
        self,
        interval: int = 50,
        K: int = 5,
        predictor: Literal["linear", "quadratic", "momentum"] = "linear",
        criterion: Criterion = "strict",
        regimes: Sequence[str] = ("transition", "stable"),
        confirm: int = 1,
        reset_moments: bool = True,
        *,
        tau_low: float = 0.9962696,
        tau_high: float = 0.99948916,
        pct: float = 0.005,
        form: Form = "code",
        max_acceleration_ratio: float = 0.5,
        learning_rate: ScalarOrSchedule = None,
        scales: Sequence[float] = (1.0,),
    ):
        check_count(least=1, interval=interval, K=K, confirm=confirm)
        check_choice(tuple(NEEDED), predictor=predictor)
        check_choice(CRITERIA, criterion=criterion)
        check_choice(FORMS, form=form)
        check_range(pct=pct, max_acceleration_ratio=max_acceleration_ratio, ge=0)
        check_range(learning_rate=learning_rate, ge=0)
        if isinstance(regimes, str) or not set(regimes) <= set(REGIMES.values()) or not regimes:
            raise ValueError(
                f"regimes must be some of {', '.join(REGIMES.values())}, got {regimes!r}"
            )
        if predictor == "momentum" and learning_rate is None:
            raise ValueError("predictor 'momentum' needs learning_rate")
        if not scales:
            raise ValueError("scales must hold one scale at least")
        self.interval, self.K, self.confirm = interval, K, confirm
        self.predictor, self.regimes = predictor, tuple(regimes)
        self.criterion: Criterion = criterion
        self.reset_moments, self.learning_rate = reset_moments, learning_rate
        self.tau_low, self.tau_high, self.pct = tau_low, tau_high, pct
        self.form: Form = form
        self.max_acceleration_ratio, self.scales = max_acceleration_ratio, tuple(scales)
        self.checkpoints: list[PyTree] = []
        self.checkpoint_steps: list[int] = []
        self.activations: Any = None
        self.losses: list[float] = []
        self.history: list[tuple[int, str, float | None, bool]] = []
        self.calm = 0

    def observe(
        self,
        step: int,
        params: PyTree,
        opt_state: PyTree,
        activations: Any,
        val_loss_fn: Callable[[PyTree], Any],
    ) -> LeapDecision:
        """Looks at the training after ``step`` steps, and leaps if all is well.

        Args:
          step: steps made so far; never falling.
          params: the parameters, f32 masters where the model is bfloat16.
          opt_state: the optimizer's state.
          activations: (inputs, features) at these parameters, always on the same inputs; or a
            function of the parameters that computes them, called at checkpoints only.
          val_loss_fn: ``params -> held-out loss``.

        Returns:
          What to train on with. The trees given are kept by nobody and may be donated.

        Raises:
          ValueError: if ``step`` falls, or the activations change their shape.
        """
        stay = LeapDecision(params, opt_state, step, False, None, float("nan"))
        if self.checkpoint_steps:
            if step < self.checkpoint_steps[-1]:
                raise ValueError(f"step must not fall: {step} after {self.checkpoint_steps[-1]}")
            if step - self.checkpoint_steps[-1] < self.interval:
                return stay
        regime = self._see(activations(params) if callable(activations) else activations)
        self._keep(step, params)
        self.losses.append(float(val_loss_fn(params)))
        pred_loss, accepted = float("nan"), False
        if self.calm >= self.confirm and self._able(step):
            candidates = self._candidates(step, opt_state)
            losses = [float(val_loss_fn(candidate)) for candidate in candidates]
            best = min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))
            params, pred_loss = candidates[best], losses[best]
            accepted = self._passes(pred_loss)
        told = None if math.isnan(pred_loss) else pred_loss
        self.history.append((step, regime, told, accepted))
        if not accepted:
            return stay._replace(regime=regime, pred_loss=pred_loss)
        step += self.K
        self.checkpoints, self.checkpoint_steps = [], []
        self._keep(step, params)
        state = without_moments(opt_state) if self.reset_moments else opt_state
        return LeapDecision(params, state, step, True, regime, pred_loss)

    def _see(self, activations: Any) -> str:
        similarity: Any = jnp.nan
        if self.activations is not None:
            similarity = activation_similarity(self.activations, activations)
        elif np.ndim(activations) != 2:
            raise ValueError(
                f"activations must be (inputs, features), got shape {np.shape(activations)}"
            )
        self.activations = copy_tree(activations)
        regime = REGIMES[int(regime_from_similarity(similarity, self.tau_low, self.tau_high))]
        self.calm = self.calm + 1 if regime in self.regimes else 0
        return regime

    def _keep(self, step: int, params: PyTree) -> None:
        most = NEEDED[self.predictor]
        self.checkpoints = [*self.checkpoints, copy_tree(params)][-most:]
        self.checkpoint_steps = [*self.checkpoint_steps, step][-most:]

    def _able(self, step: int) -> bool:
        gaps = np.diff(self.checkpoint_steps)
        enough = len(self.checkpoints) == NEEDED[self.predictor] and len(set(gaps.tolist())) <= 1
        return enough and (self.learning_rate is None or self._rate(step) > 0)

    def _rate(self, step: int) -> float:
        rate: Any = self.learning_rate
        now: Any = rate(step) if callable(rate) else rate
        return float(now)

    def _candidates(self, step: int, opt_state: PyTree) -> list[PyTree]:
        now = self.checkpoints[-1]
        if self.predictor == "momentum":
            mu, nu = (optax.tree.get(opt_state, name) for name in ("mu", "nu"))
            if mu is None or nu is None:
                raise ValueError("predictor 'momentum' needs an optimizer state with mu and nu")
            rate = self._rate(step)
            return [
                predict_adam_momentum(now, mu, nu, self.K, rate, scale=scale)
                for scale in self.scales
            ]
        gap = self.checkpoint_steps[-1] - self.checkpoint_steps[-2]
        if self.predictor == "linear":
            before, now = self.checkpoints
            return [predict_linear(before, now, self.K, gap)]
        oldest, middle, now = self.checkpoints
        return [
            predict_quadratic(
                oldest,
                middle,
                now,
                K=self.K,
                interval=gap,
                max_acceleration_ratio=self.max_acceleration_ratio,
                form=self.form,
            )
        ]

    def _passes(self, pred_loss: float) -> bool:
        known = [loss for loss in self.losses if math.isfinite(loss)]
        deviation = float(np.std(known)) if len(known) > 1 else 0.001
        return bool(
            accept(
                pred_loss,
                self.losses[-1],
                criterion=self.criterion,
                loss_std=deviation,
                pct=self.pct,
            )
        )

    # -- restart -------------------------------------------------------------------------------

    @property
    def arrays(self) -> dict[str, Any]:
        """The checkpoints and activations, a tree to save beside ``to_dict``."""
        return {"checkpoints": list(self.checkpoints), "activations": self.activations}

    def to_dict(self) -> dict[str, Any]:
        """What has been seen so far, without arrays and settings, as ``json`` can write it."""
        return {
            "version": _VERSION,
            "checkpoint_steps": list(self.checkpoint_steps),
            "losses": list(self.losses),
            "history": [list(entry) for entry in self.history],
            "calm": self.calm,
        }

    def restore(self, stored: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Takes up what ``to_dict`` and ``arrays`` of a controller with these settings gave.

        Raises:
          ValueError: for another version.
        """
        if stored.get("version") != _VERSION:
            raise ValueError(f"version must be {_VERSION}, got {stored.get('version')!r}")
        self.checkpoint_steps, self.losses = (
            list(stored["checkpoint_steps"]),
            list(stored["losses"]),
        )
        self.history, self.calm = [tuple(entry) for entry in stored["history"]], stored["calm"]
        self.checkpoints, self.activations = list(arrays["checkpoints"]), arrays["activations"]


def without_moments(state: PyTree) -> PyTree:
    """An optimizer state whose moments (``mu``, ``nu``, ``trace``) are zero; counts stay.

    >>> state = optax.scale_by_adam().init(jnp.ones(2))
    >>> without_moments(state._replace(mu=jnp.ones(2))).mu.tolist()
    [0.0, 0.0]
    """

    def is_moment(path: Any) -> bool:
        for key in path:
            name = getattr(key, "name", None)
            if name in MOMENTS:
                return True
            if name in STATE_FIELDS and not str(name).endswith("state"):
                return False  # names below are the model's
        return False

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if is_moment(path) else leaf, state
    )
