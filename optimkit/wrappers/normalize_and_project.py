"""Normalize-and-Project: an optimizer whose kernels keep the norms that they began with."""

from __future__ import annotations

from typing import Any, Literal

import optax

from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import recipe
from optimkit.numerics import check_choice
from optimkit.protocols import GradientTransformation, Method
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.project_scale_offset import MODES, Pairs, project_scale_offset
from optimkit.transforms.project_to_norm import project_to_norm


def normalize_and_project(
    inner: optax.GradientTransformation,
    *,
    every: int = 1,
    mask: Any = None,
    scale_offset: Literal["joint", "decay"] | None = None,
    decay: Any = 0.0,
    axis: int | tuple[int, ...] | None = None,
    eps: Any = 0.0,
    pairs: Pairs = None,
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""Runs an optimizer, and brings kernels back to the norms that they had at init.

    .. math::

        W' = W + u, \qquad W \leftarrow W'\, \frac{\|W_0\|}{\|W'\| + \epsilon}
        \quad\text{at every n-th step}

    For networks with a normalisation before every nonlinearity. The function does not change, but
    the rate that acts (see ``diagnostics.effective_learning_rate``) stays the one that the schedule
    says, where growing norms would lower it; on tasks that change, networks stay plastic.

    Args:
      inner: a whole optimizer, with its rate; weight decay on projected leaves has no effect beyond
        one step.
      every: project at every so many updates, >= 1. The paper finds 1 and 1000 nearly identical.
      mask: which leaves are projected (True = projected): a tree of bools, a function of the
        parameters, or path patterns. Default: leaves of rank two or more but embeddings, output
        heads and norm scales. Project only what a normalisation follows.
      scale_offset: what happens to scales and offsets of norm layers: None leaves them to
        ``inner``; ``"joint"`` and ``"decay"`` are explained at ``project_scale_offset``.
      decay: of ``scale_offset="decay"``, in [0, 1].
      axis: the axis or axes that number the norms, -1 for one an output unit, which is ours.
        Default: one norm a kernel.
      eps: added to the norm, >= 0.
      pairs: the norm layers, where names do not tell; see ``project_scale_offset``.
      matrix_axes: which axes of a leaf are batch, where name and shape do not tell.

    Returns:
      An optimizer that needs ``params``; what ``inner`` keeps, an int32 and one f32 scalar a
      kernel. Inside ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, the layout of a leaf
        is ambiguous, or a pattern matches no leaf.

    ``init`` needs the real initial parameters; when you resume, restore the state. Moments of
    ``inner`` are left alone. To accumulate gradients, put this inside ``optax.MultiSteps``, so that
    it counts real updates. In our small trial with changing labels the norms stay, and the accuracy
    falls less from first to last task, but from a lower level.

    >>> import jax.numpy as jnp, optax
    >>> tx = normalize_and_project(optax.sgd(1.0))
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}  # norm 5
    >>> grads = {"kernel": jnp.array([[-3.0], [4.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].ravel().tolist()  # (6, 0), brought back
    [5.0, 0.0]

    Reference: Lyle et al., "Normalization and effective learning rates in reinforcement learning",
    NeurIPS 2024, arXiv 2407.01800, of which no code is public. Agrees with a third party's
    projection after PyTorch's optimizers.
    """
    if scale_offset is not None:
        check_choice(MODES, scale_offset=scale_offset)
    links = [inner, project_to_norm(every=every, axis=axis, mask=mask, eps=eps,
                                    matrix_axes=matrix_axes)]  # fmt: skip
    if scale_offset is not None:
        links.append(project_scale_offset(every=every, mode=scale_offset, pairs=pairs, decay=decay))
    return recipe(*links)


RECORD = Method(
    factory=normalize_and_project,
    kind="wrapper",
    summary="bring kernels back to their initial norms after every step",
    example={"every": 2, "scale_offset": "joint"},
    example_made={"inner": lambda: optax.chain(scale_by_adam(), optax.scale_by_learning_rate(0.1))},
    traced=("decay", "eps"),
    static=("inner", "every", "mask", "scale_offset", "axis", "pairs", "matrix_axes"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=8,
    moved_bytes=36,  # 28, and gradient and parameter once more for the norm
    paper='Lyle et al., "Normalization and effective learning rates in reinforcement learning", '
    "NeurIPS 2024, arXiv 2407.01800",
    reference="RLE-Foundation/Plasticine@aa00b4bb18f7fe298a47e1ce36c32ba55ce064e8:"
    "plasticine/ppo_continual_dmc_base.py:plasticine_normalize_and_project (third party)",
    licence="MIT",
)
