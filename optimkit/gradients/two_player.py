"""Two players with a loss each: gradients that cancel what finite steps do to the game."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.numerics import check_choice, check_range, compute_dtype
from optimkit.protocols import PyTree

COEFFICIENTS = ("paper", "joint_flow")
PLAYERS = ("first", "second")


class DriftCoefficients(NamedTuple):
    """The factors of a player's two drift terms."""

    self_norm: Any
    other_dot_prod: Any


def drift_coefficients(
    learning_rates: tuple[Any, Any],
    *,
    simultaneous: bool = True,
    first_player: Literal["first", "second"] = "first",
    num_updates: tuple[int, int] = (1, 1),
    coefficients: Literal["paper", "joint_flow"] = "paper",
) -> tuple[DriftCoefficients, DriftCoefficients]:
    r"""How far a step of gradient descent drifts from the flow, for each of two players.

    With rates a of a player and b of the other:

    ============================  ===========  =====================  ==============
    ..                            self_norm    other_dot_prod, paper  joint flow
    ============================  ===========  =====================  ==============
    simultaneous                  a / 2        a / 2                  b / 2
    alternating, moves first      a / (2 n)    a / 2                  b / 2
    alternating, moves second     a / (2 n)    a / 2 - b              -b / 2
    ============================  ===========  =====================  ==============

    Args:
      learning_rates: rate of each player.
      simultaneous: both move at once, or one after the other.
      first_player: which of the two moves first.
      num_updates: n, gradient steps of each player in a turn; only alternating play uses them.
      coefficients: ``"paper"``: each player's flow runs for its own time. ``"joint_flow"``: one
        flow for both; the same for equal rates, and a whole order more exact for others.

    Returns:
      Two ``DriftCoefficients``.

    >>> drift_coefficients((0.5, 0.25), simultaneous=False)[1]
    DriftCoefficients(self_norm=0.125, other_dot_prod=-0.375)
    """
    check_choice(COEFFICIENTS, coefficients=coefficients)
    check_choice(PLAYERS, first_player=first_player)
    check_range(learning_rates=learning_rates, ge=0)
    check_range(num_updates=num_updates, ge=1)

    def one(own: Any, other: Any, updates: int, moves_second: bool) -> DriftCoefficients:
        self_norm = own / 2 if simultaneous else own / (2 * updates)
        if simultaneous or not moves_second:
            return DriftCoefficients(self_norm, (own if coefficients == "paper" else other) / 2)
        return DriftCoefficients(
            self_norm, own / 2 - other if coefficients == "paper" else -other / 2
        )

    (a, b), (n, m) = learning_rates, num_updates
    return one(a, b, n, first_player == "second"), one(b, a, m, first_player == "first")


def two_player_drift_gradients(
    loss_1: Callable[[PyTree, PyTree], Any],
    loss_2: Callable[[PyTree, PyTree], Any],
    params_1: PyTree,
    params_2: PyTree,
    *,
    learning_rates: tuple[Any, Any],
    simultaneous: bool = True,
    first_player: Literal["first", "second"] = "first",
    num_updates: tuple[int, int] = (1, 1),
    self_norm: Any = 0.0,
    other_dot_prod: Any = -1.0,
    coefficients: Literal["paper", "joint_flow"] = "paper",
) -> tuple[PyTree, PyTree]:
    r"""Each player's gradient, with its drift terms added: cancelled at -1, doubled at +1.

    A step of gradient descent follows the gradient flow up to terms of the order of the rate. In a
    game one of them couples the players and drives them from the equilibrium. For player 1, with
    multipliers s and o, and coefficients k from ``drift_coefficients``:

    .. math::

        \nabla_1 L_1 + s\, k_s\, \nabla_1 \langle \nabla_1 L_1, [\nabla_1 L_1] \rangle
            + o\, k_o\, \nabla_1 \langle \nabla_2 L_1, [\nabla_2 L_2] \rangle

    where what stands in brackets is held fixed; and likewise for player 2.

    Args:
      loss_1: ``(params_1, params_2) -> scalar``, the loss of player 1.
      loss_2: the same for player 2.
      params_1: parameters of player 1.
      params_2: parameters of player 2.
      learning_rates: of the two players, with which they will step.
      simultaneous: both step from here. False: they take turns; call once before each player's
        step, at the parameters of that moment, and use its gradient alone.
      first_player: which of the two moves first, where they take turns.
      num_updates: gradient steps of each player in a turn.
      self_norm: multiplier s of the player's own term. 0, which leaves the drift as it is, was best
        for the authors' GANs.
      other_dot_prod: multiplier o of the term that couples the players; their -1 cancels it.
      coefficients: ``"paper"``, which is the authors' code too, or ``"joint_flow"``, advisable for
        unequal rates: cancelling then leaves an error of order rate^3 a step, where the paper's
        leave rate^2.

    Returns:
      Gradients for player 1 and for player 2, trees like their parameters, for plain gradient
      descent; any other optimizer has another drift.

    Raises:
      ValueError: if an argument is out of range.

    Costs about two more backward passes a player and term.

    >>> import jax.numpy as jnp
    >>> def loss_1(x, y): return x * y
    >>> def loss_2(x, y): return -x * y  # descent at the same time spirals out
    >>> g1, g2 = two_player_drift_gradients(
    ...     loss_1, loss_2, jnp.float32(1.0), jnp.float32(0.0), learning_rates=(0.5, 0.5)
    ... )
    >>> float(g1), float(g2)  # plain gradients: 0 and -1
    (0.25, -1.0)

    Reference: Rosca et al., "Discretization Drift in Two-Player Games", ICML 2021,
    arXiv 2105.13922. Agrees with the authors' code (``drift_adjusted__game_*``).
    """
    first, second = drift_coefficients(
        learning_rates,
        simultaneous=simultaneous,
        first_player=first_player,
        num_updates=num_updates,
        coefficients=coefficients,
    )

    def swapped(loss: Callable[[PyTree, PyTree], Any]) -> Callable[[PyTree, PyTree], Any]:
        return lambda own, other: loss(other, own)

    def player(loss: Any, others_loss: Any, own: PyTree, other: PyTree, k: Any) -> PyTree:
        """One player's gradient; both losses take its own parameters first."""
        g_own = jax.grad(loss)(own, other)
        g_other = jax.grad(others_loss, argnums=1)(own, other)

        def products(own: PyTree) -> Any:
            mine, cross = jax.grad(loss, argnums=(0, 1))(own, other)
            return self_norm * k.self_norm * _vdot(
                mine, g_own
            ) + other_dot_prod * k.other_dot_prod * _vdot(cross, g_other)

        drift = jax.grad(products)(own)
        return jax.tree.map(lambda g, d: (g + d).astype(g.dtype), g_own, drift)

    return (
        player(loss_1, loss_2, params_1, params_2, first),
        player(swapped(loss_2), swapped(loss_1), params_2, params_1, second),
    )


def _vdot(a: PyTree, b: PyTree) -> Any:
    dtype = compute_dtype(jnp.float32, *jax.tree.leaves(a))
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), dtype))
