"""Tasks one after the other, in a very short form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import continual_digits as example
from examples import continual_report as report


def test_streams_hold_five_tasks_and_judge_with_other_images():
    for name, size in (("split", 254), ("permuted", 1197)):
        stream = example.load(name, 0)
        assert stream.images.shape == (5, size, 64)
        assert stream.labels.shape == (5, size)
        held_out = example.load(name, 0, validation=True).test_images
        rows = [{row.tobytes() for row in x[0]} for x in (*stream[::2], held_out)]
        assert len(set.union(*rows)) == sum(map(len, rows))
    pixels = np.sort(stream.images, axis=-1)
    assert np.array_equal(pixels[0], pixels[4])
    assert not np.array_equal(stream.images[0], stream.images[4])


@pytest.mark.parametrize("memory", ["none", "replay", "rehearsal"])
def test_batches_take_old_tasks_from_a_memory_of_a_hundred_images(memory):
    chosen = example.batches(memory, images=254, steps=200, seed=0)
    assert chosen.shape == (5, 200, 32 if memory == "none" else 64, 2)
    for task, picked in enumerate(chosen):
        whose, which = np.moveaxis(picked, -1, 0)
        assert set(np.unique(which)) <= set(range(254))
        assert set(np.unique(whose)) == ({task} if memory == "none" else set(range(task + 1)))
        old = {tuple(pair) for pair in picked[whose < task]}
        assert len(old) <= 100
    if memory == "rehearsal":  # as 1 to 1/2 to ... 1/5
        share = np.bincount(chosen[4, ..., 0].ravel()) / (200 * 64)
        assert share == pytest.approx(1 / np.arange(5, 0, -1) / (137 / 60), abs=0.02)


def test_gap_is_a_fall_soon_after_a_switch_and_what_returns():
    accuracy = np.full((1, 2, 30, 2), 0.5)
    accuracy[0, 0, -1, 0] = 0.9
    accuracy[0, 1, :, 0] = [0.3, *[0.7] * 29]
    assert report.gap(accuracy) == pytest.approx((0.6, 0.4))
    accuracy[0, 1, 25, 0] = 0.0  # too late to be a fall at the switch
    assert report.gap(accuracy) == pytest.approx((0.6, 0.4))


def test_methods_are_trained_compared_and_drawn(monkeypatch, tmp_path):
    kept = {name: example.METHODS[name] for name in ("SGD", "SGD, replay")}
    monkeypatch.setattr(example, "METHODS", kept)
    found = {name: example.train(name, "split", 40, (0,))[0] for name in kept}
    for accuracy in found.values():
        assert accuracy.shape == (1, 5, 40, 5)
        assert np.einsum("sktk->kt", accuracy)[:, -1].mean() > 0.9
    metrics = {name: report.metrics(accuracy) for name, accuracy in found.items()}
    assert metrics["SGD, replay"]["acc"] > metrics["SGD"]["acc"]
    assert len(report.claims("split", found)) == 1
    assert report.table("split", found, dict.fromkeys(found, 0.1)).row_count == 2
    report.draw({"split": found}, tmp_path / "continual.png")
    assert (tmp_path / "continual.png").read_bytes().startswith(b"\x89PNG")


def test_the_state_is_told_of_the_end_of_a_task(monkeypatch):
    def make(rate):  # moves for 30 steps, unless its count is reset
        return optax.scale_by_schedule(lambda count: jnp.where(jnp.asarray(count) < 30, -rate, 0.0))

    def learnt(**reset):
        method = example.Method(make, (), (0.1, 0.1), **reset)
        monkeypatch.setattr(example, "METHODS", {"stops": method})
        accuracy = example.train("stops", "split", 30, (0,))[0]
        return np.einsum("sktk->kt", accuracy)[:, -1]

    assert learnt()[1:].max() < 0.8
    assert learnt(end_task=lambda state: jax.tree.map(jnp.zeros_like, state)).min() > 0.8


def test_coso_learns_each_task():
    accuracy = example.train("CoSO", "permuted", 20, (0,))[0]
    assert np.einsum("sktk->kt", accuracy)[:, -1].min() > 0.6
