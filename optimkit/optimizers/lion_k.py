"""Lion-K: Lion with any convex function in place of the l1 norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.kappa import kappa_subgradient
from optimkit.transforms.lion_k import scale_by_lion_k


def lion_k(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    kappa: str | Callable[[Any], Any] = "l1",
    p: Any = None,
    threshold: Any = None,
    k: int | None = None,
    axis: int = -1,
    sharpness: Any = None,
    scope: Literal["leaf", "global"] = "leaf",
    relative: bool = False,
    mu_dtype: Any = None,
) -> GradientTransformation:
    r"""Lion with a subgradient of any convex K in place of the sign.

    .. math::

        c_t &= b_1 m_{t-1} + (1-b_1) g_t, \qquad m_t = b_2 m_{t-1} + (1-b_2) g_t \\
        w_t &= w_{t-1} - \eta\,(\partial K(c_t) + \lambda w_{t-1})

    With decay :math:`\lambda` it minimises :math:`f(w) + K^*(\lambda w)/\lambda`; for a norm K
    that is f under a bound on the dual norm of :math:`\lambda w`. What the names mean, with x for
    the mix and y for :math:`\lambda w`:

    ============== ===================== ============================= ==========================
    kappa          K(x)                  step                          problem
    ============== ===================== ============================= ==========================
    l1             sum of abs x          sign x                        box: abs y_i <= 1
    lp (p)         p-norm                sign x (abs x / norm)^(p-1)   q-norm of y <= 1
    l2             2-norm                x / norm                      2-norm of y <= 1
    linf           max abs x             sign at the largest, shared   1-norm of y <= 1
    soft_l1 (e)    sum max(abs x - e, 0) sign x where abs x > e        + e 1-norm of y, in the box
    top_k (k)      k largest abs x       sign on those, else 0         1-norm <= k, in the box
    huber (e)      sum of Huber's        clip(x/e, -1, 1)              + e/2 y^2, in the box
    half_squared   sum of x^2/2          x (Polyak's momentum)         + y^2/2
    group_l2       sum of group norms    each group normalised         each group norm <= 1
    log_cosh (s)   sum log cosh(s x)/s   tanh(s x)                     + entropy(y)/s, in the box
    nuclear        sum of sing. values   U V^T (Muon with decay)       spectral norm <= 1
    ============== ===================== ============================= ==========================

    Args:
      learning_rate: step size, or a schedule over the 0-based count. It does not carry over from
        Lion: an ``l2`` step has entries about sqrt(size) smaller than a sign.
      b1: weight of the momentum in the step, in [0, 1].
      b2: decay of the momentum, in (0, 1).
      weight_decay: lambda, times the rate. Leaves that are not decayed are not constrained.
      mask: which leaves are decayed (True = decayed); default all.
      kappa: a name of the table, or a function from an array to an array (with
        ``scope="global"``, from the list of all leaves to a list).
      p: exponent of ``lp``, finite and >= 1.
      threshold: e of ``soft_l1`` and ``huber``, in units of the gradient.
      k: of ``top_k``, entries a leaf. Ties for the last place share it.
      axis: of ``group_l2``, the axis summed over: for a Dense kernel (in, out), 0 makes a group of
        each output, -1 of each input. A vector is one group.
      sharpness: s of ``log_cosh``.
      scope: ``"leaf"``: norms of each leaf; ``"global"``: of the whole tree, for l2, lp and linf.
      relative: divide the mix by its root mean square first, leaf by leaf, so that ``threshold``
        and ``sharpness`` are in units of it; no fixed problem is solved then.
      mu_dtype: dtype of the momentum; default f32.

    Returns:
      An optimizer that needs ``params``; 4 bytes of state a f32 parameter (AdamW: 8). On sharded
      parameters ``l1``, ``soft_l1``, ``huber``, ``half_squared`` and ``log_cosh`` need no
      communication, norms a reduction; ``top_k`` and ``nuclear`` gather the leaf.

    Raises:
      ValueError: if an argument is out of range, missing or of no use for ``kappa``, or a gradient
        has another shape.

    Provisional. ``l1`` is Lion, and equal to ``optimkit.lion``; ``lp`` and ``l2`` follow from the
    paper's rule. ``soft_l1``, ``top_k``, ``huber``, ``half_squared`` and ``linf`` are the paper's
    table from memory, their conjugates checked; ``group_l2``, ``log_cosh`` and ``nuclear`` are not
    in the paper. No code of the authors exists to compare with. ``nuclear`` comes from seven
    Newton-Schulz steps, with singular values in [0.9999, 1] where they were above 1% of the norm.

    A zero mix gives a zero step for every kappa. The distance of lambda w to the constraint shrinks
    by the factor 1 - lr lambda a step at least (``optimkit.diagnostics.lion_k``).

    >>> import jax.numpy as jnp, optax
    >>> tx = lion_k(0.1, kappa="l2")
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([3.0, -4.0]), tx.init(params), params)
    >>> [round(float(w), 3) for w in optax.apply_updates(params, updates)]
    [0.94, 1.08]

    Reference: Chen, Liu, Liang and Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", ICLR 2024, arXiv 2310.05898.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    if callable(kappa):
        named = {"p": p, "threshold": threshold, "k": k, "sharpness": sharpness}
        unused = [name for name, value in named.items() if value is not None]
        if unused or relative:
            raise ValueError(f"a kappa of your own takes no {unused or ['relative']}")
        subgradient = kappa
    else:
        subgradient = kappa_subgradient(
            kappa,
            scope=scope,
            relative=relative,
            p=p,
            threshold=threshold,
            k=k,
            axis=axis,
            sharpness=sharpness,
        )
    return recipe(
        scale_by_lion_k(b1, b2, subgradient, mu_dtype, scope=scope),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


RECORD = Method(
    factory=lion_k,
    kind="recipe",
    summary="Lion with a subgradient of any convex function",
    example={"learning_rate": 1e-3, "weight_decay": 0.1, "kappa": "lp", "p": 1.5},
    traced=("learning_rate", "b1", "b2", "weight_decay", "p", "threshold", "sharpness"),
    static=("mask", "kappa", "k", "axis", "scope", "relative", "mu_dtype"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=4,
    moved_bytes=20,
    status="provisional",
    paper='Chen et al., "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts", '
    "ICLR 2024, arXiv 2310.05898",
    reference="derivation; with kappa='l1' equal to google/automl's Lion",
    licence="",
)
