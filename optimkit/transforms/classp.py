"""CLASSP's scaling: the more a weight has been pushed, the smaller its steps, for good."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import map_leaves, zeros_like
from optimkit.numerics import LARGE, check_choice, check_range, safe_div
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.gate_small_gradients import GATES, Gate, open_gate

ACCUMULATIONS = ("abs", "power")

Accumulate = Literal["abs", "power"]


class ScaleByClasspState(NamedTuple):
    """``magnitude_sum``: s, one array a parameter: how much each weight has been pushed so far."""

    magnitude_sum: PyTree


def scale_by_classp(
    threshold: Any = 0.5,
    eps: Any = 1e-5,
    power: Any = 1,
    apply_scaling: bool = True,
    gate: Gate = "any",
    accumulate: Accumulate = "abs",
    initial_accumulator: Any = 0.0,
) -> GradientTransformation:
    r"""Divides by a root of the sum of all gradient magnitudes so far; small entries are dropped.

    .. math::

        g &\leftarrow \operatorname{gate}(g), \qquad
        s \leftarrow s + |g|^p \ (\text{power}) \quad\text{or}\quad s + |g| \ (\text{abs}) \\
        u &= g / (s + \epsilon)^{1/p}

    s already holds the current gradient. It never falls, also between tasks: that is the point.

    Args:
      threshold: theta of ``gate_small_gradients``, >= 0.
      eps: inside the root, >= 0.
      power: p, >= 1. With ``"element"``, ``"power"``, theta = 0 and p = 2 this is AdaGrad.
      apply_scaling: False lets the gated gradient pass while s goes on growing, as for a first
        task. The state is the same: build it anew with True for the next one.
      gate: ``"element"`` of the paper or ``"any"`` of the authors' code.
      accumulate: ``"power"`` of the paper or ``"abs"`` of the authors' code, which adds |g|
        whatever p is.
      initial_accumulator: s at the start, >= 0.

    Returns:
      A transformation that gives a direction; 4 bytes of state a f32 parameter. ``magnitude_sum``
      tells how important each weight was.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    With ``"power"``, or p = 1, no entry of the direction exceeds 1, as long as |g|^p is below 1e30
    in f32; beyond, s gets 1e30. NaN passes the gate ``"any"`` and stays in s; ``"element"``
    drops it.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_classp(0.0, eps=0.0)
    >>> state = tx.init(jnp.zeros(3))
    >>> updates, state = tx.update(jnp.array([3.0, -0.5, 0.0]), state)
    >>> updates.tolist()
    [1.0, -1.0, 0.0]
    >>> updates, state = tx.update(jnp.array([1.0, 0.5, 0.0]), state)
    >>> updates.tolist()
    [0.25, 0.5, 0.0]

    Reference: Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through
    Adjustment Suppression and Sparsity Promotion", 2024, arXiv 2405.09637.
    """
    check_range(threshold=threshold, eps=eps, initial_accumulator=initial_accumulator, ge=0)
    check_range(power=power, ge=1)
    check_choice(GATES, gate=gate)
    check_choice(ACCUMULATIONS, accumulate=accumulate)

    def init(params: PyTree) -> ScaleByClasspState:
        return ScaleByClasspState(
            jax.tree.map(
                lambda s: s + jnp.asarray(initial_accumulator, s.dtype), zeros_like(params)
            )
        )

    def update(
        updates: PyTree, state: ScaleByClasspState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByClasspState]:
        del params, extra

        def step(g: Array, s: Array) -> tuple[Array, Array]:
            # The gate twice, on what is read in two loops: a gated gradient would be stored.
            passes = open_gate(g, threshold, gate)
            pushed = _power(jnp.abs(g), power if accumulate == "power" else 1)
            s = s + jnp.where(passes, pushed, 0)
            u = safe_div(g, _root(s + eps, power)) if apply_scaling else g
            return jnp.where(passes, u, 0), s

        updates, magnitude_sum = map_leaves(step, updates, state.magnitude_sum)
        return updates, ScaleByClasspState(magnitude_sum)

    return transformation(init, update)


def _power(x: Array, exponent: Any) -> Array:
    """x^p, where x counts as (1e30)^(1/p) at most: no finite spike ends a weight for ever."""
    if _is(exponent, 1):
        return x
    largest = LARGE[x.dtype.itemsize] ** 2
    x = jnp.where(x < jnp.inf, jnp.minimum(x, largest ** (1 / exponent)), x)
    return jnp.square(x) if _is(exponent, 2) else x**exponent


def _root(x: Array, power: Any) -> Array:
    if _is(power, 1):
        return x
    return jnp.sqrt(x) if _is(power, 2) else x ** (1 / power)


def _is(value: Any, number: int) -> bool:
    """Whether a value is known, while tracing, to be this number: a power costs 20 products."""
    return isinstance(value, (int, float)) and value == number


RECORD = Method(
    factory=scale_by_classp,
    kind="piece",
    summary="divide by a root of the sum of all gradient magnitudes so far",
    example={"threshold": 1e-4, "power": 2, "gate": "element", "accumulate": "power"},
    traced=("threshold", "eps", "power", "initial_accumulator"),
    static=("apply_scaling", "gate", "accumulate"),
    position="middle",
    communication="none",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    paper='Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through '
    'Adjustment Suppression and Sparsity Promotion", 2024, arXiv 2405.09637',
    reference="oswaldoludwig/CLASSP@ea3fe3c67279e27db8edea73d5f3ad522bb15dc1:CLASSP.py",
    licence="Apache-2.0",
)
