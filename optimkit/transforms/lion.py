"""Lion's direction: the sign of a mix of momentum and gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import map_leaves, zeros_like
from optimkit.numerics import check_range
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation


class ScaleByLionState(NamedTuple):
    """``mu``: momentum, one array a parameter."""

    mu: PyTree


def scale_by_lion(b1: Any = 0.9, b2: Any = 0.99, *, mu_dtype: Any = None) -> GradientTransformation:
    r"""The sign of an interpolation between momentum and gradient.

    .. math::

        u_t = \operatorname{sign}(b_1 m_{t-1} + (1-b_1) g_t), \qquad
        m_t = b_2 m_{t-1} + (1-b_2) g_t

    The code writes the mix through the new momentum, which is the same number:
    ``b1 m_old + (1-b1) g = r m_new + (1-r) g`` with ``r = b1/b2``. An old momentum that is needed
    after its successor exists would cost a copy of it in every step.

    Args:
      b1: weight of the momentum in the step, in [0, 1].
      b2: decay of the momentum, in (0, 1).
      mu_dtype: dtype of the momentum; default f32, or f64 for f64 gradients. bfloat16 halves the
        state, but increments below about 0.3 |m| are rounded away at b2 = 0.99.

    Returns:
      A transformation that gives a direction in {-1, 0, 1}; 4 bytes of state a f32 parameter.

    Raises:
      ValueError: if an argument is out of range.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_lion()
    >>> updates, _ = tx.update(jnp.array([3.0, 0.0, -0.1]), tx.init(jnp.zeros(3)))
    >>> updates.tolist()
    [1.0, 0.0, -1.0]
    """
    check_range(b1=b1, ge=0, le=1)
    check_range(b2=b2, gt=0, lt=1)

    def init(params: PyTree) -> ScaleByLionState:
        return ScaleByLionState(zeros_like(params, mu_dtype))

    def update(
        updates: PyTree, state: ScaleByLionState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByLionState]:
        del params, extra
        ratio = b1 / b2

        def step(g: Array, m: Array) -> tuple[Array, Array]:
            m = b2 * m + (1 - b2) * g
            return jnp.sign(ratio * m + (1 - ratio) * g), m

        updates, mu = map_leaves(step, updates, state.mu)
        return updates, ScaleByLionState(mu)

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_lion,
    kind="piece",
    summary="sign of a momentum-gradient mix",
    traced=("b1", "b2"),
    static=("mu_dtype",),
    position="middle",
    communication="none",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    paper='Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675',
    reference="google/automl@6a54c8741e7c3265d4547c4f35f47a0391122dc5:lion/lion_pytorch.py",
    licence="Apache-2.0",
)
