"""Lion-K's direction: a subgradient of a convex function at a mix of momentum and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimkit.leaves import map_leaves, widen, zeros_like
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import Array, GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.kappa import SCOPES


class ScaleByLionKState(NamedTuple):
    """``mu``: momentum, one array a parameter."""

    mu: PyTree


def scale_by_lion_k(
    b1: Any = 0.9,
    b2: Any = 0.99,
    subgradient: Callable[[Any], Any] = jnp.sign,
    mu_dtype: Any = None,
    *,
    scope: Literal["leaf", "global"] = "leaf",
) -> GradientTransformation:
    r"""A subgradient of a convex K at an interpolation between momentum and gradient.

    .. math::

        u_t \in \partial K(b_1 m_{t-1} + (1-b_1) g_t), \qquad
        m_t = b_2 m_{t-1} + (1-b_2) g_t

    The code writes the mix through the new momentum, as ``scale_by_lion`` does: with
    ``ratio = b1/b2`` it is ``ratio m_new + (1-ratio) g``, the same number.

    Args:
      b1: weight of the momentum in the step, in [0, 1].
      b2: decay of the momentum, in (0, 1).
      subgradient: a function from an array to an array of the same shape, f32 at least; one of
        ``kappa_subgradient`` or your own. Default: the sign, which is Lion.
      mu_dtype: dtype of the momentum; default f32, or f64 for f64 gradients.
      scope: ``"leaf"`` calls ``subgradient`` leaf by leaf; ``"global"`` calls it once with the
        list of all leaves, and takes a list back.

    Returns:
      A transformation that gives a direction (no rate, no sign); 4 bytes of state a f32 parameter.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    The response to the gradient's size is that of ``subgradient``: bounded for a norm.

    >>> import jax.numpy as jnp
    >>> from optimkit.transforms.kappa import kappa_subgradient
    >>> tx = scale_by_lion_k(subgradient=kappa_subgradient("l2"))
    >>> updates, _ = tx.update(jnp.array([3.0, -4.0]), tx.init(jnp.zeros(2)))
    >>> [round(float(u), 3) for u in updates]
    [0.6, -0.8]

    Reference: Chen et al., "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
    ICLR 2024, arXiv 2310.05898.
    """
    check_range(b1=b1, ge=0, le=1)
    check_range(b2=b2, gt=0, lt=1)
    check_choice(SCOPES, scope=scope)

    def init(params: PyTree) -> ScaleByLionKState:
        return ScaleByLionKState(zeros_like(params, mu_dtype))

    def update(
        updates: PyTree, state: ScaleByLionKState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ScaleByLionKState]:
        del params, extra
        ratio = b1 / b2

        def mix(g: Array, m: Array) -> tuple[Array, Array]:
            m = b2 * m + (1 - b2) * g
            return ratio * m + (1 - ratio) * g, m

        def step(g: Array, m: Array) -> tuple[Array, Array]:
            c, m = mix(g, m)
            return subgradient(c), m

        if scope == "leaf":
            new, mu = map_leaves(step, updates, state.mu)
            return new, ScaleByLionKState(mu)
        mixed, mu = map_leaves(mix, widen(updates), state.mu)
        leaves, structure = jax.tree.flatten(mixed)
        new = structure.unflatten(subgradient(leaves))
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), ScaleByLionKState(mu)

    return transformation(init, update)


RECORD = Method(
    factory=scale_by_lion_k,
    kind="piece",
    summary="subgradient of a convex function at a momentum-gradient mix",
    traced=("b1", "b2"),
    static=("subgradient", "mu_dtype", "scope"),
    position="middle",
    communication="none",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    paper='Chen et al., "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts", '
    "ICLR 2024, arXiv 2310.05898",
    reference="derivation; with the sign equal to google/automl's Lion",
    licence="",
)
