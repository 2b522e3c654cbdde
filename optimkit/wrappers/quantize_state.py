"""Moments in eight or four bits, of any transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimkit.layout import named_leaves
from optimkit.leaves import check_match, check_real, moment_paths, stored_by, zero_count
from optimkit.numerics import (
    check_choice,
    check_count,
    compute_dtype,
    in_turn,
    next_count,
    no_wider,
)
from optimkit.protocols import (
    PARAMETER_FIELDS,
    Array,
    GradientTransformation,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.adam import scale_by_adam
from optimkit.transforms.block_codes import (
    BlockFormat,
    QuantizedArray,
    check_block_format,
    code_shapes,
    decode_blocks,
    encode_blocks,
)
from optimkit.transforms.rounding import leaf_keys, random_bits, stochastic_bfloat16

FORMATS = ("dynamic8", "dynamic4", "companded8", "bf16_sr")
UNSIGNED_FIELDS = frozenset({"nu", "v", "exp_avg_sq", "sum_of_squares", "nu_max"})
"""Fields whose entries are never negative."""

MomentPredicate = Callable[[str, Any], bool]
"""``(path in the state, array or its shape) -> bool``; a path reads ``"0/mu/dense/kernel"``."""


class QuantizeStateState(NamedTuple):
    """``inner_state``: the inner state, codes in the place of its moments.

    ``absmax``: a tree like it, with the largest magnitudes of the blocks in the place of codes and
    a 0-d zero in that of all else. ``count``: int32, updates made.
    """

    count: Array
    inner_state: PyTree
    absmax: PyTree


class _Slot(NamedTuple):
    """How one leaf of the inner state is kept: in blocks, in bfloat16 (None), and as what."""

    path: str
    blocks: BlockFormat | None
    shape: tuple[int, ...]
    dtype: Any
    sharding: Any


def never_negative(path: str, array: Any) -> bool:
    """Whether a moment's field is one that holds squares."""
    del array
    return not UNSIGNED_FIELDS.isdisjoint(path.split("/"))


def no_parameters(path: str, array: Any) -> bool:
    """Whether a moment's field holds no copy of parameters."""
    del array
    return PARAMETER_FIELDS.isdisjoint(path.split("/"))


def quantize_state(
    inner: optax.GradientTransformation,
    *,
    format: Literal["dynamic8", "dynamic4", "companded8", "bf16_sr"] = "dynamic8",
    block_size: int = 256,
    min_size: int = 4096,
    unsigned: MomentPredicate | None = None,
    block_axis: Literal["last", "flat"] = "last",
    keep_sign: bool = False,
    select: MomentPredicate | None = None,
    seed: int = 0,
) -> GradientTransformation:
    r"""Keeps the moments of any transformation in 8, 4 or 16 bits; it computes in f32.

    Before each update the moments are decoded; the update is made of the fresh ones, which are then
    encoded. A moment is a floating-point array of the inner state that stands in a parameter's
    place and has its shape. In blocks, each entry is

    .. math:: m_i \approx q(c_i) \cdot \max_{j \in \text{block}} |m_j|

    with a code :math:`c_i` and fixed values :math:`q`.

    Args:
      inner: any transformation; its state is searched, however deep.
      format: ``"dynamic8"``, a byte for one of 256 values over seven decades (``dynamic_map``);
        ``"dynamic4"``, the same with 16 values over three decades, two codes in a byte, zero for
        zero alone where nothing is negative;
        ``"companded8"``, a byte linear in the root of the magnitude; ``"bf16_sr"``, bfloat16
        rounded by chance, without blocks.
      block_size: entries of a block, at least 1; the last one of a row may be short.
      min_size: moments with fewer entries stay as they are.
      unsigned: ``(path, array) -> bool``, which moments are never negative; they spend no codes on
        signs. Default: the fields ``nu``, ``v``, ``exp_avg_sq``, ``sum_of_squares``, ``nu_max``.
      block_axis: blocks along the ``"last"`` axis, or over the ``"flat"`` array.
      keep_sign: no negative entry becomes zero, as in the authors' CUDA kernel.
      select: ``(path, array) -> bool``, which moments are kept so. Default: all but copies of
        parameters (``z``, ``average``). Embeddings, whose rows differ much in scale, are often
        left out: ``lambda path, array: "embed" not in path``.
      seed: of the rounding by chance.

    Returns:
      A transformation whose state adds one int32 and, for blocks, 4 bytes each. Two moments take
      2.03 bytes a parameter in 8 bits and 1.03 in 4, against 8.

    Raises:
      ValueError: if an argument is out of range; from ``update``, for a gradient of another shape.
      TypeError: for complex or integer leaves.

    A spike takes the codes of its block: for 1/(1-b2) steps the other entries are coarse. Second
    moments under 1.6e-7 of their block's largest become zero, which makes the next step up to
    1/sqrt(1-b2) larger. In four bits no positive one does: those under 5e-3 become 3e-3 (with
    zeros, a language model did not train at all). An entry that is not finite becomes zero, and its
    neighbours keep theirs: the damage shows in the update of that entry alone. Where another
    wrapper resets moments, put it inside this one. On CPUs a step takes about twice AdamW's, and
    three to four times where a leaf's arrays outgrow the cache (``companded8``: 1.6 to 2.4 times);
    around transformations that are not optimkit's, the decoded moments of all leaves exist at once.
    On an explicit mesh, a parameter that is sharded over the
    axis that blocks run along is gathered on it, and its four-bit codes are kept so.

    >>> import jax.numpy as jnp, optax
    >>> tx = quantize_state(optax.trace(0.9), min_size=4, block_size=4)
    >>> g = jnp.array([1.0, -0.25, 0.001, 0.0])
    >>> _, state = tx.update(g, tx.init(g))
    >>> state.inner_state.trace.tolist(), state.absmax.trace.tolist()
    ([255, 53, 142, 127], [1.0])
    >>> u, _ = tx.update(0 * g, state)
    >>> [round(float(x), 5) for x in u]  # 0.9 times what the codes stand for
    [0.9, -0.22289, 0.00085, 0.0]

    Reference: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv
    2110.02861. The paper's blocks have 2048 entries, its current code 256. ``dynamic4`` and
    ``companded8`` are not in it.
    """
    check_choice(FORMATS, format=format)
    check_block_format(block_size, block_axis)
    check_count(min_size=min_size, seed=seed)
    inner = optax.with_extra_args_support(inner)
    chosen, positive = select or no_parameters, unsigned or never_negative

    def plan(like: PyTree) -> list[_Slot | None]:
        """How each leaf of the inner state is kept; None for what is left alone."""
        own = jax.eval_shape(inner.init, like)
        moments = jax.tree.leaves(moment_paths(inner.init, own, like))

        def slot(path: str, moment: str, leaf: Any) -> _Slot | None:
            small = leaf.size < max(min_size, 1) or not leaf.ndim
            if not moment or small or not chosen(path, leaf):
                return None
            blocks = BlockFormat(
                signed=not positive(path, leaf),
                bits=4 if format == "dynamic4" else 8,
                companded=format == "companded8",
                block_size=block_size,
                block_axis=block_axis,
                keep_sign=keep_sign,
                # So coarse a zero would let steps grow without bound.
                keep_positive=format == "dynamic4",
            )
            how = None if format == "bf16_sr" else blocks
            return _Slot(path, how, leaf.shape, compute_dtype(leaf), leaf.sharding)

        return [
            slot(path, moment, leaf)
            for (path, leaf), moment in zip(named_leaves(own), moments, strict=True)
        ]

    def encoder(slots: list[_Slot | None], count: Array) -> Callable[[int, Array], QuantizedArray]:
        by_chance = any(slot is not None and slot.blocks is None for slot in slots)
        keys = leaf_keys(seed, count, len(slots)) if by_chance else None

        def encode(index: int, leaf: Array) -> QuantizedArray:
            slot = slots[index]
            if slot is None:
                return QuantizedArray(leaf, jnp.zeros((), jnp.float32))
            if slot.blocks is not None:
                return encode_blocks(leaf.astype(slot.dtype), slot.blocks)
            assert keys is not None
            fresh = stochastic_bfloat16(leaf, random_bits(keys[index], leaf.shape))
            return QuantizedArray(fresh, jnp.zeros((), jnp.float32))

        return encode

    def init(params: PyTree) -> QuantizeStateState:
        check_real(params, "parameter")
        leaves, structure = jax.tree.flatten(inner.init(params))
        encode = encoder(plan(params), zero_count())
        # Else XLA computes the codes of zeros while it compiles, slowly.
        leaves = jax.lax.optimization_barrier(leaves)
        codes, absmax = _apart([encode(index, leaf) for index, leaf in enumerate(leaves)])
        return QuantizeStateState(
            zero_count(), structure.unflatten(codes), structure.unflatten(absmax)
        )

    def update(
        updates: PyTree,
        state: QuantizeStateState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, QuantizeStateState]:
        check_real(updates, "gradient")
        like = updates if params is None else params
        check_match(updates, like, what="gradient", like="the parameters")
        codes, structure = jax.tree.flatten(state.inner_state)
        slots = plan(like)
        if len(slots) != len(codes):
            check_match(state.inner_state, jax.eval_shape(init, like).inner_state,
                        what="state", like="that of the gradient")  # fmt: skip
        largest = structure.flatten_up_to(state.absmax)

        kept = _Kept(slots, codes, largest, encoder(slots, state.count))
        with stored_by(kept):
            new_updates, new_state = inner.update(
                updates, structure.unflatten(kept.wide), params, **extra
            )
        new_leaves = structure.flatten_up_to(new_state)
        codes, absmax = _apart([kept.stored(index, leaf) for index, leaf in enumerate(new_leaves)])
        return jax.tree.map(no_wider, new_updates, updates, like), QuantizeStateState(
            next_count(state.count), structure.unflatten(codes), structure.unflatten(absmax)
        )

    return transformation(init, update)


class _Kept:
    """The moments of one update: decoded and encoded where the inner transformation needs it."""

    def __init__(
        self,
        slots: list[_Slot | None],
        codes: list[Array],
        absmax: list[Array],
        encoder: Callable[[int, Array], QuantizedArray],
    ) -> None:
        self.slots, self.codes, self.absmax, self.encoder = slots, codes, absmax, encoder
        # Those that are decoded anew in their turn are never computed here.
        self.wide = [self._decode(index, code) for index, code in enumerate(codes)]
        self.index = {id(leaf): index for index, leaf in enumerate(self.wide) if slots[index]}
        self.made: dict[int, tuple[Array, QuantizedArray]] = {}

    def _decode(self, index: int, code: Array) -> Array:
        slot = self.slots[index]
        if slot is None:
            return code
        wanted = slot.shape if slot.blocks is None else code_shapes(slot.shape, slot.blocks)[0]
        if code.shape != wanted:
            raise ValueError(
                f"state leaf {slot.path!r} has codes of shape {code.shape}, but a gradient of "
                f"shape {slot.shape} needs {wanted}"
            )
        if slot.blocks is None:
            return code.astype(slot.dtype)
        q = QuantizedArray(code, self.absmax[index])
        return decode_blocks(q, slot.shape, slot.blocks, slot.sharding)

    def decode(self, state: Any, turn: Array | None) -> Any:
        """A moment for the step, decoded once ``turn`` is known."""
        index = self.index.get(id(state))
        if index is None or turn is None:
            return state
        return self._decode(index, in_turn(self.codes[index], turn))

    def encode(self, old: Any, new: Array) -> Array | None:
        """Encodes a fresh moment; returns its codes."""
        index = self.index.get(id(old))
        if index is None:
            return None
        self.made[index] = new, jax.lax.optimization_barrier(self.encoder(index, new))
        # A product of integers with zero is known to the compiler, and nothing would wait.
        return self.made[index][1].codes.astype(jnp.float32)

    def stored(self, index: int, leaf: Array) -> QuantizedArray:
        """A leaf of the new inner state, as it is kept."""
        new, early = self.made.get(index, (None, None))
        return early if early is not None and new is leaf else self.encoder(index, leaf)


def _apart(stored: list[QuantizedArray]) -> tuple[list[Array], list[Array]]:
    return [q.codes for q in stored], [q.absmax for q in stored]


RECORD = Method(
    factory=quantize_state,
    kind="wrapper",
    summary="keep any method's moments in 8 or 4 bits, in blocks, or in bfloat16",
    example={"block_size": 8, "min_size": 8},
    example_made={"inner": scale_by_adam},
    static=(
        "inner", "format", "block_size", "min_size", "unsigned", "block_axis", "keep_sign",
        "select", "seed",
    ),
    position="any",
    communication="gather",
    response="bounded",
    state_bytes=3,
    moved_bytes=16,
    # A code may flip where sums are taken in another order: 2% of an entry.
    tolerance={"compose": 2e-2, "sharding": 2e-2},
    paper='Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, '
    "arXiv 2110.02861",
    reference="bitsandbytes-foundation/bitsandbytes@95f9af3:bitsandbytes/functional.py:"
    "create_dynamic_map",
    licence="MIT",
)  # fmt: skip
