"""Where the parameters will be some steps ahead, from where they were: three extrapolations."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from optimkit.leaves import check_match
from optimkit.numerics import (
    check_choice,
    check_range,
    compute_dtype,
    narrow,
    one_minus_power,
    safe_div,
    safe_norm,
)
from optimkit.protocols import Array, PyTree

Form = Literal["code", "paper", "newton_backward"]
FORMS = ("code", "paper", "newton_backward")


def extrapolate_parameters(current: PyTree, previous: PyTree, alpha: Any) -> PyTree:
    r"""Moves on along the last change: :math:`w + \alpha (w - w_{prev})`.

    Args:
      current: w.
      previous: w_prev, a tree like ``current``.
      alpha: how far, in units of the last change.

    Returns:
      A tree like ``current``, in its dtypes. Integer and bool leaves are those of ``current``.

    Raises:
      ValueError: if the trees differ in structure or shapes.

    The difference of two bfloat16 copies is mostly rounding: extrapolate the f32 parameters.

    >>> float(extrapolate_parameters(jnp.float32(3.0), jnp.float32(2.0), 0.5))
    3.5
    """
    check_match(previous, current, what="previous parameters", like="the current ones")

    def one(new: Array, old: Array) -> Array:
        wide = compute_dtype(new, old)
        new_wide = jnp.asarray(new, wide)
        return new_wide + jnp.asarray(alpha, wide) * (new_wide - jnp.asarray(old, wide))

    return _map_floats(one, current, previous)


def predict_linear(prev: PyTree, cur: PyTree, K: Any, interval: Any) -> PyTree:
    r"""The parameters K steps ahead, if they move on as in the last interval.

    .. math:: w + \tfrac{K}{I} (w - w_{prev})

    Args:
      prev: the parameters ``interval`` steps ago.
      cur: the parameters now.
      K: steps to look ahead.
      interval: steps between the two, > 0.

    Returns:
      A tree like ``cur``, in its dtypes.

    Raises:
      ValueError: if the trees differ, or the interval is not positive.

    >>> float(predict_linear(jnp.float32(1.0), jnp.float32(2.0), 5, interval=10))
    2.5

    Reference: McEntire, "Leap+Verify: Regime-Adaptive Speculative Weight Prediction for
    Accelerating Neural Network Training", 2026, arXiv 2602.19580. Agrees with the author's code.
    """
    check_range(interval=interval, gt=0)
    return extrapolate_parameters(cur, prev, K / interval)


def predict_quadratic(
    c0: PyTree,
    c1: PyTree,
    c2: PyTree,
    K: Any,
    interval: Any,
    *,
    max_acceleration_ratio: Any = 0.5,
    form: Form = "code",
) -> PyTree:
    r"""The parameters K steps ahead, from three checkpoints at equal distances.

    With :math:`v = c_2 - c_1`, :math:`a = v - (c_1 - c_0)` and :math:`t = K/I`:

    .. math:: c_2 + t v + q\, a, \qquad
        q = \tfrac{t^2}{2} \text{ (code)}, \quad \tfrac{t(t-1)}{2} \text{ (paper)}, \quad
        \tfrac{t(t+1)}{2} \text{ (newton\_backward)}

    Args:
      c0: the oldest parameters.
      c1: those ``interval`` steps later.
      c2: the newest.
      K: steps to look ahead.
      interval: steps between two checkpoints, > 0.
      max_acceleration_ratio: in the code's form, a leaf's a is shortened to this share of the norm
        of its v. The other forms are not limited.
      form: the author's code; the formula in the paper, which for K = I forgets the acceleration
        and for K < I reverses it; or the exact extrapolation of a parabola (ours).

    Returns:
      A tree like ``c2``, in its dtypes.

    Raises:
      ValueError: if the trees differ, or an argument is out of range.

    The limit acts leaf by leaf, so a fused kernel is limited as one.

    >>> square = [jnp.float32(x) for x in (0.0, 1.0, 4.0)]
    >>> float(predict_quadratic(*square, 10, interval=10, form="newton_backward"))
    9.0
    >>> float(predict_quadratic(*square, 10, interval=10))  # a = 2 limited to 1.5: 4 + 3 + 0.75
    7.75

    Reference: McEntire, 2026, arXiv 2602.19580. ``"code"`` agrees with the author's code.
    """
    check_range(interval=interval, gt=0)
    check_range(max_acceleration_ratio=max_acceleration_ratio, ge=0)
    check_choice(FORMS, form=form)
    for tree in (c0, c1):
        check_match(tree, c2, what="an older checkpoint", like="the newest")

    def one(new: Array, middle: Array, old: Array) -> Array:
        wide = compute_dtype(new, middle, old)
        t = jnp.asarray(K / interval, wide)
        new, middle, old = (jnp.asarray(x, wide) for x in (new, middle, old))
        v = new - middle
        a = v - (middle - old)
        if form == "code":
            speed, size = safe_norm(v), safe_norm(a)
            most = jnp.asarray(max_acceleration_ratio, wide) * speed
            a = a * jnp.where((size > most) & (speed > 0), safe_div(most, size), 1)
            return new + t * v + t**2 / 2 * a
        return new + t * v + t * (t - 1 if form == "paper" else t + 1) / 2 * a

    return _map_floats(one, c2, c1, c0)


def predict_adam_momentum(
    params: PyTree,
    mu: PyTree,
    nu: PyTree,
    K: Any,
    learning_rate: Any,
    *,
    eps: Any = 1e-8,
    scale: Any = 1.0,
    bias_correction: bool = False,
    count: Any = None,
    b1: Any = 0.9,
    b2: Any = 0.999,
) -> PyTree:
    r"""The parameters K steps ahead, if Adam repeated its last step.

    .. math:: w - s K \eta\, \frac{m}{\sqrt v + \epsilon}

    Args:
      params: w.
      mu: Adam's first moment m.
      nu: its second moment v.
      K: steps to look ahead.
      learning_rate: eta, of this step.
      eps: epsilon, >= 0; where the quotient is 0/0, nothing moves.
      scale: s; the author's sweep takes the best of 0.8, 1.0 and 1.2.
      bias_correction: divide the moments as Adam does. The author's code does not.
      count: updates made so far, for ``bias_correction``.
      b1: Adam's decay of m, for ``bias_correction``.
      b2: its decay of v.

    Returns:
      A tree like ``params``, in its dtypes.

    Raises:
      ValueError: if the trees differ, or ``bias_correction`` lacks the count.

    The paper prints this without the rate and with a plus sign; this is its code. The paper finds
    that the prediction almost never lowers the loss.

    >>> w, m, v = jnp.float32(1.0), jnp.float32(0.2), jnp.float32(0.04)
    >>> round(float(predict_adam_momentum(w, m, v, 5, 0.01)), 4)
    0.95

    Reference: McEntire, 2026, arXiv 2602.19580.
    """
    check_range(eps=eps, ge=0)
    if bias_correction and count is None:
        raise ValueError("bias_correction needs count, the number of updates made so far")
    for tree, name in ((mu, "mu"), (nu, "nu")):
        check_match(tree, params, what=name, like="the parameters")

    def one(w: Array, m: Array, v: Array) -> Array:
        wide = compute_dtype(w, m, v)
        w, m, v = (jnp.asarray(x, wide) for x in (w, m, v))
        if bias_correction:
            m = safe_div(m, one_minus_power(b1, count).astype(wide))
            v = safe_div(v, one_minus_power(b2, count).astype(wide))
        rate = jnp.asarray(scale * K * learning_rate, wide)
        return w - rate * safe_div(m, jnp.sqrt(v) + jnp.asarray(eps, wide))

    return _map_floats(one, params, mu, nu)


def _map_floats(one: Any, first: PyTree, *others: PyTree) -> PyTree:
    """``one`` on all floating-point leaves, each in the first tree's dtype; others as they are."""

    def at(leaf: Any, *rest: Any) -> Any:
        dtype = jnp.result_type(leaf)
        floating = jnp.issubdtype(dtype, jnp.floating)
        return narrow(one(leaf, *rest), dtype) if floating else leaf

    return jax.tree.map(at, first, *others)
