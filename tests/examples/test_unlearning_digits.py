"""A digit is forgotten, in a very short form."""

import numpy as np

from examples import unlearning_digits as example


def test_training_data_are_divided_by_the_digit():
    given = example.problem(digit=3, seed=0)
    assert set(given.forget[1]) == set(given.held_out_forget[1]) == {3}
    assert 3 not in given.retain[1]
    assert 3 not in given.held_out_retain[1]
    assert len(given.retain[1]) + len(given.forget[1]) == len(given.train[1]) == 1197
    assert sum(len(labels) for _, labels in example.batches(given.forget)) == len(given.forget[1])


def test_the_digit_is_forgotten_and_the_others_are_not(monkeypatch, tmp_path):
    monkeypatch.setattr(example, "ALPHAS", (2.0, 1e9))
    monkeypatch.setattr(example, "DAMPENED", {example.BATCHES: 10.0})
    monkeypatch.setattr(example, "SWEPT", (example.BATCHES,))
    monkeypatch.setattr(example, "METHODS", example.METHODS[:4])
    runs = [example.compare(digit=3, seed=0, epochs=30, tuning=1)]
    before, retrained, _, dampened = (runs[0][name] for name in example.METHODS)
    assert before.forget > 0.9
    assert dampened.forget < 0.05
    assert retrained.forget < 0.05
    assert dampened.retain > before.retain - 0.05
    assert dampened.member_losses.mean() > 100 * before.member_losses.mean()
    # Alpha of a billion dampens nothing.
    np.testing.assert_allclose(
        runs[0]["sweep dampened"][1], [before.retain, before.forget, 0], atol=1e-6
    )
    assert example.table(runs, 3).row_count == 4
    example.draw(runs, 3, tmp_path / "unlearning.png")
    assert (tmp_path / "unlearning.png").read_bytes().startswith(b"\x89PNG")
