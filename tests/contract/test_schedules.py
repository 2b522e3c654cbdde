"""What every schedule of the catalog keeps, and proof that the checks can fail.

A schedule is a function of the 0-based count alone. It gives the rate in the widest float type that
JAX has switched on, for counts of any kind, under any transformation, and is finite everywhere,
also in the pieces that a count does not select.
"""

import doctest
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.catalog import check_keywords, records
from optimkit.protocols import Method

HORIZON = 100  # the examples of the records end by then
COUNTS = (*range(13), 29, 30, 31, 59, 60, 61, 70, 79, 80, 81, 89, 90, 91, 99, 100, 101, 110)
LAST_COUNT = 2**31 - 2
SCHEDULES = records("schedule")


# ---------------------------------------------------------------------------------------------
# The checks. Each takes a record and raises where the rule is broken.
# ---------------------------------------------------------------------------------------------


def check_record(record):
    """Every argument is either traced or static, and the example uses only known ones."""
    arguments = set(inspect.signature(record.factory).parameters)
    assert not set(record.traced) & set(record.static)
    assert set(record.traced) | set(record.static) == arguments
    check_keywords(record.factory, {**record.example, **record.example_made})
    assert record.summary
    assert record.paper


def check_docstring(record):
    """The docstring has an example that runs."""
    tests = doctest.DocTestFinder(recurse=False).find(
        record.factory, record.name, globs=vars(inspect.getmodule(record.factory))
    )
    assert sum(len(test.examples) for test in tests) > 0, "no example"
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        runner.run(test, out=lambda text: None)
    assert runner.failures == 0, f"{runner.failures} wrong lines"


def check_dtype(record):
    """f32, f64 under x64, never weak, whatever kind of integer the count is."""
    kinds = (int, np.int32, np.int64, lambda count: jnp.asarray(count, jnp.int32))
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            schedule = record.build()
            rates = [schedule(kind(7)) for kind in kinds]
            for rate in rates:
                assert isinstance(rate, jax.Array)
                assert (rate.dtype, rate.shape, rate.weak_type) == (dtype, (), False)
                assert rate == rates[0]


def check_transforms(record):
    """Eager, jit, vmap, scan and a vector of counts agree."""
    schedule = record.build()
    eager = np.array([schedule(count) for count in COUNTS])
    counts = jnp.asarray(COUNTS, jnp.int32)
    jitted = jax.jit(schedule)
    scanned = jax.jit(lambda: jax.lax.scan(lambda carry, c: (carry, schedule(c)), 0, counts)[1])
    close = {"rtol": 1e-6, "atol": 1e-6 * np.abs(eager).max()}
    np.testing.assert_allclose([jitted(count) for count in counts], eager, **close)
    assert jitted._cache_size() == 1
    np.testing.assert_allclose(jax.vmap(schedule)(counts), eager, **close)
    np.testing.assert_allclose(scanned(), eager, **close)
    np.testing.assert_allclose(schedule(counts), eager, **close)


def every_count():
    return jnp.asarray([*range(HORIZON + 11), 10**6, LAST_COUNT], jnp.int32)


def check_finite(record):
    """A finite rate, >= 0, at every count of the run, after it, and at the last of all counts."""
    rates = np.asarray(record.build()(every_count()))
    assert np.all(np.isfinite(rates)), f"counts {np.flatnonzero(~np.isfinite(rates))}"
    assert np.all(rates >= 0)


def check_quiet(record):
    """No operation gives NaN or infinity, selected or not, at any count or before the start."""
    schedule = record.build()
    with jax.debug_nans(True), jax.debug_infs(True):
        schedule(every_count())
        schedule(jnp.arange(-5, 5, dtype=jnp.int32))


def numbers(record):
    """The traced arguments that are numbers in the example or by default."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(record.factory).parameters.items()
    }
    values = {name: record.example.get(name, defaults[name]) for name in record.traced}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def check_traced(record):
    """Tracers give what concrete values give; new values compile nothing; gradients are finite."""
    first = numbers(record)
    assert first, "nothing to trace"
    second = {n: v + 1 if isinstance(v, int) else v * 0.75 for n, v in first.items()}
    traces = []

    @jax.jit
    def rates(values, counts):
        traces.append(values)
        return record.build(**values)(counts)

    counts = every_count()
    for values in (first, second):
        expected = np.asarray(record.build(**values)(counts))
        close = {"rtol": 1e-5, "atol": 1e-6 * expected.max()}
        np.testing.assert_allclose(rates(values, counts), expected, **close)
    assert len(traces) == 1, f"{len(traces)} compilations"
    smooth = {name: value for name, value in first.items() if isinstance(value, float)}
    if smooth:
        slopes = jax.jacfwd(lambda values: record.build(**values)(counts))(smooth)
        assert all(np.all(np.isfinite(slope)) for slope in jax.tree.leaves(slopes))


def check_bad_input(record):
    """NaN for a number raises at once, and the message names the argument and the value."""
    for name in numbers(record):
        with pytest.raises(ValueError, match=rf"{name}.* must be .*got nan"):
            record.build(**{name: float("nan")})


CHECKS = (
    check_record,
    check_docstring,
    check_dtype,
    check_transforms,
    check_finite,
    check_quiet,
    check_traced,
    check_bad_input,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name, check):
    check(SCHEDULES[name])


def test_the_catalog_has_schedules():
    assert {"wsd_schedule", "rex_schedule", "linear_decay_schedule"} <= SCHEDULES.keys()


# ---------------------------------------------------------------------------------------------
# Broken schedules, each rejected by the check that is there for it
# ---------------------------------------------------------------------------------------------


def nan_after_the_end(peak_value):
    return lambda count: peak_value * jnp.sqrt(1 - jnp.float32(count) / HORIZON)


def nan_not_selected(peak_value):
    def schedule(count):
        rest = 1 - jnp.float32(count) / HORIZON
        return jnp.where(rest > 0, peak_value * jnp.sqrt(rest), 0)

    return schedule


def python_if_on_the_count(peak_value):
    return lambda count: jnp.float32(peak_value if count < 10 else peak_value / 2)


def compiles_for_every_count(peak_value):
    decay = jax.jit(lambda count: jnp.float32(peak_value / (1 + count)), static_argnums=0)
    return lambda count: decay(int(count))


def fixes_its_value(peak_value):
    peak = float(peak_value)
    return lambda count: jnp.float32(peak) / (1 + jnp.float32(count))


def single_precision(peak_value):
    return lambda count: jnp.asarray(peak_value / (1 + jnp.float32(count)), jnp.float32)


def accepts_anything(peak_value):
    return lambda count: jnp.float32(peak_value) / (1 + jnp.float32(count))


BROKEN = (
    (nan_after_the_end, check_finite, AssertionError),
    (nan_not_selected, check_quiet, FloatingPointError),
    (python_if_on_the_count, check_transforms, jax.errors.TracerBoolConversionError),
    (compiles_for_every_count, check_transforms, jax.errors.ConcretizationTypeError),
    (fixes_its_value, check_traced, jax.errors.ConcretizationTypeError),
    (single_precision, check_dtype, AssertionError),
    (accepts_anything, check_bad_input, pytest.fail.Exception),
    (accepts_anything, check_docstring, AssertionError),
    (accepts_anything, check_record, AssertionError),
)


@pytest.mark.parametrize(("factory", "check", "error"), BROKEN)
def test_a_broken_schedule_is_rejected(factory, check, error):
    record = Method(
        factory=factory,
        kind="schedule",
        summary="broken on purpose",
        example={"peak_value": 1.0},
        traced=("peak_value",),
    )
    with pytest.raises(error):
        check(record)


def test_a_nan_in_the_unselected_piece_shows_in_no_value():
    record = Method(
        factory=nan_not_selected,
        kind="schedule",
        summary="broken on purpose",
        example={"peak_value": 1.0},
        traced=("peak_value",),
    )
    check_finite(record)  # which is why check_quiet is needed
