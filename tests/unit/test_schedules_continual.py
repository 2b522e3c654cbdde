"""Schedules for a stream of data sets: infinite ones, and re-warming."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok

INFINITE = (
    ok.infinite_cosine_schedule,
    ok.infinite_rsqrt_schedule,
    ok.infinite_linear_schedule,
)
RATES = {"peak_value": 8.0, "constant_value": 4.0, "end_value": 1.0}
LENGTHS = {"warmup_steps": 2, "cooldown_steps": 2, "constant_steps": 3, "anneal_steps": 2}


def rates(schedule, n):
    return np.asarray(schedule(np.arange(n)))


@pytest.mark.parametrize("factory", INFINITE)
def test_phases(factory):
    got = rates(factory(**RATES, **LENGTHS, init_value=2.0), 12)
    np.testing.assert_allclose(got[:3], [2, 5, 8], rtol=1e-6)
    assert 4 < got[3] < 8
    np.testing.assert_allclose(got[4:], [4, 4, 4, 4, 2, 1, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("factory", INFINITE)
@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((0, 0, None, None), [4, 4, 4, 4]),
        ((0, 0, 0, 0), [1, 1, 1, 1]),  # a run without steps
        ((0, 0, 1, 0), [4, 1, 1, 1]),  # one step, then a jump
        ((1, 0, 1, 0), [0, 4, 1, 1]),
        ((0, 1, 0, 2), [8, 4, 2, 1]),
        ((8, 0, None, None), [0, 1, 2, 3]),  # warm-up longer than the run
    ],
)
def test_lengths(factory, lengths, expected):
    with jax.debug_nans(True), jax.debug_infs(True):
        got = rates(factory(**RATES, **dict(zip(LENGTHS, lengths, strict=True))), 4)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_constant_without_end():
    rate = ok.infinite_cosine_schedule(**RATES, warmup_steps=1, cooldown_steps=1)
    assert float(rate(2**31 - 2)) == 4


def test_rsqrt_with_alpha_zero_is_the_line():
    rsqrt = ok.infinite_rsqrt_schedule(**RATES, **{**LENGTHS, "cooldown_steps": 9}, alpha=0.0)
    line = ok.infinite_linear_schedule(**RATES, **{**LENGTHS, "cooldown_steps": 9})
    np.testing.assert_allclose(rates(rsqrt, 20), rates(line, 20), rtol=1e-6)


def test_anneal_from_continues_what_an_endless_constant_left():
    whole = ok.infinite_cosine_schedule(**RATES, **LENGTHS)
    branch = ok.anneal_from(4.0, 1.0, 2, start_step=7)
    np.testing.assert_allclose(rates(branch, 12)[4:], rates(whole, 12)[4:], rtol=1e-6)
    jump = ok.anneal_from(4.0, 1.0, 0, start_step=2)
    np.testing.assert_allclose(rates(jump, 4), [4, 4, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("factory", INFINITE)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_value": -1.0}, "peak_value must be >= 0, got -1"),
        ({"init_value": -1.0}, "init_value must be >= 0, got -1"),
        ({"constant_value": 0.0}, r"constant_value .* must be > 0, got 0"),
        ({"end_value": 0.0}, r"end_value .* must be > 0, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"cooldown_steps": -1}, "cooldown_steps must be >= 0, got -1"),
        ({"constant_steps": -1}, "constant_steps must be >= 0, got -1"),
        ({"anneal_steps": -1}, "anneal_steps must be >= 0, got -1"),
        ({"anneal_steps": None}, "anneal_steps must be >= 0 where constant_steps is given"),
    ],
)
def test_bad_infinite(factory, change, message):
    with pytest.raises(ValueError, match=message):
        factory(**{**RATES, **LENGTHS, **change})


def test_bad_arguments_of_a_single_factory():
    with pytest.raises(ValueError, match="alpha must be >= 0, got -1"):
        ok.infinite_rsqrt_schedule(**RATES, **LENGTHS, alpha=-1.0)
    with pytest.raises(ValueError, match="start_step must be >= 0, got -1"):
        ok.anneal_from(4.0, 1.0, 2, start_step=-1)


# -- re-warming -------------------------------------------------------------------------------


def test_rewarm_is_optax_joined():
    ours = ok.rewarm_schedule(
        [4.0, 2.0], end_value=1.0, task_steps=[6, 5], warmup_steps=[2, 1], init_value=0.5
    )
    theirs = optax.join_schedules(
        [
            optax.warmup_cosine_decay_schedule(0.5, 4.0, 2, 6, 1.0),
            optax.warmup_cosine_decay_schedule(0.0, 2.0, 1, 5, 1.0),
        ],
        [6],
    )
    np.testing.assert_allclose(rates(ours, 14), [theirs(c) for c in range(14)], rtol=1e-5)


def test_rewarm_from_the_end_value_has_no_gap():
    rate = ok.rewarm_schedule(
        [5.0, 5.0], end_value=1.0, task_steps=4, warmup_steps=2, rewarm_from="end_value"
    )
    np.testing.assert_allclose(rates(rate, 9), [0, 2.5, 5, 3, 1, 3, 5, 3, 1], rtol=1e-6)


def test_neox_ramp_starts_at_its_first_step_and_has_no_floor():
    rate = ok.rewarm_schedule(
        [4.0, 3.0], end_value=2.0, task_steps=[5, 1], warmup_steps=[4, 0], neox_warmup=True
    )
    np.testing.assert_allclose(rates(rate, 7), [1, 1, 2, 3, 4, 3, 2], rtol=1e-6)


def test_neox_floor_lifts_a_peak_below_it_after_the_ramp_alone():
    rate = ok.rewarm_schedule(1.0, end_value=2.0, task_steps=4, warmup_steps=1, neox_warmup=True)
    np.testing.assert_allclose(rates(rate, 5), [1, 1, 2, 2, 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("task_steps", "warmup_steps", "expected"),
    [
        ([0, 0], 0, [1, 1, 1]),  # a run without steps
        ([1, 0], 0, [4, 1, 1]),
        ([0, 1], 0, [2, 1, 1]),  # the first task is left out
        ([2, 1], [8, 0], [0, 0.5, 2]),  # a ramp longer than its task
        ([2, 2], [2, 0], [0, 2, 2]),
    ],
)
def test_rewarm_lengths(task_steps, warmup_steps, expected):
    with jax.debug_nans(True):
        rate = ok.rewarm_schedule(
            [4.0, 2.0], end_value=1.0, task_steps=task_steps, warmup_steps=warmup_steps
        )
        np.testing.assert_allclose(rates(rate, 3), expected, rtol=1e-6)


def test_rewarm_takes_traced_sequences():
    def run(peaks, steps, warmups):
        schedule = ok.rewarm_schedule(peaks, end_value=1.0, task_steps=steps, warmup_steps=warmups)
        return schedule(jnp.arange(12))

    arguments = ([4.0, 2.0], [6, 5], [2, 1])
    traced = jax.jit(run)(*map(jnp.asarray, arguments))
    np.testing.assert_allclose(traced, run(*arguments), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_values": [1.0, -2.0]}, r"peak_values\[1\] must be >= 0, got -2"),
        ({"peak_values": []}, "every phase must have .*, got 0 peak_values, 2 task_steps"),
        ({"peak_values": [1.0] * 3}, "got 3 peak_values, 2 task_steps"),
        ({"task_steps": [3, -1]}, r"task_steps\[1\] must be >= 0, got -1"),
        ({"warmup_steps": -1}, r"warmup_steps\[0\] must be >= 0, got -1"),
        ({"end_value": -1.0}, "end_value must be >= 0, got -1"),
        ({"init_value": -1.0}, "init_value must be >= 0, got -1"),
        ({"rewarm_from": "peak"}, "rewarm_from must be one of 'zero', 'end_value', got 'peak'"),
    ],
)
def test_bad_rewarm(change, message):
    kwargs = {
        "peak_values": [1.0, 1.0],
        "end_value": 0.1,
        "task_steps": [3, 3],
        "warmup_steps": 1,
    }
    with pytest.raises(ValueError, match=message):
        ok.rewarm_schedule(**{**kwargs, **change})
