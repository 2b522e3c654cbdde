"""Curl descent: SGD in which some neurons follow the rule with its sign turned round."""

from __future__ import annotations

from typing import Literal

import jax
import optax

from optimkit.layout import MatrixAxesOverride, path_name
from optimkit.leaves import recipe
from optimkit.numerics import check_choice, check_range
from optimkit.protocols import (
    GradientTransformation,
    Method,
    PyTree,
    ScalarOrSchedule,
)
from optimkit.transforms.flip_signs import SIDES, Flips, flip_signs, is_kernel, rule_flip_mask
from optimkit.transforms.project_to_norm import project_to_norm


def curl_descent(
    learning_rate: ScalarOrSchedule,
    *,
    flips: Flips,
    side: Literal["pre", "post"] = "pre",
    seed: int | None = None,
    preserve_norm: bool = True,
    inner: optax.GradientTransformation | None = None,
    matrix_axes: MatrixAxesOverride = None,
) -> GradientTransformation:
    r"""SGD in which the synapses of some neurons climb the loss while all others descend.

    .. math::

        W' = W - \eta\, D\, g, \qquad W \leftarrow W' \frac{\|W_0\|}{\|W'\|},
        \qquad D = \operatorname{diag}(\pm 1) \text{ over the units of one side}

    The dynamics are those of no gradient. A few flipped neurons leave learning intact; too many
    make the solutions unstable where inputs exceed hidden units.

    Args:
      learning_rate: eta, a number or a schedule over the 0-based count; 0.1 in the authors' runs.
      flips: ``{path or pattern: how many}``, or one number for every kernel. An integer counts
        units, a float in [0, 1] is a fraction of them. There is no default: it is what one sweeps.
      side: ``"pre"``, as in the authors' figures: all outgoing synapses of an input unit share its
        sign, so a flipped hidden unit lives in the next layer's kernel. ``"post"``: all incoming
        synapses of an output unit.
      seed: None flips the first units of a leaf, as the authors do; an integer draws them.
      preserve_norm: bring each kernel back to its initial Frobenius norm after every step, as in
        every figure. Without it, flipped synapses may grow exponentially.
      inner: makes a direction of the gradient before the flip, such as ``optax.trace(0.9)``;
        default: the gradient itself.
      matrix_axes: which axes of a leaf are inputs and outputs where name and shape do not tell.

    Returns:
      An optimizer that needs ``params``; an int32 and one f32 scalar a kernel, beside what
      ``inner`` keeps. Inside ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, a pattern matches no kernel, there are fewer units
        than flips, a gradient has another shape, or the layout of a leaf is ambiguous.

    Biases and norm scales are neither flipped nor projected. The authors' networks have none, and
    their gradient leaves out the slope of the output's nonlinearity; this takes the gradient that
    it is given.

    >>> import jax.numpy as jnp, optax
    >>> tx = curl_descent(0.5, flips={"kernel": 1}, preserve_norm=False)
    >>> params = {"kernel": jnp.array([[1.0], [1.0]])}
    >>> updates, state = tx.update({"kernel": jnp.ones((2, 1))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[1.5], [0.5]]

    Reference: Ninou et al., "Curl Descent: Non-Gradient Learning Dynamics with Sign-Diverse
    Plasticity", 2025, arXiv 2510.02765. Agrees with the authors' code.
    """
    check_range(learning_rate=learning_rate, ge=0)
    check_choice(SIDES, side=side)

    def signs(params: PyTree) -> PyTree:
        return rule_flip_mask(params, flips, side=side, seed=seed, matrix_axes=matrix_axes)

    def kernels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda p, w: is_kernel(path_name(p), w), params)

    links = [inner or optax.identity(), flip_signs(signs)]
    links.append(optax.scale_by_learning_rate(learning_rate))
    if preserve_norm:
        links.append(project_to_norm(mask=kernels, matrix_axes=matrix_axes))
    return recipe(*links)


RECORD = Method(
    factory=curl_descent,
    kind="recipe",
    summary="SGD in which some neurons follow the rule with its sign turned round",
    example={"learning_rate": 0.1, "flips": 0.25},
    traced=("learning_rate",),
    static=("flips", "side", "seed", "preserve_norm", "inner", "matrix_axes"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="proportional",
    state_bytes=0,
    moved_bytes=20,  # 12, and gradient and parameter once more for the norm
    paper='Ninou et al., "Curl Descent: Non-Gradient Learning Dynamics with Sign-Diverse '
    'Plasticity", 2025, arXiv 2510.02765',
    reference="caycogajiclab/Curl_Descent@a79f32a0e2a443c4b932d013a16a361bc8a0909f:"
    "Data_generation/fig6a/phase_diag.py:TeacherStudentLearning",
    licence="",
)
