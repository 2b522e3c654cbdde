"""The catalog, the command line, and the names that are an API."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import optimkit as ok
from optimkit import catalog, cli, protocols
from optimkit.benchmark import step_cost
from optimkit.layout import named_leaves

SNAPSHOT = Path(__file__).parent / "state_fields.json"


def test_every_record_is_exported_flat_or_one_level_down() -> None:
    for name, record in catalog.records().items():
        package = record.factory.__module__.split(".")[1]
        home = ok if record.kind != "combiner" else getattr(ok, package, ok)
        assert getattr(home, name, getattr(ok, name, None)) is record.factory, name


def test_every_public_factory_has_a_record() -> None:
    helpers = {"averaged_params", "coso_end_task", "get_learning_rate", "inject_hyperparams",
               "wsd_branch", "schedule_free_eval_params",
               "schedule_free_train_params"}  # fmt: skip
    public = {n for n, f in vars(ok).items() if inspect.isfunction(f)} - helpers
    assert public <= set(catalog.records()), public - set(catalog.records())


def test_the_readme_names_every_method() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    missing = [name for name in catalog.records() if f"`{name}`" not in text]
    assert not missing


def test_records_name_real_arguments() -> None:
    for name, record in catalog.records().items():
        parameters = set(inspect.signature(record.factory).parameters)
        named = {*record.traced, *record.static, *record.example, *record.example_made}
        assert named <= parameters, f"{name}: {named - parameters}"
        assert not set(record.traced) & set(record.static), name


@pytest.mark.parametrize("name", catalog.records())
def test_docstrings_say_what_a_user_needs(name: str) -> None:
    text = inspect.getdoc(catalog.find(name).factory) or ""
    for part in ("Args:", "Returns:", ">>>"):
        assert part in text, f"{name} lacks {part!r}"


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(KeyError, match="no method is called 'adampp'; did you mean 'adamp'"):
        catalog.find("adampp")
    with pytest.raises(TypeError, match="lion has no argument 'learning_rat'; did you mean"):
        catalog.make("lion", learning_rat=1e-3)


def test_make_builds() -> None:
    tx = catalog.make("lion", learning_rate=0.5)
    params = jnp.ones(1)
    updates, _ = tx.update(jnp.ones(1), tx.init(params), params)
    assert float(updates[0]) == -0.5


def state_names() -> dict[str, list[str]]:
    """The names of every state leaf of every method's example, for a tree of one kernel."""
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}
    fields: dict[str, list[str]] = {}
    for name, record in catalog.records().items():
        if record.kind in ("recipe", "piece", "wrapper"):
            state = jax.eval_shape(record.build().init, params)
            fields[name] = [leaf for leaf, _ in named_leaves(state)]
    return fields


def test_state_fields_are_pinned() -> None:
    """Checkpoints hold these names: a change here is a change of format."""
    assert state_names() == json.loads(SNAPSHOT.read_text()), (
        "state names changed; if that is meant: python -m tests.unit.test_catalog"
    )


def test_command_line_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--kind", "recipe"]) == 0
    listed = capsys.readouterr().out
    assert "lion" in listed
    assert "wsd_schedule" not in listed
    assert cli.main(["show", "adamp"]) == 0
    assert "Slowing Down the Slowdown" in capsys.readouterr().out
    assert cli.main(["show", "adam_p"]) == 2
    assert "'adamp'" in capsys.readouterr().err


def test_step_cost_table_measures_state_and_ratio() -> None:
    adamw, lion = step_cost.table(["lion"], leaves=2, rounds=2, rows=64, columns=64)
    assert adamw.name == "optax.adamw"
    assert lion.state == pytest.approx(4, abs=0.1)
    assert lion.ratio > 0
    assert lion.allowed == pytest.approx(1.25 * 20 / 28)


def test_every_rule_has_a_sentence() -> None:
    assert len(protocols.RULES) == 10


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(state_names(), indent=1) + "\n")
