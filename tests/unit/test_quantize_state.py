"""States in few bits: bytes, damage that stays where it is, what is chosen, and messages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit.benchmark import measure, memory
from optimkit.layout import named_leaves
from optimkit.transforms import dequantize_blockwise, dynamic_map, quantize_blockwise
from optimkit.transforms.block_codes import (
    BlockFormat,
    QuantizedArray,
    decode_blocks,
    encode_blocks,
)

FORMATS = ("dynamic8", "dynamic4", "companded8", "bf16_sr")


def normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# -- codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_the_nearest_values(signed: bool, bits: int) -> None:
    book = dynamic_map(signed, bits - 1, bits)
    assert len(book) == 2**bits
    rng = np.random.default_rng(0)
    x = rng.uniform(-1 if signed else 0, 1, 20000) * 10.0 ** rng.uniform(-8, 0, 20000)
    x = np.concatenate([x, book, (book[1:] + book[:-1]) / 2, [1.0]]).astype(np.float32)
    how = BlockFormat(signed=signed, bits=bits, block_size=len(x))
    got = np.asarray(decode_blocks(encode_blocks(jnp.asarray(x), how), x.shape, how))
    nearest = np.min(np.abs(x[:, None] - book), axis=1)
    np.testing.assert_allclose(np.abs(got - x), nearest, atol=6e-8)


def test_a_code_book_of_ones_own() -> None:
    book = np.array([-1.0, 0.0, 1.0], np.float32)
    q = quantize_blockwise(jnp.array([0.4, -3.0, 0.6, 1.0]), code=book, block_size=2)
    assert q.codes.tolist() == [1, 0, 2, 2]
    back = dequantize_blockwise(q, code=book, block_size=2)
    np.testing.assert_allclose(back, [0.0, -3.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 8), (5,)])
@pytest.mark.parametrize("axis", ["last", "flat"])
@pytest.mark.parametrize("bits", [8, 4])
def test_short_blocks_and_odd_rows(shape: tuple[int, ...], axis: str, bits: int) -> None:
    x = normal(1, *shape)
    how = BlockFormat(bits=bits, block_size=4, block_axis=axis)
    back = decode_blocks(encode_blocks(x, how), shape, how)
    # Half a cell of the coarsest decade: 0.9 / 64 / 2, or 0.9 / 4 / 2; -1 is not in the map.
    step = 0.0071 if bits == 8 else 0.12
    assert float(jnp.max(jnp.abs(back - x))) <= step * float(jnp.max(jnp.abs(x)))


def test_no_negative_entry_becomes_zero_where_signs_are_kept() -> None:
    x = jnp.array([1.0, -1e-9, 1e-9])
    for keep, sign in ((False, 0), (True, -1)):
        how = BlockFormat(keep_sign=keep)
        back = decode_blocks(encode_blocks(x, how), (3,), how)
        assert np.sign(back).tolist() == [1, sign, 0]


# -- the wrapper ------------------------------------------------------------------------------


def test_no_positive_second_moment_vanishes_in_four_bits() -> None:
    tx: Any = ok.quantize_state(ok.scale_by_adam(b2=0.0), format="dynamic4", min_size=1)
    g = jnp.array([1.0, 1e-4, 0.0])
    _, state = tx.update(g, tx.init(g))
    how = BlockFormat(signed=False, bits=4)
    codes = QuantizedArray(state.inner_state.nu, state.absmax.nu)
    np.testing.assert_allclose(decode_blocks(codes, (3,), how), [1.0, 3.25e-3, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "most"), [("dynamic8", 2.1), ("dynamic4", 1.2), ("companded8", 2.1), ("bf16_sr", 4.1)]
)
def test_bytes_of_live_state(form: Any, most: float) -> None:
    params = {"kernel": jnp.ones((64, 512)), "bias": jnp.ones(512)}
    tx: Any = ok.quantize_state(ok.scale_by_adam(), format=form)
    _, state = tx.update(params, tx.init(params), params)
    kernels = [x for x in jax.tree.leaves(state) if x.ndim > 1]
    assert measure.bytes_of(kernels) / params["kernel"].size <= most
    assert state.inner_state.mu["bias"].dtype == jnp.float32  # fewer than min_size entries


@pytest.mark.parametrize("form", FORMATS)
def test_a_first_step_is_the_inner_ones_and_later_ones_are_near(form: Any) -> None:
    inner: Any = ok.scale_by_adam()
    tx: Any = ok.quantize_state(inner, format=form, min_size=1, block_size=8)
    update, plain = jax.jit(tx.update), jax.jit(inner.update)
    g = jnp.sign(normal(2, 6, 20)) * (0.5 + jnp.abs(jnp.sin(normal(2, 6, 20))) / 2)
    state, exact = tx.init(g), inner.init(g)
    for step in range(3):
        u, state = update(g, state)
        want, exact = plain(g, exact)
        limit = 1e-6 if not step else 0.6 if form == "dynamic4" else 0.05
        assert float(jnp.max(jnp.abs(u - want))) < limit


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("form", FORMATS)
def test_an_entry_that_is_not_finite_harms_itself_alone(form: Any, bad: float) -> None:
    tx: Any = ok.quantize_state(optax.trace(0.9), format=form, min_size=1, block_size=8)
    update = jax.jit(tx.update)
    g = normal(3, 2, 8)
    clean, hurt = tx.init(g), tx.init(g)
    _, clean = update(g.at[0, 3].set(0.0), clean)
    seen, hurt = update(g.at[0, 3].set(bad), hurt)
    assert not np.isfinite(seen[0, 3])  # it shows
    for _ in range(2):
        u, clean = update(g, clean)
        v, hurt = update(g, hurt)
        others = np.arange(16).reshape(2, 8) != 3
        np.testing.assert_array_equal(np.asarray(u)[others], np.asarray(v)[others])
        if form != "bf16_sr":
            np.testing.assert_array_equal(u, v)  # and it begins again from zero


def test_fields_and_leaves_are_chosen_by_predicate() -> None:
    params = {"embed": jnp.ones((4, 8)), "dense": jnp.ones((4, 8))}
    seen = []

    def select(path: str, array: Any) -> bool:
        seen.append((path, array.shape))
        return "embed" not in path

    tx: Any = ok.quantize_state(
        ok.scale_by_adam(), min_size=1, select=select, unsigned=lambda path, array: False
    )
    state = tx.init(params)
    assert ("mu/embed", (4, 8)) in seen
    assert state.inner_state.nu["embed"].dtype == jnp.float32
    assert state.inner_state.nu["dense"].tolist() == [[127] * 8] * 4  # zero of the signed map
    copies: Any = ok.quantize_state(ok.schedule_free_adamw(0.1), min_size=1).init(params)
    kinds = {str(x.dtype) for name, x in named_leaves(copies.inner_state) if "/z/" in name}
    assert kinds == {"float32"}


def test_around_other_wrappers() -> None:
    g = normal(4, 4, 8)
    tx: Any = ok.quantize_state(ok.momentum_reset(ok.scale_by_adam(), 2), min_size=1)
    state, u = tx.init(g), g
    for _ in range(2):
        u, state = tx.update(g, state)
    np.testing.assert_allclose(u, np.sign(g), rtol=1e-3)  # the second step starts anew


def test_decay_after_the_step_differs_by_the_decayed_step() -> None:
    w, g = jnp.ones(4), jnp.ones(4)
    moved = []
    for before in (True, False):
        tx: Any = ok.adamw_8bit(0.1, weight_decay=0.5, decay_before_step=before)
        moved.append(tx.update(g, tx.init(w), w)[0])
    np.testing.assert_allclose(moved[0], -0.15, rtol=1e-5)
    np.testing.assert_allclose(moved[1], 0.9 * 0.95 - 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"min_size": -1}, "min_size must be an integer >= 0, got -1"),
        ({"format": "int8"}, "format must be one of 'dynamic8', .* got 'int8'"),
        ({"block_axis": "first"}, "block_axis must be one of 'last', 'flat', got 'first'"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_arguments_out_of_range(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ok.quantize_state(optax.sgd(0.1), **arguments)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="max_exponent_bits < total_bits <= 8"):
        dynamic_map(True, 8, 8)
    with pytest.raises(ValueError, match=r"x must have an entry, got shape \(0,\)"):
        quantize_blockwise(jnp.zeros(0))
    with pytest.raises(ValueError, match="block_size 2 makes 2 blocks"):
        dequantize_blockwise(quantize_blockwise(jnp.ones(4)), block_size=2)
    tx: Any = ok.quantize_state(optax.trace(0.9), min_size=1)
    with pytest.raises(ValueError, match=r"'trace/w' has codes of shape \(2, 3\)"):
        tx.update({"w": jnp.ones((3, 2))}, tx.init({"w": jnp.ones((2, 3))}))


# -- the table --------------------------------------------------------------------------------


def test_the_table_counts_live_arrays() -> None:
    rows = memory.table(["adamw, dynamic8", "lion"], leaves=2, rounds=1, rows=64, columns=256)
    named = {row.name: row for row in rows}
    assert named["optax.adamw"].state == pytest.approx(8, abs=0.1)
    assert named["adamw, dynamic8"].state <= 2.2  # the bias stays as it is
    assert named["lion"].state == pytest.approx(4, abs=0.1)
    row = memory.Row("", weights=4.0, state=6.0, temporary=2.0, ratio=1.0)
    assert row.largest(16) == 1e9
