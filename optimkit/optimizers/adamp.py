"""AdamP: Adam without the radial part of its step on scale-invariant weights."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.wrappers.radial import ChannelAxis, project_radial


def adamp(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    delta: Any = 0.1,
    wd_ratio: Any = 0.1,
    nesterov: bool = False,
    channel_axis: ChannelAxis | None = None,
) -> GradientTransformation:
    r"""Adam whose step loses its radial part on weights found to be scale invariant.

    .. math::

        u_t &= \hat m_t / (\sqrt{\hat v_t} + \epsilon) \\
        (u_t, r) &\leftarrow (u_t - \hat w\langle\hat w, u_t\rangle,\, r_{wd})
            \text{ if } \max_r|\cos(g_r, w_r)| < \delta/\sqrt n \text{ else } (u_t, 1) \\
        w_t &= w_{t-1} - \eta\,(u_t + \lambda\, r\, w_{t-1})

    The test takes the raw gradient, first for all output channels (n = entries a channel), then
    for the layer as one (n = its size); the first view that passes is projected.

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the corrected root; also guards the norms of the projection.
      weight_decay: decoupled decay, times the rate. The authors' README example has 1e-2.
      mask: which leaves are decayed (True = decayed); default all.
      delta: threshold on the cosine; the authors' default.
      wd_ratio: factor on the decay of projected matrices; the authors' default.
      nesterov: use ``b1 m + (1-b1) g`` in place of ``m``, corrected like ``m``: not optax's form.
      channel_axis: ``(path, leaf) -> axis or axes`` of the output channels; default: last axis,
        first of an embedding table. Leaves of rank below two are plain AdamW.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, like AdamW.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or a leaf's layout
        is ambiguous.

    Expect a smaller norm growth, hence a larger effective step, than Adam's at the same rate:
    retune the rate before comparing. A zero gradient counts as orthogonal. The paper states the
    threshold with the dimension of the whole weight; code and this use that of the current view.

    >>> import jax.numpy as jnp, optax
    >>> tx = adamp(0.1)
    >>> params = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> grads = {"kernel": jnp.array([[0.001], [1.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)["kernel"].ravel()]
    [1.0, -0.1]

    Reference: Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on
    Scale-invariant Weights", ICLR 2021, arXiv 2006.08217. Agrees with the authors' code.
    """
    check_range(learning_rate=learning_rate, ge=0)
    return recipe(
        project_radial(
            scale_by_adam(b1, b2, eps, nesterov=nesterov),
            delta=delta,
            eps=eps,
            weight_decay=weight_decay,
            wd_ratio=wd_ratio,
            mask=mask,
            channel_axis=channel_axis,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


RECORD = Method(
    factory=adamp,
    kind="recipe",
    summary="Adam without the radial step on scale-invariant weights",
    example={"learning_rate": 1e-3, "weight_decay": 0.1},
    traced=("learning_rate", "b1", "b2", "eps", "weight_decay", "delta", "wd_ratio"),
    static=("mask", "nesterov", "channel_axis"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=8,
    moved_bytes=36,  # 28, and gradient and parameter once more for the cosine
    paper='Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on '
    'Scale-invariant Weights", ICLR 2021, arXiv 2006.08217',
    reference="clovaai/AdamP@7f6f0383ff6ad3839d5c7f79f1db0a44c5a12fdb:adamp/adamp.py",
    licence="MIT",
)
