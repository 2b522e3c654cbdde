"""AdaBelief's direction: momentum over the root of how much gradients surprise it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from optimkit.leaves import map_leaves, zero_count, zeros_like
from optimkit.numerics import check_range, next_count, one_minus_power, saturate
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.rectify import rectification

TRUSTED_LENGTH = 5
"""The rho from which the second moment is used; RAdam's paper has a value above 4."""


class ScaleByBeliefState(NamedTuple):
    """``count``: int32 scalar; all else one array a parameter each.

    ``mu``: momentum. ``nu``: second moment of the surprise. ``nu_max``: the largest ``nu`` so far
    with ``amsgrad``, else None.
    """

    count: Array
    mu: PyTree
    nu: PyTree
    nu_max: PyTree


def _moments(g: Array, m: Array, s: Array, b1: Any, b2: Any, added: Any) -> tuple[Array, Array]:
    """The new momentum and second moment of the surprise; ``added`` goes into the latter."""
    m = b1 * m + (1 - b1) * saturate(g)
    # Limited in two places: one limited g, needed before and after m, would be stored. And the
    # sum's last step has two arrays: XLA on CPUs would do it again for the root, with the old s.
    return m, b2 * s + ((1 - b2) * jnp.square(saturate(g - m)) + added)


def scale_by_belief(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-16,
    eps_root: Any = 1e-16,
    amsgrad: bool = False,
) -> GradientTransformation:
    r"""Rescales momentum by the second moment of what it failed to foresee.

    .. math::

        m_t &= b_1 m_{t-1} + (1-b_1)\, g_t, \qquad
            s_t = b_2 s_{t-1} + (1-b_2)(g_t - m_t)^2 + \epsilon_{root} \\
        u_t &= \frac{m_t/(1-b_1^t)}{\sqrt{s_t/(1-b_2^t)} + \epsilon}

    Args:
      b1: decay of the momentum, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      eps_root: added to the second moment in every step, and kept in it, >= 0: it grows to
        eps_root / (1 - b2). The authors have one eps for both places.
      amsgrad: divide by the largest second moment so far.

    Returns:
      A transformation that gives a direction (no rate, no sign); 8 bytes of state a f32 parameter,
      12 with ``amsgrad``.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Where gradients do not change, s shrinks to eps_root / (1 - b2), and the direction grows to
    m over its root: 1e6 times m and more at the default. That is the method. Never clip entries
    before it, for entries at the limit look foreseen; a clip of norms is fine. Entries above 1e15
    (f32) count as 1e15. Without ``amsgrad`` it is ``optax.scale_by_belief``, kept in f32 at least.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_belief(b1=0.5, b2=0.5)
    >>> updates, state = tx.update(jnp.array([2.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> [round(float(u), 3) for u in updates], [round(float(s), 3) for s in state.nu]
    ([2.0, -2.0], [0.5, 0.031])

    Reference: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients", NeurIPS 2020, arXiv 2010.07468.
    """
    check_range(b1=b1, b2=b2, ge=0, lt=1)
    check_range(eps=eps, eps_root=eps_root, ge=0)

    def init(params: PyTree) -> ScaleByBeliefState:
        largest = zeros_like(params) if amsgrad else None
        return ScaleByBeliefState(zero_count(), zeros_like(params), zeros_like(params), largest)

    def update(
        updates: PyTree, state: ScaleByBeliefState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByBeliefState]:
        del params, extra
        count = next_count(state.count)
        mu_correction = one_minus_power(b1, count)
        nu_correction = one_minus_power(b2, count)

        def step(g: Array, m: Array, s: Array, *largest: Array) -> tuple[Array, ...]:
            m, s = _moments(g, m, s, b1, b2, eps_root)
            largest = tuple(jnp.maximum(old, s) for old in largest)
            root = jnp.sqrt((largest[0] if largest else s) / nu_correction)
            return m / mu_correction / (root + eps), m, s, *largest

        kept = (state.mu, state.nu, state.nu_max) if amsgrad else (state.mu, state.nu)
        updates, mu, nu, *largest = map_leaves(step, updates, *kept)
        return updates, ScaleByBeliefState(count, mu, nu, largest[0] if amsgrad else None)

    return transformation(init, update)


class ScaleByRectifiedBeliefState(NamedTuple):
    """``count``: int32 scalar. ``mu``, ``nu``: as in ``ScaleByBeliefState``."""

    count: Array
    mu: PyTree
    nu: PyTree


def scale_by_rectified_belief(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-16, degenerated_to_sgd: bool = True
) -> GradientTransformation:
    r"""``scale_by_belief`` with RAdam's distrust of a young second moment.

    With m and s as there, both eps the same, and RAdam's :math:`r_t` and :math:`\rho_t` (see
    ``optimkit.transforms.rectify``):

    .. math::

        u_t = \frac{m_t}{1-b_1^t} \cdot \begin{cases}
            r_t \sqrt{1-b_2^t} \,/\, (\sqrt{s_t} + \epsilon) & \rho_t \ge 5 \\
            1 \text{, or 0 without } \mathtt{degenerated\_to\_sgd} & \text{else} \end{cases}

    Here eps is added to the uncorrected root.

    Args:
      b1: decay of the momentum, in [0, 1).
      b2: decay of the second moment, in (0, 1). With 0.999 the second moment is used from step 6
        on; below 0.67 rho never reaches 5, and it is never used.
      eps: added to the second moment in every step, and kept in it; and to the root, >= 0.
      degenerated_to_sgd: step along the plain momentum until then; False: do not move.

    Returns:
      A transformation that gives a direction (no rate, no sign); 8 bytes of state a f32 parameter.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The first steps have the size of the gradient, whatever it is: with large gradients keep the
    rate low, warm it up, or switch ``degenerated_to_sgd`` off.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_rectified_belief()
    >>> state = tx.init(jnp.zeros(1))
    >>> sizes = []
    >>> for g in (3.0, 1.0, 3.0, 1.0, 3.0, 1.0):
    ...     u, state = tx.update(jnp.array([g]), state)
    ...     sizes.append(round(float(u[0]), 3))
    >>> sizes
    [3.0, 1.947, 2.336, 1.947, 2.204, 0.029]

    Reference: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients", NeurIPS 2020, arXiv 2010.07468, and the authors' package.
    """
    check_range(b1=b1, ge=0, lt=1)
    check_range(b2=b2, gt=0, lt=1)
    check_range(eps=eps, ge=0)

    def init(params: PyTree) -> ScaleByRectifiedBeliefState:
        return ScaleByRectifiedBeliefState(zero_count(), zeros_like(params), zeros_like(params))

    def update(
        updates: PyTree,
        state: ScaleByRectifiedBeliefState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByRectifiedBeliefState]:
        del params, extra
        count = next_count(state.count)
        mu_correction = one_minus_power(b1, count)
        factor, length = rectification(b2, count)
        trusted = length >= TRUSTED_LENGTH
        rectified = factor * jnp.sqrt(one_minus_power(b2, count)) / mu_correction
        plain = (1 if degenerated_to_sgd else 0) / mu_correction

        def step(g: Array, m: Array, s: Array) -> tuple[Array, Array, Array]:
            m, s = _moments(g, m, s, b1, b2, eps)
            return m * jnp.where(trusted, rectified / (jnp.sqrt(s) + eps), plain), m, s

        updates, mu, nu = map_leaves(step, updates, state.mu, state.nu)
        return updates, ScaleByRectifiedBeliefState(count, mu, nu)

    return transformation(init, update)


_PAPER = (
    'Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", '
    "NeurIPS 2020, arXiv 2010.07468"
)
_REFERENCE = (
    "juntang-zhuang/Adabelief-Optimizer@2855178eff6776762793f915ce2c615f776a1e4b:"
    "pypi_packages/adabelief_pytorch0.2.1/adabelief_pytorch/AdaBelief.py:AdaBelief"
)

RECORDS = (
    Method(
        factory=scale_by_belief,
        kind="piece",
        summary="momentum over the root of its surprise",
        traced=("b1", "b2", "eps", "eps_root"),
        static=("amsgrad",),
        position="middle",
        communication="none",
        response="proportional",
        state_bytes=8,
        moved_bytes=28,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="BSD-2-Clause",
    ),
    Method(
        factory=scale_by_rectified_belief,
        kind="piece",
        summary="momentum over the root of its surprise, rectified",
        traced=("b1", "b2", "eps"),
        static=("degenerated_to_sgd",),
        position="middle",
        communication="none",
        response="proportional",
        state_bytes=8,
        moved_bytes=28,
        paper=_PAPER,
        reference=_REFERENCE,
        licence="BSD-2-Clause",
    ),
)
