"""The orthogonal-gradient update of O-DICE: of a second gradient, keep what the first leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match, check_real, narrow_like, widen
from optimkit.multitask.pcgrad import CosineState, init_cosines, measure_cosines
from optimkit.multitask.tasks import check_tasks, mix_tasks, task_gram
from optimkit.numerics import check_choice, check_range, saturate, tree_vdot
from optimkit.protocols import Array, GradientCombiner, Method, PyTree

CONJUGATES = ("pearson_chi2", "reverse_kl")


def check_two(num_tasks: int, names: str) -> None:
    """Raises unless there are exactly two stacked gradients."""
    if num_tasks != 2:
        raise ValueError(f"num_tasks must be 2, the stacked gradients {names}, got {num_tasks}")


def parallel_coefficient(
    product: Array, square: Array, eps: Any = 1e-10, only_conflicting: bool = False
) -> Array:
    """``product / max(square, eps)``: how much of the primary gradient the secondary holds.

    >>> float(parallel_coefficient(jnp.array(-2.0), jnp.array(4.0)))
    -0.5
    """
    coefficient = product / jnp.maximum(square, eps)
    return jnp.where(product < 0, coefficient, 0) if only_conflicting else coefficient


def project_orthogonal(
    primary: PyTree, secondary: PyTree, *, eps: Any = 1e-10, only_conflicting: bool = False
) -> PyTree:
    r"""What of ``secondary`` is orthogonal to ``primary``, over the whole tree.

    .. math:: s - \frac{\langle p, s \rangle}{\max(\langle p, p \rangle, \epsilon)}\, p

    Args:
      primary: a tree of gradients.
      secondary: a tree like it.
      eps: least squared norm that is divided by, > 0.
      only_conflicting: project only where the inner product is negative; the paper always does.

    Returns:
      A tree like ``secondary``, in its dtypes; computed in f32 at least.

    Raises:
      ValueError: if the trees differ, or eps is out of range.
      TypeError: for complex or integer leaves.

    >>> project_orthogonal(jnp.array([2.0, 0.0]), jnp.array([-1.0, 3.0])).tolist()
    [0.0, 3.0]
    """
    check_range(eps=eps, gt=0)
    check_real(primary, "primary gradient")
    check_real(secondary, "secondary gradient")
    check_match(secondary, primary, what="secondary gradient", like="the primary gradient")
    p, s = widen(primary, secondary), widen(secondary)
    limited = jax.tree.map(saturate, p)
    coefficient = parallel_coefficient(
        tree_vdot(limited, jax.tree.map(saturate, s)),
        tree_vdot(limited, limited),
        eps,
        only_conflicting,
    )
    result = jax.tree.map(lambda x, y: (y - coefficient * x).astype(y.dtype), p, s)
    return narrow_like(result, secondary)


def orthogonal_gradient(
    eta: Any = 1.0, *, eps: Any = 1e-10, only_conflicting: bool = False, per_leaf: bool = False
) -> GradientCombiner:
    r"""Keeps the first of two gradients whole, and adds what of the second is orthogonal to it.

    .. math::

        g = g_f + \eta \left( g_b -
        \frac{\langle g_f, g_b \rangle}{\max(\langle g_f, g_f \rangle, \epsilon)}\, g_f \right)

    Args:
      eta: weight of the second gradient, >= 0; 0 is the semi-gradient.
      eps: least squared norm that is divided by, > 0: below it the projection is incomplete.
      only_conflicting: project only where the two conflict; not the paper's.
      per_leaf: one projection a leaf instead of one for the tree; not the paper's.

    Returns:
      A combiner of exactly two stacked gradients, [forward, backward]. No state but telemetry:
      ``task_cosines``, ``min_cosine`` and ``conflict_fraction``.

    Raises:
      ValueError: if an argument is out of range, or there are not two gradients; from ``update``,
        for a leaf whose task axis or shape does not fit.
      TypeError: for complex or integer leaves.

    To first order, the loss of the first gradient falls as if the second were not there. Average
    gradients over devices and micro-batches before they come here: the projection is not linear in
    the first. Clip after it, for spikes of the second pass.

    >>> combiner = orthogonal_gradient()
    >>> both = jnp.array([[2.0, 0.0], [-1.0, 3.0]])
    >>> combiner.update(both, combiner.init(jnp.zeros(2), 2))[0].tolist()
    [2.0, 3.0]

    Reference: Mao et al., "ODICE: Revealing the Mystery of Distribution Correction Estimation via
    Orthogonal-gradient Update", 2024, arXiv 2402.00348. Agrees with the authors' code.
    """
    check_range(eta=eta, ge=0)
    check_range(eps=eps, gt=0)

    def init(params: PyTree, num_tasks: int) -> CosineState:
        state = init_cosines(params, num_tasks)
        check_two(num_tasks, "[forward, backward]")
        return state

    def mix(gram: Array) -> Array:
        coefficient = parallel_coefficient(gram[0, 1], gram[0, 0], eps, only_conflicting)
        return jnp.stack([1 - eta * coefficient, eta * jnp.ones_like(coefficient)])

    def update(
        task_grads: PyTree, state: CosineState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, CosineState]:
        del extra
        tasks = check_tasks(task_grads, state.task_cosines.shape[0], params)
        gram = task_gram(task_grads, tasks)
        if per_leaf:
            combined = jax.tree.map(lambda g: mix_tasks(g, mix(task_gram(g))), task_grads)
        else:
            combined = mix_tasks(task_grads, mix(gram))
        return narrow_like(combined, task_grads), measure_cosines(gram, state.task_cosines.dtype)

    return GradientCombiner(init, update)


def conjugate(x: Array, f: str) -> Array:
    """The conjugate of the divergence, as the authors' code has it.

    >>> conjugate(jnp.array([0.0, 2.0, -4.0]), "pearson_chi2").tolist()
    [0.0, 3.0, -1.0]
    """
    if f == "reverse_kl":
        return jnp.exp(x - 1)
    w = jnp.maximum(x / 2 + 1, 0)
    return x * w - jnp.square(w - 1)


def odice_value_gradient(
    params: PyTree,
    target_params: PyTree,
    batch: Mapping[str, Array],
    value_fn: Callable[[PyTree, Array], Array],
    *,
    f: Literal["pearson_chi2", "reverse_kl"] = "pearson_chi2",
    lam: Any = 0.6,
    eta: Any = 1.0,
    discount: Any = 0.99,
) -> tuple[PyTree, dict[str, Any]]:
    r"""The gradient of O-DICE's value loss, forward and backward part orthogonalised.

    With the residuals :math:`\delta_f = r + (1-d) \gamma V^-(s') - V(s)` and
    :math:`\delta_b = r + (1-d) \gamma V(s') - V^-(s)`, where :math:`V^-` is the target network:

    .. math::

        g_0 &= \nabla\, (1-\lambda)\, \overline{V(s)}, \qquad
        g_f = \nabla\, \lambda\, \overline{f^*(\delta_f)}, \qquad
        g_b = \nabla\, \lambda \eta\, \overline{f^*(\delta_b)} \\
        g &= g_0 + g_f + g_b - \frac{\langle g_f, g_b \rangle}{\max(\|g_f\|^2, 10^{-10})}\, g_f

    Args:
      params: parameters of the value network; two networks in one tree count as one vector.
      target_params: those of the target network, a tree like it.
      batch: arrays ``observations``, ``next_observations``, ``rewards`` and ``dones`` (or
        ``terminals``) of one leading length.
      value_fn: ``(params, observations) -> values``, one a row.
      f: the divergence.
      lam: weight of the residuals against the values, in [0, 1]; tuned per task by the authors.
      eta: weight of the backward part, >= 0.
      discount: in [0, 1].

    Returns:
      The gradient, and a dict with the trees ``forward_grad``, ``backward_grad``, ``base_grad``,
      the scalar ``parallel_coef``, and the ``residual`` of every row, whose positive part weighs
      behaviour cloning.

    Raises:
      ValueError: if an argument is out of range or the batch lacks an array.

    >>> batch = {"observations": jnp.ones((1, 1)), "next_observations": jnp.ones((1, 1)),
    ...          "rewards": jnp.ones(1), "dones": jnp.zeros(1)}
    >>> def value_fn(params, observations):
    ...     return (observations @ params)[:, 0]
    >>> params = jnp.zeros((1, 1))
    >>> grads, aux = odice_value_gradient(params, params, batch, value_fn, lam=0.5)
    >>> round(float(grads[0, 0]), 4), round(float(aux["parallel_coef"]), 4)
    (-0.25, -0.99)

    Reference: Mao et al., "ODICE: Revealing the Mystery of Distribution Correction Estimation via
    Orthogonal-gradient Update", 2024, arXiv 2402.00348.
    """
    check_choice(CONJUGATES, f=f)
    check_range(lam=lam, discount=discount, ge=0, le=1)
    check_range(eta=eta, ge=0)
    done = "dones" if "dones" in batch else "terminals"
    needed = ("observations", "next_observations", "rewards", done)
    missing = [name for name in needed if name not in batch]
    if missing:
        raise ValueError(f"batch lacks {missing}; it must hold {list(needed)}")
    goes_on = discount * (1 - jnp.asarray(batch[done], jnp.result_type(batch["rewards"])))
    here, there, rewards = (batch[name] for name in needed[:3])
    target_here, target_there = (value_fn(target_params, x) for x in (here, there))

    def parts(params: PyTree) -> tuple[Array, Array]:
        value, next_value = value_fn(params, here), value_fn(params, there)
        forward = rewards + goes_on * target_there - value
        backward = rewards + goes_on * next_value - target_here
        losses = jnp.stack(
            [
                (1 - lam) * jnp.mean(value),
                lam * jnp.mean(conjugate(forward, f)),
                lam * eta * jnp.mean(conjugate(backward, f)),
            ]
        )
        return losses, forward

    losses, pull, residual = jax.vjp(parts, params, has_aux=True)
    (stacked,) = jax.vmap(pull)(jnp.eye(3, dtype=losses.dtype))
    base, forward, backward = (jax.tree.map(lambda g, k=k: g[k], stacked) for k in range(3))
    gram = task_gram(jax.tree.map(lambda g: g[1:], stacked), 2)
    coefficient = parallel_coefficient(gram[0, 1], gram[0, 0])
    weights = jnp.stack([jnp.ones_like(coefficient), 1 - coefficient, jnp.ones_like(coefficient)])
    grads = narrow_like(mix_tasks(stacked, weights), params)
    aux = {
        "base_grad": base,
        "forward_grad": forward,
        "backward_grad": backward,
        "parallel_coef": coefficient,
        "residual": residual,
    }
    return grads, aux


RECORD = Method(
    factory=orthogonal_gradient,
    kind="combiner",
    summary="the first of two gradients whole, and what of the second is orthogonal to it",
    traced=("eta", "eps"),
    static=("only_conflicting", "per_leaf"),
    position="first",
    communication="reduce",
    response="proportional",
    moved_bytes=20,
    paper='Mao et al., "ODICE: Revealing the Mystery of Distribution Correction Estimation via '
    'Orthogonal-gradient Update", 2024, arXiv 2402.00348',
    reference="maoliyuan/ODICE-Pytorch@1692507c81ad3aceffb8f333801852a1fc1c8038:odice.py",
)
