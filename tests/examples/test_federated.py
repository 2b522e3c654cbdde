"""Clients with two digits each, in a very short form."""

import numpy as np
import pytest

from examples import digits, federated_digits


def test_no_client_has_data_like_the_others():
    given = federated_digits.problem(0)
    assert given.images.shape == (10, 118, 64)
    assert given.labels.shape == (10, 118)
    assert max(len(np.unique(labels)) for labels in given.labels) <= 4  # a piece may touch two
    again = federated_digits.problem(1)
    assert not np.array_equal(given.labels, again.labels)
    rows = {row.tobytes() for row in digits.load(0).train[0]}
    assert all(row.tobytes() in rows for row in given.images.reshape(-1, 64))


def test_methods_are_compared_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(federated_digits, "RATES", (0.001, 0.3))
    monkeypatch.setattr(federated_digits, "METHODS", ("SCAFFOLD-M",))
    found = federated_digits.compare(rounds=6, seeds=2)
    assert list(found) == [10, 3]
    for results in found.values():
        for result in results.values():
            assert result.test.shape == (2, 2, 6)
            assert result.best == 1
            assert result.test[1, :, -1].mean() < 80
    assert federated_digits.table(found).row_count == 1
    federated_digits.draw(found, tmp_path / "federated.png")
    assert (tmp_path / "federated.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["FedAvg", "FedAvg-M", "FedHyper"])
def test_the_other_methods_run(monkeypatch, name):
    monkeypatch.setattr(federated_digits, "RATES", (0.3,))
    assert federated_digits.train(name, 3, rounds=2, seeds=1).test.shape == (1, 1, 2)
