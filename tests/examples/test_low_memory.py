"""The comparison of small states: every optimizer keeps less than AdamW, and two train."""

import jax
import jax.numpy as jnp
import optax

from examples import low_memory
from tests.examples.helpers import SMALL


def test_every_entry_keeps_less_than_adamw():
    # A hidden kernel of the model, and an embedding, which keeps whole moments.
    params = {"up_proj": {"kernel": jnp.zeros((64, 96))}, "embed": {"embedding": jnp.zeros((8, 4))}}
    sizes = {}
    for entry in low_memory.ENTRIES:
        tx = entry.make(optax.constant_schedule(1e-2))
        sizes[entry.label] = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    whole = sizes.pop("adamw, f32")
    assert sizes
    assert all(size < whole for size in sizes.values()), sizes


def test_the_table_and_the_picture(tmp_path, monkeypatch):
    chosen = [e for e in low_memory.ENTRIES if e.label in ("adamw, f32", "adamw, dynamic8")]
    monkeypatch.setattr(low_memory, "ENTRIES", chosen)
    small = ("batch_size", "seq_len", "width", "depth", "heads")
    changes = {name: getattr(SMALL, name) for name in small}
    histories = {e.label: low_memory.train(e, 3, e.learning_rate, **changes) for e in chosen}
    assert low_memory.table(histories, 3).row_count == 2
    low_memory.draw(histories, tmp_path / "low_memory.png")
    assert (tmp_path / "low_memory.png").read_bytes().startswith(b"\x89PNG")
