"""UBA, the damped cosine, and the two named uses of the warmup-stable-decay curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimkit as ok


def rates(schedule, n):
    return np.asarray(schedule(np.arange(n)))


# -- UBA --------------------------------------------------------------------------------------


def test_uba_by_hand():
    # C = 2, 1, 0 at the start, the middle and the end; 2 C / (2 phi + (2 - phi) C)
    for phi, middle in ((1.0, 2 / 3), (2.0, 1 / 2), (5.0, 2 / 7)):
        np.testing.assert_allclose(
            rates(ok.uba_schedule(1.0, 2, phi=phi), 4), [1, middle, 0, 0], rtol=1e-6
        )


def test_uba_tends_to_a_cliff_and_stays_finite():
    with jax.debug_nans(True):
        for phi in (1e-30, 1e-45, 1e30):
            got = rates(ok.uba_schedule(1.0, 4, phi=phi, end_value=0.5), 6)
            np.testing.assert_allclose(got[1:4], 1.0 if phi < 1 else 0.5, rtol=1e-6)
            np.testing.assert_allclose(got[[0, 4, 5]], [1, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (0, 0, [4, 4, 4]),
        (-3, 0, [4, 4, 4]),
        (1, 0, [4, 1, 1]),
        (4, 8, [2, 2.25, 2.5]),
        (1, 1, [2, 4, 1]),
    ],
)
def test_uba_lengths(steps, warmup, expected):
    rate = ok.uba_schedule(
        4.0, steps, phi=0.5, end_value=1.0, warmup_steps=warmup, warmup_init_value=2.0
    )
    np.testing.assert_allclose(rates(rate, 3), expected, rtol=1e-6)


def test_uba_cycles_are_uba_one_after_another():
    cycles = ok.uba_cycles([4.0, 3.0, 2.0], [5, 0, 3], phi=0.7, end_values=[1.0, 0.9, 0.5])
    first = rates(ok.uba_schedule(4.0, 5, phi=0.7, end_value=1.0), 5)
    last = rates(ok.uba_schedule(2.0, 3, phi=0.7, end_value=0.5), 6)
    np.testing.assert_allclose(rates(cycles, 11), [*first, *last], rtol=1e-6)


def test_uba_cycles_take_traced_sequences():
    def run(starts, steps, ends):
        return ok.uba_cycles(starts, steps, phi=1.0, end_values=ends)(jnp.arange(9))

    arguments = ([4.0, 2.0], [3, 4], [1.0, 0.5])
    traced = jax.jit(run)(*map(jnp.asarray, arguments))
    np.testing.assert_allclose(traced, run(*arguments), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi": 0.0}, "phi must be > 0, got 0"),
        ({"init_value": -1.0}, "init_value must be >= 0, got -1"),
        ({"end_value": -1.0}, "end_value must be >= 0, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"warmup_init_value": -1.0}, "warmup_init_value must be >= 0, got -1"),
    ],
)
def test_bad_uba(change, message):
    with pytest.raises(ValueError, match=message):
        ok.uba_schedule(**{"init_value": 1.0, "transition_steps": 4, "phi": 1.0, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi": -1.0}, "phi must be > 0, got -1"),
        ({"transition_steps_per_phase": [2, -1]}, r"transition_steps_per_phase\[1\] must be >= 0"),
        ({"init_values": [1.0, -1.0]}, r"init_values\[1\] must be >= 0, got -1"),
        ({"end_values": [0.0]}, "got 2 init_values, 2 transition_steps_per_phase, 1 end_values"),
    ],
)
def test_bad_uba_cycles(change, message):
    kwargs = {
        "init_values": [1.0, 1.0],
        "transition_steps_per_phase": [2, 2],
        "phi": 1.0,
        "end_values": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        ok.uba_cycles(**{**kwargs, **change})


# -- damped cosine ----------------------------------------------------------------------------

DAMPED = {"peak_value": 5.0, "end_value": 1.0, "num_cycles": 2, "damping": 1.0}


def test_one_cycle_is_a_half_cosine_under_the_envelope():
    got = rates(ok.damped_cosine_schedule(5.0, 1.0, 2, num_cycles=1, damping=0.0), 4)
    np.testing.assert_allclose(got, [5, 3, 1, 1], rtol=1e-6)


def test_peaks_and_valleys_lie_on_the_envelopes():
    rate = ok.damped_cosine_schedule(**{**DAMPED, "num_cycles": 3, "damping": 2.0},
                                     transition_steps=50)  # fmt: skip
    # Half cycles of 10 counts: peaks at 0, 20, 40 on 1 + 4 (1-p)^2, valleys at 10, 30, 50 on 1.
    np.testing.assert_allclose(
        rates(rate, 60)[::10], [5, 1, 1 + 4 * 0.36, 1, 1 + 4 * 0.04, 1], rtol=1e-5
    )


def test_envelopes_may_be_replaced():
    rate = ok.damped_cosine_schedule(
        **DAMPED,
        transition_steps=12,
        warmup_steps=2,
        peak_fn=lambda p: 9.0 - 3 * p,
        valley_fn=lambda p: 2 * p,
    )
    got = rates(rate, 20)
    np.testing.assert_allclose(got[:3], [0, 4.5, 9], rtol=1e-6)  # the ramp aims at peak_fn(0)
    np.testing.assert_allclose(got[[6, 10, 14, 19]], [2 / 3, 7, 2, 2], rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [(0, 0, [5, 5, 5]), (1, 0, [5, 1, 1]), (4, 8, [0, 0.625, 1.25]), (0, 1, [0, 5, 5])],
)
def test_damped_lengths(steps, warmup, expected):
    rate = ok.damped_cosine_schedule(
        **{**DAMPED, "num_cycles": 1}, transition_steps=steps, warmup_steps=warmup
    )
    np.testing.assert_allclose(rates(rate, 3), expected, rtol=1e-6)


def test_few_counts_to_a_half_cycle_warn():
    with pytest.warns(UserWarning, match="transition_steps=11 leaves fewer than 4 counts"):
        ok.damped_cosine_schedule(**DAMPED, transition_steps=11)
    ok.damped_cosine_schedule(**DAMPED, transition_steps=12)  # warnings are errors here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_cycles": 0}, "num_cycles must be >= 1, got 0"),
        ({"num_cycles": 1.5}, "num_cycles must be an integer >= 1, got 1.5"),
        ({"damping": -1.0}, "damping must be >= 0, got -1"),
        ({"peak_value": -1.0}, "peak_value must be >= 0, got -1"),
        ({"end_value": -1.0}, "end_value must be >= 0, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"warmup_init_value": -1.0}, "warmup_init_value must be >= 0, got -1"),
        ({"peak_fn": 0.1}, "peak_fn must be a function of the progress, got 0.1"),
        ({"valley_fn": 0.1}, "valley_fn must be a function of the progress, got 0.1"),
    ],
)
def test_bad_damped_cosine(change, message):
    with pytest.raises(ValueError, match=message):
        ok.damped_cosine_schedule(**{**DAMPED, "transition_steps": 100, **change})


# -- named uses of the warmup-stable-decay curve ----------------------------------------------


@pytest.mark.parametrize(
    ("ramp", "decay", "expected"),
    [
        (0, 0, [1, 1, 1]),
        (1, 0, [2, 1, 1]),
        (0, 1, [4, 1, 1]),
        (0, 2, [4, 2, 1]),
        (8, 1, [2, 2.25, 2.5]),
    ],
)
def test_slow_start_lengths(ramp, decay, expected):
    rate = ok.slow_start_fast_decay_schedule(
        2.0, 4.0, ramp_steps=ramp, decay_steps=decay, end_value=1.0
    )
    np.testing.assert_allclose(rates(rate, 3), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_value": -1.0}, "start_value must be >= 0, got -1"),
        ({"peak_value": 0.0}, r"peak_value .* must be > 0, got 0"),
        ({"end_value": 0.0}, r"end_value .* must be > 0, got 0"),
        ({"ramp_steps": -1}, "ramp_steps must be >= 0, got -1"),
        ({"decay_steps": -1}, "decay_steps must be >= 0, got -1"),
        ({"decay": "half_life"}, "decay must be one of .*, got 'half_life'"),
    ],
)
def test_bad_slow_start(change, message):
    kwargs = {
        "start_value": 0.1,
        "peak_value": 1.0,
        "ramp_steps": 2,
        "decay_steps": 2,
        "end_value": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        ok.slow_start_fast_decay_schedule(**{**kwargs, **change})


def test_moderate_decay_ends_at_its_share_of_the_peak():
    rate = ok.moderate_decay_schedule(
        4.0, 8, final_ratio=0.5, warmup_steps=2, decay_steps=4, decay="linear"
    )
    np.testing.assert_allclose(rates(rate, 10), [0, 2, 4, 4, 4, 3.5, 3, 2.5, 2, 2], rtol=1e-6)
    flat = ok.moderate_decay_schedule(4.0, 3, final_ratio=1.0, decay_steps=3)
    np.testing.assert_allclose(rates(flat, 5), 4.0)
    nothing = ok.moderate_decay_schedule(4.0, 0, final_ratio=0.5, decay_steps=0)
    np.testing.assert_allclose(rates(nothing, 2), 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transition_steps": 5}, "transition_steps must be >= 6, got 5"),
        ({"final_ratio": -0.5}, "final_ratio must be >= 0, got -0.5"),
        ({"final_ratio": 0.0, "decay": "inverse"}, r"final_ratio .* must be > 0, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"decay_steps": -1}, "decay_steps must be >= 0, got -1"),
        ({"peak_value": -1.0}, "peak_value must be >= 0, got -1"),
        ({"decay": "half_life"}, "decay must be one of .*, got 'half_life'"),
    ],
)
def test_bad_moderate_decay(change, message):
    kwargs = {
        "peak_value": 1.0,
        "transition_steps": 8,
        "final_ratio": 0.5,
        "warmup_steps": 2,
        "decay_steps": 4,
    }
    with pytest.raises(ValueError, match=message):
        ok.moderate_decay_schedule(**{**kwargs, **change})
