import csv
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from examples import compare, linen_digits
from examples.lm import report
from examples.lm.data import python_manual
from examples.lm.model import LanguageModel, ModelConfig
from examples.lm.train import (
    ConfigError,
    DivergedError,
    Trainer,
    parse_keywords,
    run,
    standard_hooks,
)
from optimkit import layout
from tests.examples.helpers import SMALL, run_python, small

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- the model -----------------------------------------------------------------------------------


def test_a_position_sees_only_itself_and_earlier_ones():
    model = LanguageModel(ModelConfig(width=32, depth=2, heads=2), rngs=nnx.Rngs(0))
    tokens = jnp.arange(2 * 8).reshape(2, 8)
    before, after = model(tokens), model(tokens.at[:, 5].set(200))
    assert before.shape == (2, 8, 256)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max()) > 1e-3


def test_attention_depends_on_the_order_of_the_bytes():
    model = LanguageModel(ModelConfig(width=32, depth=1, heads=2), rngs=nnx.Rngs(0))
    logits = model(jnp.array([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert float(jnp.abs(logits[0] - logits[1]).max()) > 1e-6


def test_leaves_are_named_and_shaped_as_the_matrix_rules_expect():
    model = LanguageModel(ModelConfig(width=32, depth=1, heads=2), rngs=nnx.Rngs(0))
    leaves = dict(layout.named_leaves(nnx.state(model, nnx.Param)))
    hidden = {name for name, leaf in leaves.items() if layout.is_hidden_matrix(name, leaf)}
    assert {name.split("/")[-2] for name in hidden} == set(PROJECTIONS)
    assert leaves["layers/0/mlp/up_proj/kernel"].shape == (32, 96)
    assert leaves["embed/embedding"].shape == (256, 32)
    assert leaves["lm_head/kernel"].shape == (32, 256)


def test_the_linear_layer_of_the_seven_projections_can_be_replaced():
    made = []

    def linear(inputs, outputs, **kwargs):
        made.append((inputs, outputs))
        return nnx.Linear(inputs, outputs, **kwargs)

    LanguageModel(ModelConfig(width=32, depth=2, heads=2), rngs=nnx.Rngs(0), linear=linear)
    assert made == 2 * (4 * [(32, 32)] + 2 * [(32, 96)] + [(96, 32)])


def test_with_qk_norm_the_size_of_queries_and_keys_does_not_matter():
    shape = ModelConfig(width=32, depth=1, heads=2, qk_norm=True)
    model = LanguageModel(shape, rngs=nnx.Rngs(0))
    tokens = jnp.arange(2 * 8).reshape(2, 8)
    before = model(tokens)
    projection = model.layers[0].attention.q_proj
    projection.kernel[...] = 1e3 * projection.kernel[...]
    np.testing.assert_allclose(model(tokens), before, atol=1e-3)
    assert model.layers[0].attention.q_norm.scale.shape == (16,)


@pytest.mark.parametrize("shape", [{"width": 30, "heads": 4}, {"depth": 0}])
def test_an_impossible_shape_is_refused(shape):
    with pytest.raises(ConfigError, match="heads"):
        Trainer(small(**shape))


# --- the data ------------------------------------------------------------------------------------


def text(seed=0, **sizes):
    return python_manual(**{"seq_len": 16, "batch_size": 4, **sizes}, seed=seed)


def test_a_batch_is_a_function_of_seed_and_step():
    first, again = text(), text()
    first.batch(0)  # what was drawn before does not matter
    np.testing.assert_array_equal(first.batch(7), again.batch(7))
    assert first.batch(7).shape == (4, 17)
    assert first.batch(7).dtype == np.int32
    assert not np.array_equal(first.batch(7), first.batch(8))
    assert not np.array_equal(first.batch(7), text(seed=1).batch(7))


def test_training_and_validation_bytes_are_apart():
    data = text()
    whole = np.concatenate([data.train, data.validation])
    assert len(data.validation) == pytest.approx(len(whole) / 10, abs=1)
    held_out = data.validation.tobytes()
    batches = data.validation_batches(3)
    assert len(batches) == 3
    for window in np.concatenate(batches):
        assert window.astype(np.uint8).tobytes() in held_out
    np.testing.assert_array_equal(batches[1], text(seed=5).validation_batches(3)[1])


def test_the_text_says_which_it_is():
    assert f"CPython {sys.version_info.major}.{sys.version_info.minor}" in text().source
    assert "sha256" in text().source


def test_a_sequence_longer_than_the_held_out_text_is_refused():
    with pytest.raises(ValueError, match="seq_len"):
        text(seq_len=10**6)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "opt_args", "rate", "state_bytes"),
    [
        ("adamw", "weight_decay=0.1", 1e-2, 8),
        ("lion", "b1=0.95,b2=0.98", 2e-3, 4),
        ("adamp", "b2=0.95", 1e-2, 8),
    ],
)
def test_the_loss_falls_and_the_files_are_written(
    tmp_path, capsys, optimizer, opt_args, rate, state_bytes
):
    config = small(optimizer=optimizer, opt_args=opt_args, learning_rate=rate, out=str(tmp_path))
    history = run(config, standard_hooks(config))
    loss = history.column("loss")
    assert loss[0] == pytest.approx(np.log(256), abs=0.2)
    assert loss[-1] < loss[0] - 0.5
    assert history.val_loss < loss[0] - 0.5
    assert history.bytes_per_parameter == pytest.approx(state_bytes, abs=0.01)
    assert f"{optimizer:<13} step 12/12  loss {loss[-1]:.3f}" in capsys.readouterr().out

    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "loss", "rate", "gradient_norm", "step_time", "val_loss"]
    assert [row["step"] for row in rows if row["val_loss"]] == ["5", "10", "12"]
    np.testing.assert_allclose([float(row["loss"]) for row in rows], loss)
    assert all(float(row["rate"]) == pytest.approx(rate) for row in rows)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_with_one_seed_agree_exactly_and_another_seed_differs():
    losses = [run(small(seed=seed)).column("loss").tolist() for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


class Keep(report.Hook):
    """Keeps the whole state of a run after some step."""

    def __init__(self, at):
        self.at = at

    def step(self, trainer, row):
        if row.step == self.at:
            self.kept = jax.tree.map(jnp.copy, (trainer.params, trainer.opt_state)), row.step


class GoOn(report.Hook):
    """Puts a kept state in place before the first step."""

    def __init__(self, kept):
        self.kept = kept

    def start(self, trainer):
        (trainer.params, trainer.opt_state), trainer.step = self.kept


def test_a_hook_can_stop_and_go_on_with_a_run():
    keep = Keep(at=5)
    whole = run(SMALL, [keep])
    rest = run(SMALL, [GoOn(keep.kept)])
    assert rest.column("step").tolist() == list(range(6, 13))
    assert rest.column("loss").tolist() == whole.column("loss")[5:].tolist()
    assert rest.val_loss == whole.val_loss


def test_the_schedule_drives_the_optimizer_and_is_reported():
    config = small(
        optimizer="lion",
        learning_rate=1e-3,
        schedule="wsd_schedule",
        schedule_args="warmup_steps=4,stable_steps=4,decay_steps=4,decay='linear'",
    )
    history = run(config)
    expected = [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(history.column("rate"), 1e-3 * np.array(expected), atol=1e-9)
    # The first two steps see different batches and, the first rate being zero, the same weights.
    still = run(dataclasses.replace(config, steps=2, learning_rate=0.0))
    np.testing.assert_allclose(still.column("loss"), history.column("loss")[:2], rtol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_files(tmp_path):
    config = small(learning_rate=1e30, out=str(tmp_path))
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step \d+.*learning_rate"):
        run(config, standard_hooks(config))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) >= 2
    assert (tmp_path / "curves.png").exists()


def test_two_devices_give_the_losses_of_one():
    code = (
        "from examples.lm.train import Config, run\n"
        f"c = {small(optimizer='adamp', learning_rate=1e-3)!r}\n"
        "import dataclasses, numpy as np\n"
        "one, two = (run(dataclasses.replace(c, mesh=m)) for m in ('data=1', 'data=2'))\n"
        "np.testing.assert_allclose(one.column('loss'), two.column('loss'), rtol=1e-5)\n"
        "np.testing.assert_allclose(one.val_loss, two.val_loss, rtol=1e-5)\n"
    )
    done = run_python("-c", code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.returncode == 0, done.stderr


# --- wrong settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adampp"}, "adampp.*did you mean 'adamp'"),
        ({"optimizer": "adamp", "opt_args": "weight_decy=0.1"}, "did you mean 'weight_decay'"),
        ({"opt_args": "weight_decy=0.1"}, "did you mean 'weight_decay'"),
        ({"optimizer": "adamp", "opt_args": "weight_decay=-1"}, "weight_decay"),
        ({"opt_args": "b1=__import__('os').getpid()"}, "cannot read"),
        ({"schedule": "wsd_scedule"}, "did you mean 'wsd_schedule'"),
        (
            {"schedule": "wsd_schedule", "schedule_args": "warmup_stps=1"},
            "did you mean 'warmup_steps'",
        ),
        ({"schedule_args": "decay=1"}, "constant takes no"),
        ({"mesh": "data=64"}, "needs 64 devices"),
        ({"mesh": "model=2"}, "data=N"),
        ({"steps": 0}, "steps"),
        ({"z_loss": -1.0}, "z_loss must not be negative"),
    ],
)
def test_a_wrong_setting_is_one_sentence(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Trainer(small(**changes))
    assert "\n" not in str(caught.value)


def test_the_command_line_prints_the_sentence_and_no_traceback():
    done = run_python("-m", "examples.lm.train", "--optimizer=lionn", "--steps=1")
    assert done.returncode == 2
    assert "did you mean 'lion'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("a=1,b='x,y',c=(1, 2.5),d=None", {"a": 1, "b": "x,y", "c": (1, 2.5), "d": None}),
        ("weight_decay=-1e-3", {"weight_decay": -1e-3}),
    ],
)
def test_keywords_are_literals(text, value):
    assert parse_keywords(text) == value


@pytest.mark.parametrize(
    "text", ["1", "a=b", "**{'a': 1}", "a=1)+f(b=2", "a=1).f(b=2", "a={[]: 1}", "a=1;b=2", "a=f()"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="write keywords"):
        parse_keywords(text)


def test_tensorboard_without_its_package_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="pip install tensorboardX"):
        standard_hooks(small(tensorboard=True))


# --- the other programs --------------------------------------------------------------------------


def test_the_digits_are_learned():
    losses, accuracy = linen_digits.train(epochs=4)
    assert losses[-1] < 0.3 * losses[0]
    assert accuracy > 0.9


def test_the_comparison_uses_the_best_rates_of_its_table():
    for entry in compare.ENTRIES:
        assert len(entry.tried) >= 3
        losses = [entry.tried[rate] for rate in sorted(entry.tried)]
        assert min(losses) < min(losses[0], losses[-1]), f"{entry.optimizer}: best at the edge"


def test_the_optimizers_are_compared_and_drawn(tmp_path, monkeypatch):
    full_size = compare.settings

    def reduced(*asked):
        config = full_size(*asked)
        names = ("steps", "learning_rate", "optimizer", "opt_args")
        return small(**{name: getattr(config, name) for name in names})

    monkeypatch.setattr(compare, "settings", reduced)
    histories = compare.compare(3)
    assert [len(history.rows) for history in histories.values()] == [3] * len(compare.ENTRIES)
    shown = Console(width=110, record=True)
    shown.print(compare.table(histories))
    text = shown.export_text()
    assert "bytes/param" in text
    assert all(entry.label in text for entry in compare.ENTRIES)
    compare.draw(histories, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_comparison_prints_its_table_and_draws_its_picture(tmp_path):
    done = run_python("-m", "examples.compare", "--steps=4", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    for entry in compare.ENTRIES:
        assert f"{entry.label:<13} step 4/4" in done.stdout
    assert "bytes/param" in done.stdout
    assert str(tmp_path / "compare.png") in done.stdout
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
