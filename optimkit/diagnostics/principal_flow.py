"""The principal flow: the flow that gradient descent follows along one eigenvector."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from optimkit.numerics import compute_dtype
from optimkit.protocols import Array

SINGULAR = -100.0
"""What stands for the infinite coefficient at z = 1, as in the authors' code."""


def principal_flow_coefficient(z: Array) -> Array:
    r"""The factor on an eigenvector's part of the gradient in the flow of gradient descent.

    .. math:: \alpha(z) = \frac{\log(1 - z)}{z}, \qquad z = \eta\lambda

    for a rate eta and an eigenvalue lambda of the Hessian: the flow
    :math:`\dot w = \sum_i \alpha(\eta\lambda_i) \langle g, u_i\rangle u_i` passes through the
    iterates of gradient descent on a quadratic. It is -1 at z = 0, the gradient flow. Beyond
    z = 1, where iterates change sides at every step, it is complex; beyond z = 2 its real part is
    positive: the iterates move away.

    Args:
      z: rate times eigenvalues, real.

    Returns:
      A complex array of the same shape, complex64 or better. At z = 1 it is -100.

    >>> [complex(a).real for a in principal_flow_coefficient(np.array([0.0, 1.0, 2.0]))]
    [-1.0, -100.0, 0.0]

    Reference: Rosca et al., "On a continuous time model of gradient descent dynamics and
    instability in deep learning", TMLR 2023, arXiv 2302.01952.
    """
    z = jnp.asarray(z)
    z = z.astype(compute_dtype(z))
    singular, zero = z == 1, z == 0
    at = jnp.where(singular | zero, 0.5, z)
    # log1p keeps the digits of a small z.
    small = jnp.log1p(-jnp.clip(at, -0.5, 0.5))
    size = jnp.where(jnp.abs(at) < 0.5, small, jnp.log(jnp.abs(1 - at)))
    real = jnp.where(zero, -1, jnp.where(singular, SINGULAR, size / at))
    imaginary = jnp.where(at > 1, np.pi / at, 0)
    return (real + 1j * imaginary).astype(jnp.promote_types(z.dtype, jnp.complex64))
