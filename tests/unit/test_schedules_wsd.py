"""Warmup-stable-decay and the schedules with one cycle per budget."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok

LENGTHS = {"warmup_steps": 2, "stable_steps": 3, "decay_steps": 4}


def rates(schedule, n):
    return np.asarray(schedule(np.arange(n)))


@pytest.mark.parametrize(
    ("decay", "middle"),
    [
        ("linear", 2.5),
        ("1-sqrt", 4 - 3 * 0.5**0.5),
        ("cosine", 2.5),
        ("square", 3.25),
        ("mirror_cosine", 2.5),
        ("rex", 3.0),
        ("exponential", 2.0),
        ("inverse", 1.6),
    ],
)
def test_phases(decay, middle):
    got = rates(ok.wsd_schedule(4.0, **LENGTHS, init_value=2.0, end_value=1.0, decay=decay), 12)
    np.testing.assert_allclose(got[:6], [2, 3, 4, 4, 4, 4], rtol=1e-6)
    np.testing.assert_allclose(got[7], middle, rtol=1e-6)
    assert np.all(np.diff(got[5:10]) < 0)
    np.testing.assert_allclose(got[9:], 1, rtol=1e-6)


def test_half_life_has_no_length_and_falls_to_the_floor():
    schedule = ok.wsd_schedule(
        8.0, warmup_steps=0, stable_steps=1, decay_steps=2, decay="half_life", half_life=2
    )
    np.testing.assert_allclose(
        rates(schedule, 8), [8, 8, 8 / 2**0.5, 4, 8 / 2**1.5, 2, 8 / 2**2.5, 1], rtol=1e-6
    )
    assert schedule(10**6) == 0
    floor = ok.wsd_schedule(
        8.0,
        warmup_steps=0,
        stable_steps=0,
        decay_steps=0,
        end_value=3.0,
        decay="half_life",
        half_life=1,
        decay_rate=0.25,
    )
    np.testing.assert_allclose(rates(floor, 3), [8, 3, 3])


def test_half_life_may_be_traced():
    def build(half_life, rate):
        return ok.wsd_schedule(
            1.0, **LENGTHS, decay="half_life", half_life=half_life, decay_rate=rate
        )

    traced = jax.jit(lambda h, r: build(h, r)(jnp.arange(12)))(3.0, 0.5)
    np.testing.assert_allclose(traced, rates(build(3.0, 0.5), 12), rtol=1e-6)


def test_inclusive_end_gives_the_end_value_to_the_last_update():
    kwargs = {"peak_value": 4.0, **LENGTHS, "warmup_steps": 0, "decay": "linear"}
    np.testing.assert_array_equal(
        rates(ok.wsd_schedule(**kwargs, inclusive_end=True), 8), [4, 4, 4, 3, 2, 1, 0, 0]
    )
    np.testing.assert_array_equal(rates(ok.wsd_schedule(**kwargs), 8), [4, 4, 4, 4, 3, 2, 1, 0])


def test_warmup_shapes():
    kwargs = {"warmup_steps": 4, "stable_steps": 1, "decay_steps": 0}
    square = rates(ok.wsd_schedule(16.0, **kwargs, warmup="square"), 6)
    np.testing.assert_allclose(square, [0, 1, 4, 9, 16, 0])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((0, 0, 0), [1, 1, 1, 1]),  # a run without steps
        ((1, 0, 0), [3, 1, 1, 1]),
        ((0, 1, 0), [5, 1, 1, 1]),
        ((0, 0, 1), [5, 1, 1, 1]),
        ((0, 2, 0), [5, 5, 1, 1]),  # no decay: a jump
        ((0, 0, 4), [5, 4, 3, 2]),  # plain linear decay
        ((8, 2, 2), [3, 3.25, 3.5, 3.75]),  # warm-up longer than the run
        ((1, math.inf, 5), [3, 5, 5, 5]),  # a trunk without end
        ((1, 10**10, 5), [3, 5, 5, 5]),
    ],
)
def test_lengths(lengths, expected):
    warmup, stable, decay = lengths
    with jax.debug_nans(True):
        schedule = ok.wsd_schedule(
            5.0,
            warmup_steps=warmup,
            stable_steps=stable,
            decay_steps=decay,
            init_value=3.0,
            end_value=1.0,
            decay="linear",
        )
        np.testing.assert_allclose(rates(schedule, 4), expected, rtol=1e-6)


def test_agrees_with_optax_joined():
    schedule = ok.wsd_schedule(4.0, **LENGTHS, end_value=1.0, decay="exponential")
    pieces = [
        optax.linear_schedule(0.0, 4.0, 2),
        optax.constant_schedule(4.0),
        optax.exponential_decay(4.0, 4, 0.25, end_value=1.0),
    ]
    joined = optax.join_schedules(pieces, [2, 5])
    np.testing.assert_allclose(
        rates(schedule, 12), [joined(count) for count in range(12)], rtol=1e-6
    )


def test_runs_inside_optax_with_one_compilation():
    schedule = ok.wsd_schedule(1.0, **LENGTHS, decay="linear")
    tx = ok.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    params = jnp.zeros(2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.ones(2), state, params)
        return (params + updates, state), state.hyperparams["learning_rate"]

    (params, _), seen = jax.jit(lambda carry: jax.lax.scan(step, carry, length=9))(
        (params, tx.init(params))
    )
    np.testing.assert_allclose(seen, [0, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(params, [-6, -6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": "linaer"}, "decay must be one of 'linear', .*'half_life', got 'linaer'"),
        ({"warmup": "inverse"}, "warmup must be one of 'linear', .*, got 'inverse'"),
        ({"decay": "exponential"}, r"end_value \(with decay='exponential'\) must be > 0, got 0"),
        ({"decay": "inverse"}, r"end_value \(with decay='inverse'\) must be > 0, got 0"),
        ({"decay": "half_life"}, "half_life must be > 0 with decay='half_life', got None"),
        ({"half_life": 0}, "half_life must be > 0, got 0"),
        ({"decay_rate": 1.5}, "decay_rate must be > 0 and <= 1, got 1.5"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"stable_steps": -1}, "stable_steps must be >= 0, got -1"),
        ({"decay_steps": -1}, "decay_steps must be >= 0, got -1"),
        ({"peak_value": -0.1}, "peak_value must be >= 0, got -0.1"),
        ({"init_value": -0.1}, "init_value must be >= 0, got -0.1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ok.wsd_schedule(**{"peak_value": 1.0, **LENGTHS, **change})


def test_wsdc_holds_a_constant_above_zero():
    schedule = ok.wsdc_schedule(4.0, **LENGTHS, end_value=1.0)
    np.testing.assert_allclose(rates(schedule, 12)[5:], [4, 3.25, 2.5, 1.75, 1, 1, 1])
    with pytest.raises(ValueError, match="end_value must be > 0, got 0"):
        ok.wsdc_schedule(4.0, **LENGTHS, end_value=0.0)


def test_branch_is_the_trunk_until_the_checkpoint_and_decays_from_there():
    trunk = {"peak_value": 4.0, "warmup_steps": 2, "stable_steps": 100, "decay": "linear"}
    schedule, first_count = ok.wsd_branch(trunk, trunk_step=6, decay_steps=4)
    assert first_count == 6
    whole = ok.wsd_schedule(**trunk, decay_steps=0)
    np.testing.assert_array_equal(rates(schedule, 6), rates(whole, 6))
    np.testing.assert_array_equal(schedule(np.arange(6, 12)), [4, 3, 2, 1, 0, 0])
    assert trunk["stable_steps"] == 100  # the caller's arguments are untouched


@pytest.mark.parametrize(
    ("trunk_step", "decay_steps", "message"),
    [
        (1, 4, "trunk_step must be an integer >= 2, got 1"),
        (103, 4, "trunk_step must be <= 102, got 103"),
        (6, -1, "decay_steps must be an integer >= 0, got -1"),
    ],
)
def test_bad_branch(trunk_step, decay_steps, message):
    trunk = {"peak_value": 4.0, "warmup_steps": 2, "stable_steps": 100}
    with pytest.raises(ValueError, match=message):
        ok.wsd_branch(trunk, trunk_step=trunk_step, decay_steps=decay_steps)


def test_wsd_s_decays_at_every_budget_and_jumps_back():
    schedule = ok.wsd_s_schedule(
        4.0, (6, 10), decay_fraction=0.5, warmup_steps=2, end_value=1.0, decay="linear"
    )
    np.testing.assert_allclose(
        rates(schedule, 12), [0, 2, 4, 4, 3, 2, 4, 4, 4, 2.5, 1, 1], rtol=1e-6
    )


def test_wsd_s_inverse_starts_with_two_equal_rates():
    schedule = ok.wsd_s_schedule(1.0, [4], decay_fraction=1.0, end_value=0.2)
    # 1 / rate = 1 + 4 x at x = 1/4, 1/4, 2/4, 3/4
    np.testing.assert_allclose(rates(schedule, 5), [1 / 2, 1 / 2, 1 / 3, 1 / 4, 1 / 5], rtol=1e-6)


def test_wsd_s_ramps_up_again_from_the_end_value():
    schedule = ok.wsd_s_schedule(
        5.0, [4, 12], decay_fraction=0.25, rewarmup_fraction=0.5, end_value=1.0, decay="cosine"
    )
    np.testing.assert_allclose(
        rates(schedule, 13), [5, 5, 5, 5, 1, 2, 3, 4, 5, 5, 5, 3, 1], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [8, 8]}, r"budgets must be increasing integers above 0, got \[8, 8\]"),
        ({"budgets": [8, 9], "warmup_steps": 9}, r"budgets\[0\] must leave room for 9 steps"),
        ({"rewarmup_fraction": 0.6, "decay_fraction": 0.5}, r"budgets\[1\] must leave room"),
        ({"decay_fraction": 1.5}, "decay_fraction must be >= 0 and <= 1, got 1.5"),
        ({"rewarmup_fraction": -0.5}, "rewarmup_fraction must be >= 0 and <= 1, got -0.5"),
        ({"end_value": 0.0}, r"end_value \(with decay='inverse'\) must be > 0, got 0"),
        ({"decay": "half_life"}, "decay must be one of .*, got 'half_life'"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
    ],
)
def test_bad_wsd_s(change, message):
    with pytest.raises(ValueError, match=message):
        ok.wsd_s_schedule(**{"peak_value": 1.0, "budgets": [8, 18], "end_value": 0.1, **change})


def test_cyclic_cosine_is_optax_sgdr():
    schedule = ok.cyclic_cosine_schedule(2.0, [12, 20], warmup_steps=4, end_value=0.5)
    cycle = {"peak_value": 2.0, "end_value": 0.5}
    sgdr = optax.sgdr_schedule(
        [
            {**cycle, "init_value": 0.0, "warmup_steps": 4, "decay_steps": 12},
            {**cycle, "init_value": 2.0, "warmup_steps": 0, "decay_steps": 8},
        ]
    )
    np.testing.assert_allclose(rates(schedule, 25), [sgdr(c) for c in range(25)], rtol=1e-6)


def test_bad_cyclic_cosine():
    with pytest.raises(ValueError, match=r"budgets\[0\] must leave room for 4 steps of warm-up"):
        ok.cyclic_cosine_schedule(1.0, [3], warmup_steps=4)
    with pytest.raises(ValueError, match="end_value must be >= 0, got -1"):
        ok.cyclic_cosine_schedule(1.0, [3], end_value=-1.0)
