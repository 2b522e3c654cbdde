"""AdamW with both moments in one byte an entry."""

from __future__ import annotations

from typing import Any

import optax

from optimkit.leaves import recipe
from optimkit.numerics import check_range
from optimkit.protocols import GradientTransformation, Mask, Method, ScalarOrSchedule
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.decay_after_step import decay_after_step
from optimkit.transforms.decayed_weights import decayed_weights
from optimkit.wrappers.quantize_state import quantize_state


def adamw_8bit(
    learning_rate: ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.01,
    mask: Mask = None,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    decay_before_step: bool = True,
) -> GradientTransformation:
    r"""AdamW whose moments are kept in blocks of one-byte codes: a quarter of the state.

    .. math::

        m_t &= b_1\, d(m_{t-1}) + (1-b_1) g_t, \qquad v_t = b_2\, d(v_{t-1}) + (1-b_2) g_t^2 \\
        w_t &= (1 - \eta\lambda) w_{t-1}
        - \eta\, \frac{m_t / (1-b_1^t)}{\sqrt{v_t / (1-b_2^t)} + \epsilon}

    where :math:`d(m_{t-1})` is what the codes of :math:`m_{t-1}` stand for; the step is made of the
    fresh moments, before they are encoded. See ``quantize_state``.

    Args:
      learning_rate: step size, or a schedule over the 0-based count.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      weight_decay: decoupled decay, times the rate; 0.01 is the authors' default.
      mask: which leaves are decayed (True = decayed); default all.
      block_size: entries of a block of the flattened leaf; the paper has 2048, its code now 256.
      min_size: leaves with fewer entries keep f32 moments.
      decay_before_step: decay the old parameters, as the authors' CPU code does; False: the new
        ones, as their CUDA kernel does.

    Returns:
      An optimizer that needs ``params``; 2.03 bytes of state a f32 parameter (AdamW: 8).

    Raises:
      ValueError: if an argument is out of range, or a gradient has another shape.

    Blocks run over the flattened leaf, so a sharded one is gathered; for those,
    ``quantize_state(scale_by_adam())`` has blocks along the last axis. Leave embeddings out by
    giving it ``select``. On CPUs a step takes about twice AdamW's time.

    >>> import jax.numpy as jnp
    >>> tx = adamw_8bit(0.1, min_size=1)
    >>> w = jnp.array([1.0, 1.0])
    >>> u, state = tx.update(jnp.array([0.5, -2.0]), tx.init(w), w)
    >>> [round(float(x), 3) for x in u], state[0].inner_state.nu.dtype.name
    ([-0.101, 0.099], 'uint8')

    Reference: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv
    2110.02861. Agrees with the package's exact quantiser (goldens ``quantized_state__*``); its
    65536-bin look-up on CPUs, which gives values below 1.5e-5 of the largest the same code, is not
    reproduced.
    """
    check_range(learning_rate=learning_rate, weight_decay=weight_decay, ge=0)
    direction = quantize_state(
        scale_by_adam(b1, b2, eps), block_size=block_size, min_size=min_size, block_axis="flat"
    )
    rate = optax.scale_by_learning_rate(learning_rate)
    if decay_before_step:
        return recipe(direction, decayed_weights(weight_decay, mask), rate)
    return recipe(direction, rate, decay_after_step(weight_decay, learning_rate, mask))


RECORD = Method(
    factory=adamw_8bit,
    kind="recipe",
    summary="AdamW with moments in blocks of one-byte codes",
    example={"learning_rate": 1e-3, "block_size": 8, "min_size": 8},
    traced=("learning_rate", "b1", "b2", "eps", "weight_decay"),
    static=("mask", "block_size", "min_size", "decay_before_step"),
    needs=("params",),
    position="alone",
    communication="gather",
    response="bounded",
    state_bytes=3,
    moved_bytes=16,
    # A code may flip where sums are taken in another order: 2% of an entry.
    tolerance={"compose": 2e-2, "sharding": 2e-2},
    exempt={},
    paper='Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, '
    "arXiv 2110.02861",
    reference="bitsandbytes-foundation/bitsandbytes@95f9af3:bitsandbytes/optim/adamw.py:AdamW8bit",
    licence="MIT",
)
