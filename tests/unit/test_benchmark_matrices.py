"""The matrices table, as far as it needs no timing."""

from __future__ import annotations

import pytest

from optimkit.benchmark import matrices
from optimkit.benchmark.__main__ import main


def test_figures_are_held_against_their_limits():
    assert matrices.Figure("speed", 1.2, 1.0, at_least=True).verdict == "ok"
    assert matrices.Figure("speed", 0.9, 1.0, at_least=True).verdict == "under"
    assert matrices.Figure("memory", 9.0, 10.0).verdict == "ok"
    assert matrices.Figure("memory", 11.0, 10.0).verdict == "over"
    assert matrices.Figure("memory", 28.0).verdict == ""
    assert matrices.Figure("memory", 11.0, 10.0, unit="B").line().split()[-1] == "over"


def test_operations_are_the_usual_count():
    # square: 6 m^3 a step
    assert matrices.tree_flops(matrices.small_tree(2, 4)) == 2 * 5 * 6 * 4**3
    # four square ones and two of 4 x 16
    expected = 5 * (4 * 6 * 4**3 + 2 * (4 * 16 * 16 + 2 * 4**3))
    assert matrices.tree_flops(matrices.transformer_tree(1, 4)) == expected


def test_singular_values_stay_in_their_ranges():
    assert [f.line() for f in matrices.singular_values(12, 20) if f.verdict != "ok"] == []


def test_bad_input_is_refused_by_name():
    said = dict(matrices.bad_input())
    assert "accepted" not in said.values()
    assert "none is 'model'" in said["a mesh axis that does not exist"]


def test_the_command_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["matrices", "--help"])
    assert "--rounds" in capsys.readouterr().out
