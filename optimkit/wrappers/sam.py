"""Sharpness-aware minimization around an optimizer, in one call a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimkit.gradients.sam import sam_reference_grads
from optimkit.leaves import check_match, check_real, require_params
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.adam import scale_by_adam


def sam(
    inner: optax.GradientTransformation, rho: Any = 0.05, *, adaptive: bool = False
) -> GradientTransformation:
    r"""Gives an optimizer the gradient of a point uphill, at distance ``rho``, in place of its own.

    .. math:: g' = \nabla L\!\left(w + \rho \frac{g}{\|g\| + 10^{-12}}\right)

    or, adaptive, with :math:`w^2 g / (\|\,|w|\, g\,\| + 10^{-12})`. The norm is that of all leaves.

    Args:
      inner: what takes the step from w, with g'.
      rho: length of the way, >= 0; 0.05 is the authors' value, the adaptive form takes about 2.
      adaptive: measure the way relative to the size of each weight (ASAM).

    Returns:
      A transformation whose state is the inner one's. ``update`` needs ``params``, and ``grad_fn``,
      from parameters to the gradient on the same batch; or ``value_fn``, the loss, whose gradient
      is then taken.

    Raises:
      ValueError: if an argument is out of range, params or ``grad_fn`` are missing, or a gradient
        has another shape.

    Every call is a whole step: counts, schedules and parameters are those of plain training.
    ``gradients.sam_gradient`` does the same beside the optimizer, with auxiliary results, averages
    over devices and a choice of leaves; prefer it where you write the loop. The perturbed
    parameters keep their dtype: in bfloat16 a way of less than 2^-9 of a weight is lost.

    >>> tx = sam(optax.sgd(0.1), rho=0.5)
    >>> def grad_fn(w): return jnp.array([1.0, 4.0]) * w
    >>> w = jnp.array([3.0, 1.0])  # gradient (3, 4), so the second is taken at (3.3, 1.4)
    >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    >>> updates
    Array([-0.33, -0.56], dtype=float32)

    Reference: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021, arXiv 2010.01412. Agrees with ``davda54/sam`` to rounding.
    """
    check_range(rho=rho, ge=0)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        return inner.init(params)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        params = require_params(params, "sam")
        check_match(updates, params, what="gradient", like="the parameters")
        check_real(updates, "gradient")
        if grad_fn is None:
            if extra.get("value_fn") is None:
                raise ValueError(
                    "sam needs grad_fn or value_fn: call "
                    "update(gradients, state, params, grad_fn=...)"
                )
            grad_fn = jax.grad(extra["value_fn"])
        uphill = sam_reference_grads(grad_fn, params, updates, rho=rho, adaptive=adaptive)
        uphill = jax.tree.map(lambda g, old: g.astype(old.dtype), uphill, updates)
        return inner.update(uphill, state, params, **extra)

    return transformation(init, update)


def slope_extras(params: PyTree, grads: PyTree) -> dict[str, Any]:
    """The gradient of a slope: the same everywhere, so that a leaf left out changes no other."""
    del params, grads
    return {"grad_fn": lambda params: jax.tree.map(jnp.ones_like, params)}


RECORD = Method(
    factory=sam,
    kind="wrapper",
    summary="an optimizer fed with the gradient of a point uphill",
    example_made={"inner": scale_by_adam},
    extras=slope_extras,
    traced=("rho",),
    static=("inner", "adaptive"),
    needs=("params", "grad_fn"),
    position="any",
    communication="reduce",
    response="bounded",
    state_bytes=8,
    moved_bytes=28,
    paper='Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", '
    "ICLR 2021, arXiv 2010.01412",
    reference="davda54/sam@3c3afdbd71cff2462ec91c734b3d1170bd0f3707:sam.py",
    licence="MIT",
)
