"""CLASSP's gate: weights whose gradient is small are not touched at all."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import optax

from optimkit.leaves import check_match, map_leaves
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation

GATES = ("element", "any")

Gate = Literal["element", "any"]


def open_gate(g: Array, threshold: Any, gate: Gate) -> Array:
    """Where the gate lets the entries of one leaf pass; one bool for ``"any"``.

    With ``"any"``, a leaf without an entry that is not zero is zero behind any gate, so that
    nothing need be looked for.
    """
    return jnp.square(g) > threshold if gate == "element" else jnp.asarray(threshold < 1)


def gate_small_gradients(threshold: Any, gate: Gate = "element") -> GradientTransformation:
    r"""Sets to zero every entry whose square does not exceed ``threshold``.

    .. math::

        \text{element: } g_i \leftarrow g_i\,[g_i^2 > \theta] \qquad
        \text{any: } g \leftarrow g\,\bigl[[\exists i: g_i \ne 0] > \theta\bigr]

    What a weight does not need to learn it leaves as it is, which keeps room for later tasks. In
    front of an optimizer without momentum or decay a gated weight stands still.

    Args:
      threshold: theta, >= 0, compared with the square of the gradient. 1e-6 to 1e-4 suits small
        networks; 0.5, which the authors' scripts pass to their own gate, stops learning here.
      gate: ``"element"`` is the paper's rule. ``"any"`` is what the authors' code does: it compares
        a truth value, whether the leaf holds any entry that is not zero, with theta, so that below
        1 all leaves pass and from 1 on none does.

    Returns:
      A transformation for the front of a chain, without state.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    NaN is not above theta: ``"element"`` sets it to zero, while with ``"any"`` it passes. In f32
    the square of an entry below 1e-23 is zero.

    >>> import jax.numpy as jnp
    >>> tx = gate_small_gradients(0.25)
    >>> updates, _ = tx.update(jnp.array([0.5, -0.6, 0.0, 2.0]), tx.init(None))
    >>> [round(float(x), 3) for x in updates]
    [0.0, -0.6, 0.0, 2.0]

    Reference: Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through
    Adjustment Suppression and Sparsity Promotion", 2024, arXiv 2405.09637.
    """
    check_range(threshold=threshold, ge=0)
    check_choice(GATES, gate=gate)

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")

        def step(g: Array) -> Array:
            return jnp.where(open_gate(g, threshold, gate), g, 0)

        return map_leaves(step, updates), state

    return transformation(init, update)


RECORD = Method(
    factory=gate_small_gradients,
    kind="piece",
    summary="set small entries of the gradient to zero",
    example={"threshold": 1e-4},
    traced=("threshold",),
    static=("gate",),
    position="first",
    communication="none",
    response="proportional",
    state_bytes=0,
    moved_bytes=12,
    paper='Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through '
    'Adjustment Suppression and Sparsity Promotion", 2024, arXiv 2405.09637',
    reference="oswaldoludwig/CLASSP@ea3fe3c67279e27db8edea73d5f3ad522bb15dc1:CLASSP.py",
    licence="Apache-2.0",
)
