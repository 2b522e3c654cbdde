"""One main line, several finished models: ``--branch-from``, ``--cooldown`` and ``--extend``."""

import shlex
import shutil

import jax
import numpy as np
import pytest

from examples.lm.branches import folder_of, resolved
from examples.lm.config import ConfigError, command, underscored
from examples.lm.train import Trainer
from optimkit.checkpoint import Checkpoints
from tests.examples.helpers import run_python, small, start_python
from tests.examples.test_checkpoints import cells, hooks_of, same_state, wait_for_rows

PEAK = 1e-2
LINE = small(
    learning_rate=PEAK,
    schedule="wsd_schedule",
    schedule_args="warmup_steps=2,stable_steps=1e9,decay_steps=0,decay='linear'",
    steps=8,
    checkpoint_every=4,
    keep=10,
)


def changed(config, **changes):
    return small(**{**vars(config), **changes})


def train(config, **changes):
    config = changed(config, **changes)
    trainer = Trainer(config, hooks_of(config))
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A main line of eight steps with two checkpoints; copy it to write into it."""
    folder = tmp_path_factory.mktemp("line")
    train(LINE, out=str(folder))
    return folder


@pytest.fixture
def copied(line, tmp_path):
    shutil.copytree(line, tmp_path / "run")
    return tmp_path / "run"


# --- branches ------------------------------------------------------------------------------------


def test_a_branch_equals_a_run_with_that_decay_from_the_start(copied, capsys):
    branch = train(LINE, out=str(copied), branch_from=4, cooldown=4)
    assert "branching from step 4" in capsys.readouterr().out
    whole = train(
        LINE,
        schedule_args="warmup_steps=2,stable_steps=2,decay_steps=4,decay='linear'",
        checkpoint_every=0,
    )
    same_state(branch, whole)
    folder = copied / "branch_4_4"
    assert [int(row["step"]) for row in cells(folder)] == list(range(1, 9))
    rates = [float(row["rate"]) / PEAK for row in cells(folder)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25], atol=1e-6)
    assert Checkpoints(folder / "checkpoints").steps() == [4 + 4]
    assert Checkpoints(copied / "checkpoints").steps() == [4, 8]  # the main line is untouched


def test_one_line_gives_models_at_several_budgets_and_goes_on(copied, capsys):
    first = train(LINE, out=str(copied), branch_from=8, cooldown=2)
    longer = train(LINE, out=str(copied), extend=4)
    assert longer.step == 12
    assert "extending from step 8 to 12" in capsys.readouterr().out
    whole = train(LINE, steps=12, checkpoint_every=0)
    same_state(longer, whole)
    second = train(LINE, out=str(copied), branch_from=12, cooldown=3)
    assert (first.step, second.step) == (10, 15)
    assert sorted(path.name for path in copied.glob("branch_*")) == ["branch_12_3", "branch_8_2"]
    again = train(LINE, out=str(copied), branch_from=4, cooldown=1)
    assert again.step == 5


def test_a_constant_main_line_branches_too(tmp_path):
    constant = {"schedule": "constant", "schedule_args": "", "out": str(tmp_path)}
    train(LINE, **constant, steps=4)
    branch = train(LINE, **constant, branch_from=4, cooldown=4)
    rates = branch.history.column("rate") / PEAK
    np.testing.assert_allclose(rates[4:], 1 - np.sqrt(np.arange(4) / 4), rtol=1e-5)


def test_a_stopped_branch_goes_on(copied):
    branch = {"out": str(copied), "branch_from": 8, "cooldown": 6}
    whole = train(LINE, **branch)
    shutil.rmtree(copied / "branch_8_6" / "checkpoints" / "14")
    resumed = train(LINE, **branch, resume=True, checkpoint_every=0)
    same_state(resumed, whole)
    # Killed before its first checkpoint, it starts from the main line again.
    shutil.rmtree(copied / "branch_8_6" / "checkpoints")
    same_state(train(LINE, **branch, resume=True, checkpoint_every=0), whole)


def test_a_killed_branch_ends_as_if_it_was_not(copied):
    config = changed(LINE, out=str(copied), branch_from=4, cooldown=20, checkpoint_every=4)
    folder = folder_of(config)
    process = start_python(*shlex.split(command(config))[1:])
    wait_for_rows(process, folder, 4 + 7)  # the main line's rows, and some of its own
    process.kill()
    process.communicate()
    made = len(cells(folder))
    saved = Checkpoints(folder / "checkpoints").latest()
    assert saved is not None
    assert made - 4 <= saved <= made
    done = run_python(*shlex.split(command(changed(config, resume=True)))[1:])
    assert done.returncode == 0, done.stderr
    assert f"going on from step {saved}" in done.stdout
    assert str(folder / "metrics.csv") in done.stdout
    whole = train(config, out=str(copied), checkpoint_every=0)
    found = Checkpoints(folder / "checkpoints").restore_latest(params=whole.params)
    assert found is not None
    assert found.step == 24
    for a, b in zip(
        jax.tree.leaves(found.trees["params"]), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- wrong settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_from": 6, "cooldown": 2}, r"step 6 is not saved in .*, which has 4, 8"),
        ({"branch_from": 4}, "go together, got 4 and 0"),
        ({"cooldown": 4}, "go together, got 0 and 4"),
        ({"branch_from": -4, "cooldown": 4}, "--branch_from must not be negative, got -4"),
        ({"branch_from": 4, "cooldown": -4}, "--cooldown must not be negative, got -4"),
        ({"extend": -1}, "--extend must not be negative, got -1"),
        ({"branch_from": 4, "cooldown": 4, "extend": 4}, "takes no --branch_from"),
        ({"branch_from": 4, "cooldown": 4, "out": ""}, "need --out"),
        ({"extend": 4, "out": ""}, "need --out"),
        ({"branch_from": 4, "cooldown": 4, "seed": 1}, "--branch_from: .*--seed=0 there and 1"),
        (
            {"branch_from": 4, "cooldown": 4, "schedule": "rex_schedule",
             "schedule_args": "transition_steps=9"},
            "main line with --schedule=constant or wsd_schedule, got rex_schedule",
        ),
        (
            {"branch_from": 4, "cooldown": 4,
             "schedule_args": "warmup_steps=6,stable_steps=9,decay_steps=0"},
            "--branch_from: trunk_step must be an integer >= 6, got 4",
        ),
        (
            {"branch_from": 8, "cooldown": 4,
             "schedule_args": "warmup_steps=2,stable_steps=4,decay_steps=0"},
            "--branch_from: trunk_step must be <= 6, got 8",
        ),
        (
            {"schedule": "wsd_s_schedule", "schedule_args": "budgets=[8, 4],end_value=1e-3"},
            r"--schedule: budgets must be increasing integers above 0, got \[8, 4\]",
        ),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(line, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train(LINE, **{"out": str(line), "checkpoint_every": 0, **changes})
    assert "\n" not in str(caught.value)


def test_a_branch_of_a_folder_without_a_run_says_so(tmp_path):
    for changes, message in (
        ({"branch_from": 4, "cooldown": 4}, "which has none"),
        ({"extend": 4}, "no saved run"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(LINE, out=str(tmp_path), **changes)


def test_a_line_that_has_decayed_to_zero_is_not_extended(tmp_path):
    decayed = {"schedule_args": "warmup_steps=1,stable_steps=1,decay_steps=2", "steps": 4}
    train(LINE, out=str(tmp_path), **decayed)
    with pytest.raises(ConfigError, match="--extend: wsd_schedule is 0 from step 4 to 7"):
        train(LINE, out=str(tmp_path), **decayed, extend=3)


def test_resolved_settings_stay_as_they_are(line):
    branch = resolved(changed(LINE, out=str(line), branch_from=4, cooldown=3))
    assert branch.steps == 7
    longer = resolved(changed(LINE, out=str(line), extend=5))
    assert (longer.steps, longer.resume, longer.extend) == (13, True, 0)
    for config in (branch, longer):
        assert resolved(config) == config


def test_the_command_line_takes_hyphens_and_names_the_saved_steps(line):
    config = changed(LINE, out=str(line), checkpoint_every=0)
    arguments = [*shlex.split(command(config))[1:], "--branch-from", "6", "--cooldown", "2"]
    done = run_python(*arguments)
    assert done.returncode == 2
    assert "which has 4, 8" in done.stderr
    assert "Traceback" not in done.stderr
    assert underscored(["x", "--a-b", "-1", "--c-d=e-f", "--"]) == [
        "x", "--a_b", "-1", "--c_d=e-f", "--"
    ]  # fmt: skip
