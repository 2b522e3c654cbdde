"""Stable-SPAM: gradients clipped and normalised by their own history, then Adam with resets."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import optax

from optimkit.leaves import recipe
from optimkit.numerics import as_float, check_choice, check_count, check_range
from optimkit.protocols import Array, GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.transforms.tracked_max import clip_by_tracked_max
from optimkit.transforms.tracked_norm import normalize_by_tracked_norm
from optimkit.wrappers.momentum_reset import momentum_reset

RESET_STYLES = ("reference", "paper")


def momentum_decay_scale(count: Array, total_steps: int | None, eta_min: Any = 0.5) -> Array:
    r"""The cosine that multiplies b1 and gamma1: 1 at the start, ``eta_min`` from the end on.

    At step t = count + 1: :math:`\eta + (1-\eta)(1 + \cos(\pi t/(T+1)))/2`. The authors' cosine
    rises again after T + 1; here it holds. 1 without ``total_steps``.

    >>> [round(float(momentum_decay_scale(c, total_steps=3)), 3) for c in (0, 1, 2, 3, 9)]
    [0.927, 0.75, 0.573, 0.5, 0.5]
    """
    if total_steps is None:
        return jnp.ones((), jnp.float32)
    progress = jnp.minimum((as_float(count) + 1) / (total_steps + 1), 1)
    return eta_min + (1 - eta_min) * (1 + jnp.cos(jnp.pi * progress)) / 2


def stable_spam(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    *,
    gamma1: Any = 0.7,
    gamma2: Any = 0.9,
    gamma3: Any = 0.999,
    total_steps: int | None = None,
    eta_min: Any = 0.5,
    reset_interval: int = 1000,
    reset_style: Literal["reference", "paper"] = "reference",
) -> GradientTransformation:
    r"""Adam on gradients of steady size, with moments that are reset: for low-precision training.

    Each leaf's gradient passes ``clip_by_tracked_max(gamma3)``, then
    ``normalize_by_tracked_norm(gamma1, gamma2)``; then

    .. math::

        \beta &= b_1 s(t), \quad m \leftarrow \beta m + (1-\beta) g, \quad
        v \leftarrow b_2 v + (1-b_2) g^2 \\
        w_t &= w_{t-1} - \eta \left( \frac{m/(1-\beta^a)}{\sqrt{v/(1-b_2^a)} + \epsilon}
            + \lambda w_{t-1} \right)

    with resets of m, v and the count a every ``reset_interval`` steps. s is 1, or with
    ``total_steps`` the cosine ``momentum_decay_scale``; it multiplies gamma1 too.

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the corrected root of Adam and to that of the norm, >= 0.
      weight_decay: decoupled decay, times the rate.
      mask: which leaves are decayed (True = decayed); default all.
      gamma1: decay of the mean of gradient norms, in [0, 1); None: ``b1``. The defaults of the
        three gammas are those of the authors' class; their BF16 runs have 0.85, 0.99999, 0.999.
      gamma2: decay of the mean of squared gradient norms, in [0, 1).
      gamma3: decay of the mean of largest entries, in [0, 1).
      total_steps: length of the run, over which b1 and gamma1 fall by ``eta_min``; None: they do
        not. The authors' scripts have 20000.
      eta_min: final value of s, in [0, 1]; the authors' 0.5.
      reset_interval: D, steps between two resets; 0 switches them off. 1000 is the authors' class;
        their 4-bit scripts have 500.
      reset_style: ``"paper"``: before the update of steps D, 2D, ... m = v = 0 and a = 1.
        ``"reference"``, what the authors' class does: the update of step kD uses the old moments
        with a = 1 (about 0.4 of a normal step at D = 1000), after which they are zero, and step
        kD + 1 has a = 2; the corrections of the norm and maximum trackers restart too, though the
        trackers do not.

    Returns:
      An optimizer that needs ``params``; 8 bytes of state a f32 parameter, like AdamW, and three
      f32 scalars a leaf. Inside ``shard_map`` each device must hold whole leaves.

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    In style ``"reference"`` the clip is in effect off right after the first reset: at D = 1000 the
    limit jumps 316-fold and is still 1.6 times too large 1000 steps later. It is the default since
    every published number comes from that code; ``"paper"`` is the rule as meant, did better in our
    runs with spikes (``examples/demo.py``), and is what we recommend for new work. The trackers
    work on whole leaves, so a bias or a scale gets a gradient of norm about 1 too. They are never
    reset: a non-finite gradient poisons them for good, so put a guard around the optimizer.

    >>> import jax.numpy as jnp, optax
    >>> tx = stable_spam(0.1)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([0.5, -2.0]), tx.init(params), params)
    >>> [round(float(x), 3) for x in optax.apply_updates(params, updates)]
    [0.9, 1.1]

    Reference: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    2025, arXiv 2502.17055. Agrees with the authors' class to rounding (goldens ``stable_spam__*``);
    style ``"paper"`` with the third-party pytorch_optimizer.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    check_range(b1=b1, gamma1=gamma1, gamma2=gamma2, gamma3=gamma3, ge=0, lt=1)
    check_range(eta_min=eta_min, ge=0, le=1)
    check_count(least=1, total_steps=1 if total_steps is None else total_steps)
    check_choice(RESET_STYLES, reset_style=reset_style)
    as_published = reset_style == "reference"
    restart = reset_interval if as_published else None
    gamma1 = b1 if gamma1 is None else gamma1

    def scale(count: Array) -> Array:
        return momentum_decay_scale(count, total_steps, eta_min)

    def scaled_b1(count: Array) -> Array:
        return b1 * scale(count)

    decays = total_steps is not None
    return recipe(
        clip_by_tracked_max(gamma3, count_restart=restart),
        normalize_by_tracked_norm(
            gamma1, gamma2, eps, scale=scale if decays else None, count_restart=restart
        ),
        momentum_reset(
            scale_by_adam(scaled_b1 if decays else b1, b2, eps),
            reset_interval,
            moments="after" if as_published else "before",
            counts="before",
        ),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


RECORD = Method(
    factory=stable_spam,
    kind="recipe",
    summary="Adam with resets on clipped, normalised gradients, for low precision",
    example={
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "total_steps": 20,
        "reset_interval": 4,
    },
    traced=(
        "learning_rate",
        "b1",
        "b2",
        "eps",
        "weight_decay",
        "gamma1",
        "gamma2",
        "gamma3",
        "eta_min",
    ),
    static=("mask", "total_steps", "reset_interval", "reset_style"),
    needs=("params",),
    position="alone",
    communication="reduce",
    response="bounded",
    state_bytes=8,
    moved_bytes=36,
    paper='Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025, '
    "arXiv 2502.17055",
    reference="TianjinYellow/StableSPAM@6a66da1ea7005f7fe7bc570b7968144b42163bed:"
    "galore_torch/stablespam.py:StableSPAM",
    licence="",
)
