"""The comparison of small states: which states are smaller, and that some train."""

import jax
import jax.numpy as jnp
import optax

from examples import low_memory
from tests.examples.helpers import SMALL

MASKED_OR_FACTORED = ("half of the weights", "factors, adamw", "factors, balanced")
"""A mask comes beside all moments; factors are fewer weights, not fewer bytes for each."""


def test_every_state_in_bits_or_in_a_subspace_is_smaller_than_adamws():
    # A hidden kernel of the model, and an embedding, which keeps whole moments.
    params = {
        "up_proj": {"kernel": jnp.zeros((128, 352))},
        "embed": {"embedding": jnp.zeros((8, 4))},
    }
    sizes = {}
    for entry in low_memory.ENTRIES:
        if entry.label not in MASKED_OR_FACTORED:
            tx = entry.make(optax.constant_schedule(1e-2))
            state = jax.eval_shape(tx.init, params)
            sizes[entry.label] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    whole = sizes.pop("adamw, f32")
    assert sizes
    assert all(size < whole for size in sizes.values()), sizes


def test_the_table_and_the_picture(tmp_path, monkeypatch):
    labels = ("adamw, f32", "factors, balanced")
    chosen = [entry for entry in low_memory.ENTRIES if entry.label in labels]
    monkeypatch.setattr(low_memory, "ENTRIES", chosen)
    small = ("batch_size", "seq_len", "width", "depth", "heads")
    changes = {name: getattr(SMALL, name) for name in small}
    histories = {e.label: low_memory.train(e, 3, e.learning_rate, **changes) for e in chosen}
    assert low_memory.table(histories, 3).row_count == 2
    low_memory.draw(histories, tmp_path / "low_memory.png")
    assert (tmp_path / "low_memory.png").read_bytes().startswith(b"\x89PNG")
