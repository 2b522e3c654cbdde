"""Many settings at once: the numbers of separate runs, no second compilation, clear errors."""

from __future__ import annotations

import builtins
import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimkit as ok
from optimkit import catalog
from optimkit.sweep import SweepResult, plot, sweep
from optimkit.sweep.settings import make_settings
from optimkit.sweep.training import _Problem, _programs, _Same

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 16, 8)).astype(np.float32), RNG.normal(size=(6, 16, 4))
BATCHES = [(x, y.astype(np.float32)) for x, y in zip(X, Y, strict=True)]
PARAMS: Any = {
    "kernel": jnp.asarray(RNG.normal(size=(8, 4)) * 0.3, jnp.float32),
    "bias": jnp.ones(4),
}


def loss_fn(params: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean(jnp.square(x @ params["kernel"] + params["bias"][None, :] - y))


def separately(tx: optax.GradientTransformation) -> tuple[list[float], Any]:
    """One run, one compilation, as a user would write it."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=lambda p: loss_fn(p, batch)
        )
        return optax.apply_updates(params, updates), state, value

    params, state, losses = PARAMS, tx.init(PARAMS), []
    for batch in BATCHES:
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return losses, params


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "fixed", "values"),
    [
        (ok.lion, {}, {"learning_rate": [1e-3, 1e-1], "weight_decay": [0.0, 0.1]}),
        (ok.adamp, {"nesterov": True}, {"learning_rate": [1e-2], "b1": [0.5, 0.9]}),
        (optax.adamw, {"weight_decay": 0.1}, {"learning_rate": [1e-3, 1e-1]}),
        (ok.drift_adjusted_sgd, {}, {"power": [0.5, 1.0]}),
    ],
)
def test_every_setting_has_the_numbers_of_a_run_of_its_own(factory, fixed, values) -> None:
    found = sweep(factory, loss_fn, PARAMS, BATCHES, fixed=fixed, keep_params=True, **values)
    assert len(found.settings) == np.prod([len(v) for v in values.values()])
    for index, setting in enumerate(found.settings):
        losses, params = separately(factory(**fixed, **setting))
        np.testing.assert_allclose(found.losses[index], losses, rtol=2e-6)
        for name, expected in params.items():
            np.testing.assert_allclose(found.params[name][index], expected, rtol=1e-5, atol=1e-6)


def test_a_quadratic_by_hand() -> None:
    """w = 1 - 0.5 w'(w^2): each step leaves (1 - 2 * rate) of the distance."""
    found = sweep(
        optax.sgd,
        lambda w, batch: w**2 + 0 * batch,
        jnp.ones(()),
        [0.0] * 3,
        learning_rate=[0.25, 1],
    )
    np.testing.assert_array_equal(found.losses, [[1, 1 / 4, 1 / 16], [1, 1, 1]])
    assert found.best == {"learning_rate": 0.25}
    assert found.best_score == found.best_losses[-1] == 1 / 16
    assert found.ranking == [0, 1]
    assert not found.diverged.any()
    assert found.params is None
    assert found.best_params is None


def test_the_settings_are_a_product_or_go_side_by_side() -> None:
    lists = {"a": [1, 2], "b": np.array([3.0, 4.0])}
    assert [tuple(s.values()) for s in make_settings(lists, "product")] == [
        (1, 3), (1, 4), (2, 3), (2, 4)
    ]  # fmt: skip
    assert [tuple(s.values()) for s in make_settings(lists, "zip")] == [(1, 3), (2, 4)]


def test_a_score_of_the_parameters_ranks() -> None:
    # The largest rate moves furthest, although its loss is not the lowest.
    found = sweep(
        optax.sgd,
        lambda w, batch: (w - batch) ** 2,
        jnp.zeros(()),
        [1.0] * 2,
        score_fn=lambda w: -w,
        keep_params=True,
        learning_rate=[0.1, 0.5, 0.75],
    )
    assert found.scores.tolist() == pytest.approx([-0.36, -1.0, -0.75])
    assert found.best == {"learning_rate": 0.5}
    assert float(found.best_params) == 1.0


def test_the_peak_of_a_schedule_is_swept_through_a_function() -> None:
    found = sweep(
        lambda peak, steps: optax.sgd(ok.rex_schedule(peak, steps)),
        loss_fn,
        PARAMS,
        BATCHES,
        combine="zip",
        peak=[0.1, 0.2],
        steps=[6, 3],
    )
    for index, (peak, steps) in enumerate([(0.1, 6), (0.2, 3)]):
        losses, _ = separately(optax.sgd(ok.rex_schedule(peak, steps)))
        np.testing.assert_allclose(found.losses[index], losses, rtol=2e-6)


def test_extras_of_the_users_own_reach_the_update() -> None:
    found = sweep(
        ok.fedhyper_client_local,
        loss_fn,
        PARAMS,
        BATCHES,
        extras=lambda params, grads, batch: {"global_update": jax.tree.map(jnp.zeros_like, params)},
        fixed={"steps_per_epoch": 2, "global_weight": 0.1},
        learning_rate=[1e-2, 1e-1],
    )
    assert found.best_losses[-1] < found.best_losses[0]


# --- any method of the catalog -------------------------------------------------------------------

SWEPT = {name: record for name, record in catalog.records("recipe").items() if record.traced}


@pytest.mark.parametrize("name", SWEPT)
def test_all_traced_arguments_of_a_method_can_be_swept_at_once(name) -> None:
    """Traced, not compiled: what could fail is a Python branch on a swept argument."""
    record = SWEPT[name]
    built = {**record.example, **{k: make() for k, make in record.example_made.items()}}
    defaults = {k: built.get(k, _default(record.factory, k)) for k in record.traced}
    values = {
        k: jnp.full(2, v, jnp.float32)
        for k, v in defaults.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    assert values
    fixed = tuple((k, _Same(v)) for k, v in built.items() if k not in values)
    extras = record.extras and (lambda params, grads, batch: record.extras(params, grads))
    if not set(record.needs) - {"params", "value", "value_fn"}:
        extras = None
    programs = _programs(_Problem(record.factory, loss_fn, None, extras, fixed, None))
    params, state = jax.eval_shape(programs.start, values, PARAMS)
    after = jax.eval_shape(programs.step, values, params, state, BATCHES[0])
    assert jax.tree.map(jnp.shape, after[:2]) == jax.tree.map(jnp.shape, (params, state))
    assert after[2].shape == (2,)


def _default(factory: Any, name: str) -> Any:
    default = inspect.signature(factory).parameters[name].default
    return 0.1 if default is inspect.Parameter.empty else default


# --- compilation ---------------------------------------------------------------------------------


def test_other_values_compile_nothing() -> None:
    traces = []

    def counted(params: Any, batch: Any) -> Any:
        traces.append(1)
        return loss_fn(params, batch)

    for scale in (1.0, 2.0, 3.0):
        sweep(
            ok.lion,
            counted,
            PARAMS,
            BATCHES,
            fixed={"b1": 0.9},
            learning_rate=[1e-3 * scale, 1e-2 * scale],
            weight_decay=[0.1, 0.0],
        )
        assert len(traces) == 1
    # Another fixed value is another program.
    sweep(ok.lion, counted, PARAMS, BATCHES, fixed={"b1": 0.8}, learning_rate=[1e-3])
    assert len(traces) == 2


# --- divergence ----------------------------------------------------------------------------------


def test_a_diverged_setting_never_wins_and_touches_no_other() -> None:
    rates = [1e30, 0.1, 1e20]
    found = sweep(optax.sgd, loss_fn, PARAMS, BATCHES, learning_rate=rates)
    assert found.diverged.tolist() == [True, False, True]
    assert found.best == {"learning_rate": 0.1}
    assert found.ranking[0] == 1
    alone = sweep(optax.sgd, loss_fn, PARAMS, BATCHES, learning_rate=[0.1])
    np.testing.assert_allclose(found.best_losses, alone.best_losses, rtol=2e-6)


def test_a_last_step_that_breaks_the_parameters_counts() -> None:
    # One step: the loss before it is finite in both settings, the parameters after it in one.
    found = sweep(
        optax.sgd, lambda w, b: 3e38 * w * b, jnp.ones(()), [1.0], learning_rate=[10.0, 1e-40 + 0.0]
    )
    assert found.diverged.tolist() == [True, False]
    assert found.best_index == 1


def test_a_score_that_is_nan_does_not_win() -> None:
    found = sweep(
        optax.sgd,
        loss_fn,
        PARAMS,
        BATCHES,
        score_fn=lambda p: jnp.where(p["bias"][0] < 0.99, jnp.nan, p["bias"][0]),
        learning_rate=[0.1, 1e-6],
    )
    assert found.diverged.tolist() == [True, False]


def test_if_all_diverge_the_error_says_so() -> None:
    with pytest.raises(
        FloatingPointError, match=r"every one of the 2 settings.*updates.*learning_rate"
    ):
        sweep(optax.sgd, loss_fn, PARAMS, BATCHES, learning_rate=[1e30, 1e25])


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "values", "error", "message"),
    [
        (ok.lion, {"mask": [None]}, TypeError, "'mask' of lion shapes the program.*'weight_decay'"),
        (ok.lion, {"learning_rat": [1.0]}, TypeError, "lion has no argument 'learning_rat'"),
        (ok.lion, {}, ValueError, "needs a list of values"),
        (ok.lion, {"learning_rate": []}, ValueError, r"learning_rate must be .* numbers, got \[\]"),
        (ok.lion, {"learning_rate": 0.1}, ValueError, r"must be a list.*fixed=\{'learning_rate'"),
        (ok.lion, {"learning_rate": ["a"]}, ValueError, "numbers"),
        (ok.lion, {"learning_rate": [True]}, ValueError, "numbers"),
        (ok.lion, {"learning_rate": [float("nan")]}, ValueError, "numbers"),
        (ok.lion, {"learning_rate": [optax.constant_schedule(1.0)]}, ValueError, "numbers"),
        (ok.lion, {"learning_rate": [0.1], "b1": [0.9, 1.5]}, ValueError, "b1 must be .* got 1.5"),
        (
            ok.lion,
            {"learning_rate": [0.1], "b1": [0.9, 0.8], "combine": "zip"},
            ValueError,
            "one length, got 1 learning_rate, 2 b1",
        ),
        (ok.lion, {"learning_rate": [0.1], "combine": "sum"}, ValueError, "combine must be one of"),
        (ok.lion, {"learning_rate": [0.1], "score_last": 0}, ValueError, "score_last"),
        (
            ok.lion,
            {"learning_rate": [0.1], "fixed": {"learning_rate": 0.1}},
            ValueError,
            "swept and in fixed",
        ),
        (ok.lion, {"learning_rate": [0.1], "fixed": {"b5": 0.1}}, TypeError, "no argument 'b5'"),
        (ok.wsd_schedule, {"peak_value": [0.1]}, TypeError, "is a schedule, not an optimizer"),
        (
            ok.fedhyper_client_local,
            {"learning_rate": [0.1]},
            ValueError,
            r"needs \['global_update'\].*extras=",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(factory, values, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        sweep(factory, loss_fn, PARAMS, BATCHES, **values)
    assert "\n" not in str(caught.value)


def test_a_factory_that_branches_on_a_swept_argument_is_named() -> None:
    def choosy(rate: Any) -> Any:
        return optax.sgd(rate) if rate > 1 else optax.adam(rate)

    with pytest.raises(TypeError, match="choosy needs to know rate when it is built"):
        sweep(choosy, loss_fn, PARAMS, BATCHES, rate=[0.1])


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        sweep(ok.lion, loss_fn, PARAMS, [], learning_rate=[0.1])


# --- the bar and the picture ---------------------------------------------------------------------


def test_the_bar_shows_the_lowest_loss(capsys) -> None:
    sweep(ok.lion, loss_fn, PARAMS, BATCHES, learning_rate=[1e-3, 1e-2], progress=True)
    shown = capsys.readouterr().out
    assert "2 settings" in shown
    assert "6/6" in shown
    assert "lowest loss" in shown


def test_the_bar_without_rich_names_the_pip_line(monkeypatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install rich"):
        sweep(ok.lion, loss_fn, PARAMS, BATCHES, learning_rate=[1e-3], progress=True)


def result(**changes: Any) -> SweepResult:
    settings = make_settings({"learning_rate": [1e-3, 1e-2, 1e-1], "b1": [0.8, 0.9]}, "product")
    scores = np.array([3.0, 4.0, 1.0, 2.0, np.nan, 5.0])
    return SweepResult(settings, scores[:, None], scores, np.isnan(scores), best_index=2, **changes)


def test_the_picture_has_a_line_for_each_choice_of_the_others() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ax = plot(result())
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert set(lines) == {"b1=0.8", "b1=0.9", "diverged", "best"}
    assert lines["b1=0.8"].get_xydata().tolist() == [[1e-3, 3.0], [1e-2, 1.0]]
    assert lines["b1=0.9"].get_ydata().tolist() == [4.0, 2.0, 5.0]
    assert lines["diverged"].get_xdata().tolist() == [1e-1]
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "learning_rate")
    again = plot(result(), "b1", ax=ax, log=False)
    assert again is ax
    assert ax.get_xscale() == "linear"
    with pytest.raises(ValueError, match=r"against must be one of \['learning_rate', 'b1'\]"):
        plot(result(), "rate")
    pyplot.close("all")


def test_the_picture_without_matplotlib_names_the_pip_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"optimkit.sweep.plot needs matplotlib: pip install"):
        plot(result())
