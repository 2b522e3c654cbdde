"""The schedule from recorded gradient norms, and the pictures of schedules."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.ndimage import median_filter

import optimkit as ok
from optimkit.schedules import adapt_regime, median_filter_norms, plot, refine_weights


def rates(schedule, n):
    return np.asarray(schedule(np.arange(n)))


def test_constant_norms_give_linear_decay():
    expected = [1, 0.75, 0.5, 0.25, 0, 0, 0]
    for power in (0.0, 1.0, 2.0):
        rate = ok.refined_schedule([3.7] * 5, power=power)
        np.testing.assert_allclose(rates(rate, 7), expected, rtol=1e-6)
    wild = ok.refined_schedule([1.0, 9.0, 2.0, 5.0, 3.0], power=0.0)
    np.testing.assert_allclose(rates(wild, 7), expected, rtol=1e-6)


def test_sgd_and_adam_forms_by_hand():
    # w = 1/4, 1, 1 or 1/2, 1, 1; w_t times what follows: 1/2, 1, 0 or 1, 1, 0
    norms = [2.0, 1.0, 1.0]
    np.testing.assert_allclose(refine_weights(norms, 2.0, 0.0), [0.5, 1, 0])
    np.testing.assert_allclose(refine_weights(norms, 1.0, 0.0), [1, 1, 0])
    rate = ok.refined_schedule(jnp.asarray(norms), peak_value=3.0, filter_fraction=0.0)
    np.testing.assert_allclose(rates(rate, 5), [1.5, 3, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 40, 101])
def test_median_is_scipys(steps, fraction):
    norms = np.random.default_rng(steps).uniform(1, 2, steps)
    width = int(fraction * steps) // 2 * 2 + 1
    extended = np.pad(norms, (0, 2 * width), mode="reflect")
    theirs = median_filter(extended, width, mode="nearest")[:steps]
    np.testing.assert_array_equal(median_filter_norms(norms, fraction), theirs)


def test_spikes_gaps_and_zeros_do_not_reach_the_schedule():
    norms = np.ones(40)
    norms[[5, 20, 39]] = 400.0, np.nan, 0.0
    np.testing.assert_allclose(refine_weights(norms, 2.0, 0.1), refine_weights([1.0] * 40, 2, 0))
    norms = [1.0, np.inf, 3.0, 0.0]
    np.testing.assert_allclose(median_filter_norms(norms, 0.0), [1, 2, 3, 1])


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_the_scale_of_the_norms_cancels(scale):
    norms = scale * np.array([3.0, 1.0, 2.0, 5.0])
    np.testing.assert_allclose(refine_weights(norms, 2.0, 0.0), refine_weights(norms / scale, 2, 0))


def test_another_length_interpolates_the_norms():
    longer = ok.refined_schedule([2.0, 1.0], filter_fraction=0.0, total_steps=3)
    np.testing.assert_allclose(rates(longer, 3), rates(
        ok.refined_schedule([2.0, 1.5, 1.0], filter_fraction=0.0), 3))  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_without_a_second_step_has_a_constant_rate(steps):
    rate = ok.refined_schedule([2.0, 1.0, 1.0], peak_value=0.5, total_steps=steps)
    np.testing.assert_array_equal(rates(rate, 3), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_norms": []}, r"grad_norms must have one entry a step, got the shape \(0,\)"),
        ({"grad_norms": [[1.0]]}, r"grad_norms must have one entry a step, got the shape \(1, 1\)"),
        ({"grad_norms": [1.0, -2.0]}, "grad_norms must be >= 0, got -2"),
        ({"grad_norms": [0.0, np.nan]}, "grad_norms must hold a finite norm above 0, got none"),
        ({"peak_value": -1.0}, "peak_value must be >= 0, got -1"),
        ({"power": -1.0}, "power must be >= 0, got -1"),
        ({"filter_fraction": 1.5}, "filter_fraction must be >= 0 and <= 1, got 1.5"),
        ({"total_steps": -1}, "total_steps must be an integer >= 0, got -1"),
    ],
)
def test_bad_refined(change, message):
    with pytest.raises(ValueError, match=message):
        ok.refined_schedule(**{"grad_norms": [1.0, 2.0, 3.0], **change})


# -- pictures ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_window():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def test_plot_draws_what_the_schedule_says():
    ax = plot(ok.linear_decay_schedule(1.0, 4), 5, color="k")
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[c, 1 - c / 4] for c in range(5)])
    assert line.get_color() == "k"
    assert ax.get_legend() is None


def test_plot_draws_several_on_given_axes():
    from matplotlib import pyplot

    _, mine = pyplot.subplots()
    regime = adapt_regime([100], [2.0, 1.0], 200, batch_size=256)
    named = {"regime": regime, "rate": 0.5, "optax": optax.constant_schedule(3.0)}
    ax = plot(named, 10_001, start=7, ax=mine, log=True)
    assert ax is mine
    assert ax.get_yscale() == "log"
    for line, last in zip(ax.get_lines(), (1.0, 0.5, 3.0), strict=True):
        assert len(line.get_xdata()) == 2000
        assert (line.get_xdata()[0], line.get_xdata()[-1]) == (7, 10_007)
        assert line.get_ydata()[-1] == last
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(named)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0), "steps must be an integer >= 1, got 0"),
        (({}, 5), "schedule must be a schedule or a dict of schedules, got an empty dict"),
    ],
)
def test_bad_plot(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot(*arguments)
    with pytest.raises(ValueError, match="start must be an integer >= 0, got -1"):
        plot(1.0, 5, start=-1)


def test_plot_names_the_missing_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "optimkit\[plot\]"'):
        plot(1.0, 5)
