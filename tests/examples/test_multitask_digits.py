"""The multi-task example, tiny: it trains, reports every task, and draws."""

from __future__ import annotations

import numpy as np

from examples import multitask_digits as example


def test_tasks_are_trained_compared_and_drawn(monkeypatch, tmp_path, capsys):
    kept = {name: example.COMBINERS[name] for name in ("sum", "gradnorm")}
    monkeypatch.setattr(example, "COMBINERS", kept)
    picture = tmp_path / "tasks.png"
    found = example.main(["--steps=40", "--seeds=1", f"--picture={picture}"])
    assert list(found) == ["sum", "gradnorm"]
    start = np.asarray(example.losses_fn(example.init_params(0), example.digits.load().test))
    assert np.all(found["sum"] < start)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "parity" in capsys.readouterr().out
