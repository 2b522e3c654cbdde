"""By how much Adam rescaled a projected gradient: the factor that the full gradient gets, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from optimkit.numerics import check_choice, check_range, safe_div, safe_norm, saturate
from optimkit.protocols import Array

SCALE_TYPES = ("channel", "tensor")


def norm_based_scaling(
    eps: Any = 1e-8, scale_type: Literal["channel", "tensor"] = "channel"
) -> Callable[[Array, Array, Array, int | None], Array]:
    r"""Scales what a projection leaves out as an inner method scaled what it saw.

    .. math:: S_i = \phi_i\, X_i, \qquad \phi_i = \frac{\|N_i\|}{\|R_i\| + \epsilon}

    with one factor for each channel i of the side that is not projected, norms being over the rank.

    Args:
      eps: added to the norm of the projected gradient, >= 0; 1e-8 is the authors' of Fira.
      scale_type: ``"channel"`` as above, or ``"tensor"``: one factor a matrix, from whole norms.

    Returns:
      The ``residual`` of ``project_low_rank``: ``(X, N, R, side) -> S``. With both sides projected
      (side None) there are no channels, and the factor is that of the matrix.

    Raises:
      ValueError: if an argument is out of range.

    A channel whose projected gradient is zero, while momentum moves it on, gets the factor
    ``||N|| / eps``: put ``limit_norm_growth`` behind it.

    >>> import jax.numpy as jnp
    >>> scale = norm_based_scaling(0.0)
    >>> x, n, r = jnp.ones((2, 2)), jnp.array([[3.0, 1.0]]), jnp.array([[1.0, 2.0]])
    >>> scale(x, n, r, 0).tolist()
    [[3.0, 0.5], [3.0, 0.5]]

    Reference: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint?", 2024, arXiv 2410.01623; Zhu et al., "APOLLO", MLSys 2025, arXiv 2412.05270.
    """
    check_range(eps=eps, ge=0)
    check_choice(SCALE_TYPES, scale_type=scale_type)

    def scale(x: Array, n: Array, r: Array, side: int | None) -> Array:
        axes = (-2, -1) if scale_type == "tensor" or side is None else (side - 2,)
        top, bottom = (safe_norm(saturate(y), axes, keepdims=True) for y in (n, r))
        return saturate(x) * saturate(safe_div(top, bottom + eps))

    return scale
