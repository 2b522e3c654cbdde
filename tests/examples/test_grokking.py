"""Modular addition, in a short form that still shows the difference."""

import jax.numpy as jnp
import numpy as np

from examples import grokking


def test_every_sum_is_in_one_of_the_parts():
    parts = grokking.problem(modulus=5, share=0.4, seed=0)
    assert [len(part.labels) for part in parts] == [10, 15]
    inputs = np.concatenate([part.inputs for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    a, b = inputs[:, :5].argmax(1), inputs[:, 5:].argmax(1)
    np.testing.assert_array_equal((a + b) % 5, labels)
    assert len({*zip(a.tolist(), b.tolist(), strict=True)}) == 25


def test_the_share_along_the_weights():
    params = {"a": jnp.array([1.0, 0.0]), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(1)}
    np.testing.assert_allclose(grokking.share_along(grads, params), 9 / 25, rtol=1e-6)


def test_perpgrad_finds_the_rule_and_adamw_does_not(monkeypatch, tmp_path):
    kept = {name: grokking.METHODS[name] for name in ("AdamW", "perp_adamw")}
    monkeypatch.setattr(grokking, "METHODS", kept)
    found = grokking.compare(modulus=59, share=0.5, width=128, steps=160, every=10, seeds=1)
    assert grokking.reached(found["AdamW"]) == [None]
    assert found["AdamW"].train[0, -1] > 0.99
    assert found["AdamW"].test[0, -1] < 0.05
    (step,) = grokking.reached(found["perp_adamw"])
    assert step is not None
    assert grokking.table(found).row_count == 2
    grokking.draw(found, tmp_path / "grokking.png")
    assert (tmp_path / "grokking.png").read_bytes().startswith(b"\x89PNG")
