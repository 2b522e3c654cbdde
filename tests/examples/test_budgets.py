"""The programs that measure: sweeps, budgets and finished models, each in a very short form."""

import numpy as np
import pytest

from examples import budgets, digits, sweep_digits
from examples.lm import finished_models
from examples.lm.report import mean_and_spread
from tests.examples.helpers import run_python


def test_the_digits_are_split_without_overlap_and_batches_cover_an_epoch():
    data = digits.load()
    sizes = [len(labels) for _, labels in data]
    assert sizes == [1197, 300, 300]
    seen = np.concatenate([images for images, _ in data.batches(18, seed=0)])
    assert seen.shape == (18 * 64, 64)
    rows = {row.tobytes() for row in data.train[0]}
    assert all(row.tobytes() in rows for row in seen)
    assert len(np.unique(seen, axis=0)) > 1100  # an epoch has no image twice, but for doubles
    again = next(iter(data.batches(1, seed=0)))
    np.testing.assert_array_equal(again[0], seen[:64])


def test_a_sweep_compiles_once_and_agrees_with_separate_runs(monkeypatch, tmp_path):
    values = {"learning_rate": [1e-3, 1e-2], "weight_decay": [0.1]}
    monkeypatch.setattr(sweep_digits, "VALUES", values)
    made = sweep_digits.compare(steps=4)
    assert made.again_compilations == 0
    assert made.separate_compilations >= 2
    assert made.apart < 1e-4
    cost, reached = sweep_digits.tables(made)
    assert cost.row_count == 3
    assert reached.row_count == 1
    sweep_digits.draw(made.together, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_has_its_own_length(monkeypatch):
    monkeypatch.setitem(budgets.OPTIMIZERS, "adam", (budgets.OPTIMIZERS["adam"][0], [0.01, 0.03]))
    short, long = budgets.measure("adam", "rex", [2, 20], seeds=2)
    assert short.losses.shape == short.errors.shape == (2,)
    assert long.losses.mean() < short.losses.mean()
    assert {short.rate, long.rate} <= {0.01, 0.03}


def test_the_budgets_are_printed_and_drawn(tmp_path):
    done = run_python("-m", "examples.budgets", "--steps=20", "--seeds=1", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "test images" in done.stdout
    assert (tmp_path / "budgets.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def plan():
    return finished_models.plan_of(10, 1e-2, seed=0)


@pytest.mark.parametrize(("arm", "updates"), [("wsd_s", 40), ("wsd branches", 36 + 1 + 2 + 4)])
def test_every_arm_has_a_model_at_every_budget(plan, arm, updates):
    outcome = finished_models.ARMS[arm](plan)
    losses = outcome.losses(plan.budgets)
    assert outcome.updates == updates
    assert np.isfinite(losses).all()
    assert losses[2] < losses[0]
    for history, budget in zip(outcome.finished, plan.budgets, strict=True):
        # The last update before a budget has the smallest rate of its decay.
        rates = history.column("rate")[budget - 3 : budget]
        assert rates[-1] == min(rates)


def test_mean_and_spread():
    assert mean_and_spread([1.0, 3.0], places=1) == "2.0±1.4"
    assert mean_and_spread([1.25], places=2) == "1.25"
