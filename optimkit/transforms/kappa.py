"""The convex functions of Lion-K by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from optimkit.numerics import check_choice, check_count, check_range, safe_div, safe_norm
from optimkit.protocols import Array
from optimkit.transforms import convex
from optimkit.transforms.convex import Kappa

_MAKERS: dict[str, tuple[Callable[..., Kappa], tuple[str, ...]]] = {
    "l1": (convex.l1, ()),
    "lp": (convex.lp, ("p",)),
    "l2": (convex.l2, ()),
    "linf": (convex.linf, ()),
    "soft_l1": (convex.soft_l1, ("threshold",)),
    "top_k": (convex.top_k, ("k",)),
    "huber": (convex.huber, ("threshold",)),
    "half_squared": (convex.half_squared, ()),
    "group_l2": (convex.group_l2, ("axis",)),
    "log_cosh": (convex.log_cosh, ("sharpness",)),
    "nuclear": (convex.nuclear, ()),
}

KAPPAS: tuple[str, ...] = tuple(_MAKERS)
"""The names of the table."""

SCOPES = ("leaf", "global")
GLOBAL_KAPPAS = ("l2", "lp", "linf")
"""Norms that may be taken over the whole tree."""


def kappa_function(
    name: str,
    *,
    p: Any = None,
    threshold: Any = None,
    k: int | None = None,
    axis: int = -1,
    sharpness: Any = None,
) -> Kappa:
    """A convex function of the table by name, with value, subgradient, conjugate and gauge.

    Args:
      name: one of ``KAPPAS``; the table is in ``lion_k``.
      p: exponent of ``lp``, finite and >= 1; for infinity take ``linf``.
      threshold: of ``soft_l1`` (>= 0) and ``huber`` (> 0), in units of the gradient.
      k: how many entries ``top_k`` takes in each leaf; a larger k than the leaf is ``l1``.
      axis: of ``group_l2``, the axis summed over for one group. For a Dense kernel (in, out), 0
        makes one group an output, 1 or -1 one group an input. Vectors are one group.
      sharpness: of ``log_cosh``, > 0.

    Raises:
      ValueError: for an unknown name, a missing argument, one out of range, or one that this
        function does not have.
    """
    check_choice(KAPPAS, kappa=name)
    make, wanted = _MAKERS[name]
    given = {"p": p, "threshold": threshold, "k": k, "sharpness": sharpness}
    for argument, value in given.items():
        if (argument in wanted) != (value is not None):
            verb = "needs" if argument in wanted else "has no argument"
            raise ValueError(f"kappa={name!r} {verb} {argument!r}")
    check_range(p=p, ge=1, lt=math.inf)
    check_range(threshold=threshold, ge=0)
    check_range(sharpness=sharpness, gt=0)
    if name == "huber":
        check_range(threshold=threshold, gt=0)
    if k is not None:
        check_count(k=k, least=1)
    return make(**{argument: {**given, "axis": axis}[argument] for argument in wanted})


def kappa_subgradient(
    name: str,
    *,
    scope: Literal["leaf", "global"] = "leaf",
    relative: bool = False,
    **arguments: Any,
) -> Callable[[Any], Any]:
    """The subgradient of a convex function of the table, for ``scale_by_lion_k``.

    Args:
      name: one of ``KAPPAS``; the table is in ``lion_k``.
      scope: ``"leaf"`` gives a function from one array to one array. ``"global"``, for ``l2``,
        ``lp`` and ``linf``, gives one from a list of arrays to a list, with one norm over all.
      relative: divide the array by its root mean square first, so that thresholds and sharpness
        are in units of it. It then is no longer the subgradient of a fixed convex function.
      **arguments: the arguments of ``kappa_function``.

    Raises:
      ValueError: as ``kappa_function`` does, or for a scope that the function does not have.

    >>> import jax.numpy as jnp
    >>> kappa_subgradient("top_k", k=2)(jnp.array([3.0, -1.0, 0.5, -4.0])).tolist()
    [1.0, 0.0, 0.0, -1.0]
    >>> kappa_subgradient("l2")(jnp.array([3e30, -4e30])).round(3).tolist()
    [0.6000000238418579, -0.800000011920929]
    """
    check_choice(SCOPES, scope=scope)
    subgradient = kappa_function(name, **arguments).subgradient
    if scope == "global":
        if name not in GLOBAL_KAPPAS or relative:
            raise ValueError(
                f"scope='global' is for {', '.join(GLOBAL_KAPPAS)}, not relative; got {name!r}"
                + (" with relative=True" if relative else "")
            )
        return subgradient

    def of_leaf(x: Array) -> Array:
        if relative:
            x = safe_div(x, safe_norm(x) / math.sqrt(max(1, x.size)))
        return subgradient([x])[0]

    return of_leaf
