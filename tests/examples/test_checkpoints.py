import csv
import random
import shlex
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from examples.lm import report
from examples.lm.checkpoints import Stopped
from examples.lm.config import ConfigError, DivergedError, command
from examples.lm.train import Trainer, standard_hooks
from optimkit.checkpoint import Checkpoints
from tests.examples.helpers import run_python, small, start_python

# Everything that could get lost: two counts, resets between the checkpoints, spikes, a schedule.
FULL = small(
    optimizer="stable_spam",
    opt_args="reset_interval=5",
    learning_rate=1e-2,
    schedule="wsd_schedule",
    schedule_args="warmup_steps=2,stable_steps=6,decay_steps=4",
    spike_rate=0.1,
    checkpoint_every=4,
)


class Signal(report.Hook):
    """Sends this process a signal after some step."""

    def __init__(self, number, at):
        self.number, self.at = number, at

    def step(self, trainer, row):
        if row.step == self.at:
            signal.raise_signal(self.number)


def train(config, **changes):
    config = small(**{**vars(config), **changes})
    trainer = Trainer(config, hooks_of(config))
    trainer.run()
    return trainer


def hooks_of(config):
    """What the command line has, but for the picture, which takes longer than the run."""
    return [hook for hook in standard_hooks(config) if not isinstance(hook, report.Curves)]


def cells(folder, without=("step_time",)):
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def same_state(one, two):
    for a, b in zip(
        jax.tree.leaves((one.params, one.opt_state)),
        jax.tree.leaves((two.params, two.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train(FULL, out=str(folder)), folder


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of its folder, to be damaged or gone on with."""
    shutil.copytree(whole[1], tmp_path / "run")
    return tmp_path / "run"


# --- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_equals_one_that_was_not(whole, tmp_path, capsys, number):
    config = small(**{**vars(FULL), "out": str(tmp_path)})
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=rf"{number.name} after step 7") as caught:
        Trainer(config, [Signal(number, at=7), *hooks_of(config)]).run()
    assert caught.value.signal == number
    assert signal.getsignal(number) == before
    assert len(cells(tmp_path)) == 7

    resumed = train(FULL, out=str(tmp_path), resume=True)
    assert f"going on from step 7 of {tmp_path / 'checkpoints'}" in capsys.readouterr().out
    same_state(resumed, whole[0])
    assert cells(tmp_path) == cells(whole[1])
    assert [row.step for row in resumed.history.rows] == list(range(1, 13))
    assert resumed.history.val_loss == whole[0].history.val_loss


def test_rows_after_the_restored_step_are_made_again_not_doubled(whole, copied, capsys):
    shutil.rmtree(copied / "checkpoints" / "12")
    resumed = train(FULL, out=str(copied), resume=True)
    assert "going on from step 8" in capsys.readouterr().out
    assert cells(copied) == cells(whole[1])
    same_state(resumed, whole[0])


def test_a_finished_run_can_be_made_longer(whole, tmp_path):
    train(FULL, out=str(tmp_path), steps=5)
    longer = train(FULL, out=str(tmp_path), resume=True)
    same_state(longer, whole[0])
    again = train(FULL, out=str(tmp_path), resume=True)  # nothing is left to do
    same_state(again, longer)
    assert len(again.history.rows) == 12


def test_only_so_many_checkpoints_are_kept_and_the_last_step_has_one(tmp_path):
    train(FULL, out=str(tmp_path), keep=2, checkpoint_every=3, steps=10)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [9, 10]


def test_without_a_checkpoint_the_run_starts_from_the_beginning(whole, tmp_path, capsys):
    run = train(FULL, out=str(tmp_path), resume=True)
    assert "starting from the beginning" in capsys.readouterr().out
    same_state(run, whole[0])


def test_a_diverged_state_is_not_saved(tmp_path):
    with pytest.raises(DivergedError):
        train(small(learning_rate=1e30), out=str(tmp_path), checkpoint_every=1)
    rows = cells(tmp_path)
    assert rows[-1]["loss"] == "nan"
    finite = [int(row["step"]) for row in rows if row["gradient_norm"] != "nan"]
    assert Checkpoints(tmp_path / "checkpoints").steps() == finite


# --- damage --------------------------------------------------------------------------------------


def damage(folder, step):
    """Changes one bit in the largest file of a checkpoint."""
    files = [path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_damaged_checkpoints_are_skipped_with_a_message(whole, copied, capsys):
    damage(copied, 12)
    (copied / "checkpoints" / "8" / "_CHECKPOINT_METADATA").write_text("{")
    resumed = train(FULL, out=str(copied), resume=True)
    said = capsys.readouterr().out
    for step in (12, 8):
        assert f"skipped the checkpoint of step {step}, which is damaged" in said
    assert "going on from step 4" in said
    same_state(resumed, whole[0])
    assert cells(copied) == cells(whole[1])


def test_if_all_are_damaged_the_command_says_so_and_exits_with_2(copied):
    rows = cells(copied)
    for step in (4, 8, 12):
        damage(copied, step)
    config = small(**{**vars(FULL), "out": str(copied), "resume": True})
    done = run_python(*shlex.split(command(config))[1:])
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert any("error: --resume: every checkpoint in" in line for line in said)
    assert "(steps 4, 8, 12)" in done.stderr
    assert "ConfigError" not in done.stderr
    assert cells(copied) == rows


# --- wrong settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": "adamp", "opt_args": ""}, "--optimizer=stable_spam there and adamp here"),
        ({"opt_args": "reset_interval=6"}, "--opt_args"),
        ({"width": 64}, "--width=32 there and 64 here"),
        ({"seed": 1}, "--seed"),
        ({"spike_rate": 0.0}, "--spike_rate"),
        ({"steps": 8}, "--steps=8 is less than the 12 steps made"),
    ],
)
def test_a_changed_setting_is_refused_by_name(whole, changes, named):
    rows = cells(whole[1])
    with pytest.raises(ConfigError, match=named) as caught:
        train(FULL, out=str(whole[1]), resume=True, **changes)
    assert "\n" not in str(caught.value)
    assert cells(whole[1]) == rows


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"checkpoint_every": 4, "out": ""}, "--checkpoint_every: needs --out"),
        ({"resume": True, "out": "", "checkpoint_every": 0}, "--resume: needs --out"),
        ({"checkpoint_every": -1}, "--checkpoint_every: must be at least 1"),
        ({"keep": 0}, "keep"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        train(FULL, **{"out": str(tmp_path), **changes})


def test_a_new_run_does_not_mix_with_an_old_one(whole):
    rows = cells(whole[1])
    with pytest.raises(ConfigError, match=r"holds a run up to step 12: go on .*--resume"):
        train(FULL, out=str(whole[1]))
    assert cells(whole[1]) == rows


# --- a process that is stopped or killed ---------------------------------------------------------


def wait_for_rows(process, folder, count, within=120):
    """Returns when the process has made so many steps."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if process.poll() is not None:
            return
        path = folder / "metrics.csv"
        if path.exists() and path.read_text(encoding="utf-8").count("\n") > count:
            return
        time.sleep(0.01)
    process.kill()
    raise TimeoutError(f"no {count} rows within {within} s")


def test_ctrl_c_saves_and_prints_the_command_to_go_on_with(tmp_path):
    config = small(steps=100_000, out=str(tmp_path), checkpoint_every=1000)
    process = start_python(*shlex.split(command(config))[1:])
    wait_for_rows(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    made = Checkpoints(tmp_path / "checkpoints").latest()
    assert f"stopped by SIGINT after step {made}" in out
    assert len(cells(tmp_path)) == made
    resume = out.strip().splitlines()[-1]
    assert "--resume=True" in resume
    arguments = [a for a in shlex.split(resume)[1:] if "--steps" not in a]
    done = run_python(*arguments, f"--steps={made + 2}")
    assert done.returncode == 0, done.stderr
    assert f"going on from step {made}" in done.stdout
    assert len(cells(tmp_path)) == made + 2


def killed_again_and_again(folder, whole_folder, *, times, seed):
    """Kills a run at random moments until it is done; gives the steps that it went on from."""
    draw = random.Random(seed)
    config = small(**{**vars(FULL), "steps": 60, "checkpoint_every": 2, "schedule": "constant"})
    config = small(**{**vars(config), "schedule_args": "", "out": str(folder), "resume": True})
    arguments = shlex.split(command(config))[1:]
    made = 0
    for _ in range(times):
        process = start_python(*arguments)
        # Most of the time between two rows goes into saving.
        wait_for_rows(process, folder, made + draw.randint(1, 12))
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.communicate()
        rows = len(cells(folder))
        saved = Checkpoints(folder / "checkpoints").latest()
        # A row more than two steps after the newest checkpoint would be a step lost for nothing.
        assert rows - 2 <= (saved or 0) <= rows
        made = saved or 0
    done = run_python(*arguments)
    assert done.returncode == 0, done.stderr
    config = small(**{**vars(config), "out": str(whole_folder), "resume": False})
    whole = Trainer(config, hooks_of(config))
    whole.run()
    assert cells(folder) == cells(whole_folder)
    found = Checkpoints(folder / "checkpoints").restore_latest(
        params=whole.params, opt_state=whole.opt_state
    )
    assert found.step == 60
    for name, tree in found.trees.items():
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(getattr(whole, name)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_run_that_is_killed_three_times_ends_as_if_it_was_not(tmp_path):
    killed_again_and_again(tmp_path / "killed", tmp_path / "whole", times=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_run_that_is_killed_more_often_ends_as_if_it_was_not(tmp_path, seed):
    killed_again_and_again(tmp_path / "killed", tmp_path / "whole", times=8, seed=seed)
