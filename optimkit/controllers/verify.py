"""Whether a proposal for the parameters is kept: a held-out loss decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from optimkit.numerics import check_choice, check_range
from optimkit.protocols import PyTree

Criterion = Literal["strict", "adaptive", "pct"]
CRITERIA = ("strict", "adaptive", "pct")


def accept(
    pred_loss: Any,
    cur_loss: Any,
    *,
    criterion: Criterion = "strict",
    loss_std: Any = None,
    pct: Any = 0.005,
) -> Any:
    """Whether predicted parameters may take the place of the current ones.

    Args:
      pred_loss: held-out loss at the prediction.
      cur_loss: held-out loss at the parameters.
      criterion: ``"strict"``: the loss falls; ``"adaptive"``: it rises by no more than
        ``loss_std``; ``"pct"``: by no more than the share ``pct`` of itself.
      loss_std: standard deviation of the losses of the run, for ``"adaptive"``.
      pct: 0.005 as in the author's code; the paper says 5%.

    Returns:
      A bool, or an array of them. A prediction whose loss is NaN is never accepted.

    Raises:
      ValueError: for an unknown criterion, or if ``"adaptive"`` lacks ``loss_std``.

    >>> accept(1.001, 1.0), accept(1.001, 1.0, criterion="pct")
    (False, True)
    """
    check_choice(CRITERIA, criterion=criterion)
    check_range(pct=pct, ge=0)
    if criterion == "strict":
        return pred_loss < cur_loss
    if criterion == "pct":
        return pred_loss <= (1 + pct) * cur_loss
    if loss_std is None:
        raise ValueError("criterion 'adaptive' needs loss_std, the deviation of the run's losses")
    return pred_loss <= cur_loss + loss_std


class Verdict(NamedTuple):
    """``params``: those to go on with. ``accepted``. ``pred_loss``, ``cur_loss``: floats."""

    params: PyTree
    accepted: bool
    pred_loss: float
    cur_loss: float


def verify_then_accept(
    params: PyTree,
    candidate: PyTree,
    loss_fn: Callable[[PyTree], Any],
    rule: Callable[[float, float], Any] = accept,
) -> Verdict:
    """Keeps a proposal only if a loss says so: an extrapolation, an average, a look-ahead.

    Args:
      params: the current parameters.
      candidate: the proposal, a tree like them.
      loss_fn: ``params -> loss``, best on held-out data. On several hosts: the mean over them.
      rule: ``(pred_loss, cur_loss) -> bool``.

    Returns:
      A ``Verdict``. Neither tree is changed or donated.

    >>> verify_then_accept(3.0, 2.0, lambda w: w**2)
    Verdict(params=2.0, accepted=True, pred_loss=4.0, cur_loss=9.0)
    """
    cur_loss, pred_loss = float(loss_fn(params)), float(loss_fn(candidate))
    accepted = bool(rule(pred_loss, cur_loss))
    return Verdict(candidate if accepted else params, accepted, pred_loss, cur_loss)
