"""Metrics of continual learning on curves that can be read off."""

import jax.numpy as jnp
import numpy as np
import pytest

from optimkit.diagnostics import ContinualEval, continual_metrics, windowed_max_drop

NAN = float("nan")
CURVES = np.array([[0.5, NAN], [0.8, NAN], [0.2, 0.4], [NAN, NAN], [0.6, 0.9], [0.9, 0.7]])
TASKS = np.array([0, 0, 1, 1, 1, 0])


def test_a_gap_is_seen_and_passed_over_rows_change_nothing():
    found = continual_metrics(CURVES, TASKS, lca_beta=2)
    np.testing.assert_allclose(found["wf_per_task"][-1], [0.6, 0.2])
    np.testing.assert_allclose(found["wp_per_task"][-1], [0.7, 0.5])
    np.testing.assert_allclose(found["min_acc"], [NAN, NAN, 0.2, 0.2, 0.2, 0.7])
    np.testing.assert_allclose(found["wc_acc"], [0.5, 0.8, 0.3, 0.3, 0.55, 0.8])
    np.testing.assert_allclose(found["forg"], [NAN, NAN, 0.6, 0.6, 0.2, 0.2])
    np.testing.assert_allclose(found["lca_per_task"], [0.65, 0.65])
    without = continual_metrics(np.delete(CURVES, 3, 0), np.delete(TASKS, 3), lca_beta=2)
    np.testing.assert_array_equal(found["wf"][[0, 1, 2, 4, 5]], without["wf"])


def test_windows_shorten_the_fall_and_a_window_of_one_sees_none():
    x = np.array([[0.9], [0.7], [0.5], [0.6]])
    for window, fall in ((1, 0), (2, 0.2), (3, 0.4)):
        found = continual_metrics(x, np.zeros(4, int), forgetting_window=window)
        np.testing.assert_allclose(found["wf"][-1], fall, atol=1e-12)
        np.testing.assert_allclose(windowed_max_drop(x[:, 0], window)[-1], fall, rtol=1e-5)


def test_a_stream_says_what_the_batch_says_and_names_its_windows():
    watch = ContinualEval(2, forgetting_windows=(2, 10), plasticity_windows=(), lca_beta=2)
    for task, row in zip(TASKS, CURVES, strict=True):
        watch.update(task, row)
    found, batch = watch.compute(), continual_metrics(CURVES, TASKS, lca_beta=2)
    assert {"wf_2", "wf_10", "wf_2_per_task"} <= set(found)
    assert found["wf_10"] == batch["wf"][-1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: continual_metrics(CURVES[:0], TASKS[:0]), "holds no evaluation"),
        (lambda: continual_metrics(CURVES * NAN, TASKS), "holds no evaluation"),
        (lambda: continual_metrics(CURVES, TASKS[:2]), "accuracy must be"),
        (lambda: continual_metrics(CURVES, TASKS + 1), "current_task must be an integer from 0"),
        (lambda: continual_metrics(CURVES, TASKS, forgetting_window=0), "forgetting_windows must"),
        (lambda: continual_metrics(CURVES, TASKS, window_search="x"), "window_search must be"),
        (lambda: ContinualEval(2).compute(), "no accuracy of a task learned so far"),
        (lambda: ContinualEval(2).update(0, [0.5]), "accuracies must have shape"),
        (lambda: ContinualEval(0), "num_tasks must be an integer >= 1"),
        (lambda: windowed_max_drop(jnp.ones(()), 2), "x must have a time axis"),
        (lambda: windowed_max_drop(jnp.ones(3), 0), "window must be an integer >= 1"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
