"""LoRA whose product turns the columns of a kernel, while their lengths are trained apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.numerics import check_count, check_range, compute_dtype, narrow
from optimkit.protocols import Array


def weight_norm_lora(
    w0: Array, a: Array, b: Array, magnitude: Array, *, norm_axis: int = 0, eps: Any = 1e-12
) -> jax.Array:
    r"""The kernel of given lengths in the directions of a frozen kernel and a low-rank product.

    .. math:: w = M\,\frac{W_0 + A B}{\|W_0 + A B\|}

    with one norm, and one entry of M, an output. The gradient of A and B is orthogonal to the
    directions: with :math:`\hat v` the unit column and G the gradient of w,

    .. math:: \partial_M = \langle \hat v, G\rangle, \qquad
        \partial_{AB} = \frac{M}{\|W_0 + AB\|}\bigl(G - \hat v\,\langle \hat v, G\rangle\bigr)

    Args:
      w0: the frozen kernel, (inputs, outputs).
      a: (inputs, rank), trained.
      b: (rank, outputs), trained.
      magnitude: M, trained: (outputs,), or (inputs,) with ``norm_axis=1``.
      norm_axis: the axis that a norm is taken over.
      eps: a norm below it counts as eps, > 0.

    Returns:
      The kernel, in the dtype of ``w0``; computed in f32 or better.

    Raises:
      ValueError: if shapes do not fit, or an argument is out of range.

    With a projection of the gradients of a, b and magnitude this is the method of GradNormLoRP's
    paper, of which no code is public (``optimkit.gradnormlorp`` is the program that is):

    >>> import jax, jax.numpy as jnp, optax
    >>> from optimkit import project_low_rank, scale_by_adam
    >>> w0, target = jnp.eye(4), jnp.ones((4, 4))
    >>> a, b, magnitude = init_weight_norm_lora(w0, 2, jax.random.key(0))
    >>> params = {"a": a, "b": b, "magnitude": magnitude}
    >>> tx = optax.chain(
    ...     project_low_rank(scale_by_adam(), rank=1, update_proj_gap=5, proj_type="full"),
    ...     optax.scale_by_learning_rate(0.05),
    ... )
    >>> def loss(params):
    ...     return jnp.mean((weight_norm_lora(w0, **params) - target) ** 2)
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> state, before = tx.init(params), loss(params)
    >>> for _ in range(40):
    ...     params, state = step(params, state)
    >>> bool(loss(params) < before / 2)
    True
    >>> jax.tree.map(jnp.shape, state[0].inner_state.mu)  # moments of projected gradients
    {'a': (1, 1), 'b': (1, 1), 'magnitude': (4,)}

    A column of ``w0`` that is zero has magnitude 0, so that it stays zero.

    Reference: Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM
    Training", AAAI 2025, arXiv 2412.19616; Liu et al., "DoRA: Weight-Decomposed Low-Rank
    Adaptation", ICML 2024, arXiv 2402.09353.
    """
    check_range(eps=eps, gt=0)
    shape = np.shape(w0)
    axis = _checked_axis(shape, norm_axis)
    rank = np.shape(a)[-1] if np.ndim(a) else 0
    expected = {
        "a": (a, (shape[0], rank)),
        "b": (b, (rank, shape[1])),
        "magnitude": (magnitude, (shape[1 - axis],)),
    }
    for name, (array, wanted) in expected.items():
        if np.shape(array) != wanted:
            raise ValueError(
                f"{name} has shape {np.shape(array)}, but with w0 of shape {shape}, a of shape "
                f"{np.shape(a)} and norm_axis={norm_axis} it must have {wanted}"
            )
    dtype = compute_dtype(w0, a, b, magnitude)
    wide, a, b, magnitude = (jnp.asarray(x, dtype) for x in (w0, a, b, magnitude))
    v = wide + jnp.matmul(a, b, precision="highest")
    # The maximum is inside the root, whose slope at zero is infinite.
    squares = jnp.sum(jnp.square(v), axis=axis, keepdims=True)
    lengths = jnp.expand_dims(magnitude, axis)
    return narrow(v * (lengths / jnp.sqrt(jnp.maximum(squares, eps**2))), jnp.result_type(w0))


def init_weight_norm_lora(
    w0: Array, rank: int, key: Array, *, norm_axis: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factors and lengths with which ``weight_norm_lora`` gives ``w0``.

    Args:
      w0: the frozen kernel, (inputs, outputs).
      rank: columns of a, >= 1.
      key: a random key.
      norm_axis: the axis that a norm is taken over.

    Returns:
      ``(a, b, magnitude)`` in f32 or better: a uniform within 1 over the root of the inputs, as
      LoRA has it, b zero, and the norms of ``w0``.

    Raises:
      ValueError: if ``w0`` is no matrix, or an argument is out of range.

    >>> import jax, jax.numpy as jnp
    >>> a, b, magnitude = init_weight_norm_lora(jnp.array([[3.0, 0.0], [4.0, 2.0]]), 1,
    ...                                         jax.random.key(0))
    >>> a.shape, b.tolist(), magnitude.tolist()
    ((2, 1), [[0.0, 0.0]], [5.0, 2.0])
    """
    check_count(rank=rank, least=1)
    axis = _checked_axis(np.shape(w0), norm_axis)
    w0 = jnp.asarray(w0, compute_dtype(w0))
    inputs, outputs = w0.shape
    bound = max(inputs, 1) ** -0.5
    a = jax.random.uniform(key, (inputs, rank), w0.dtype, -bound, bound)
    magnitude = jnp.sqrt(jnp.sum(jnp.square(w0), axis=axis))
    return a, jnp.zeros((rank, outputs), w0.dtype), magnitude


def _checked_axis(shape: tuple[int, ...], norm_axis: int) -> int:
    if len(shape) != 2:
        raise ValueError(f"w0 must be a kernel (inputs, outputs), got shape {shape}")
    if norm_axis not in (0, 1, -1, -2):
        raise ValueError(f"norm_axis must be an axis of a kernel, 0 or 1, got {norm_axis!r}")
    return norm_axis % 2
