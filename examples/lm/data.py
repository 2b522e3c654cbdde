"""Bytes of the Python manual that ships with CPython: real English text, and no download."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from pydoc_data import topics

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A text cut into a training and a validation part, and batches drawn from them.

    ``batch(step)`` depends on the seed and the step alone, so a run that is resumed at a step sees
    exactly the batches that it would have seen: the step is the whole data position.

    Attributes:
      train: bytes to train on, uint8.
      validation: bytes held out, uint8.
      seq_len: length of a sequence; a batch holds one byte more, the last target.
      batch_size: sequences in a batch.
      seed: chooses the order of the batches.
      source: one line that says which text this is, with its hash.
      digest: the hash of the whole text.
    """

    train: np.ndarray
    validation: np.ndarray
    seq_len: int
    batch_size: int
    seed: int
    source: str
    digest: str

    def batch(self, step: int) -> np.ndarray:
        """Training batch ``step``: int32 ``(batch_size, seq_len + 1)`` at random places."""
        draw = np.random.default_rng([self.seed, step])
        starts = draw.integers(0, len(self.train) - self.seq_len, size=self.batch_size)
        return _windows(self.train, starts, self.seq_len)

    def validation_batches(self, count: int = 8) -> list[np.ndarray]:
        """The same ``count`` batches every time, spread evenly over the held-out text."""
        last = len(self.validation) - self.seq_len - 1
        starts = np.linspace(0, last, count * self.batch_size).astype(np.int64)
        return [_windows(self.validation, starts[i::count], self.seq_len) for i in range(count)]


def _windows(text: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def python_manual(*, seq_len: int, batch_size: int, seed: int) -> Text:
    """The topics of ``pydoc_data.topics`` in sorted order; the last tenth is for validation.

    The text changes with the Python version, so losses compare only between runs that print the
    same hash. The last topics are a little easier than the rest: expect a validation loss below the
    training loss.

    Raises:
      ValueError: if the sequence is longer than the held-out text, or a size is below 1.
    """
    joined = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode("utf-8")
    split = len(joined) * 9 // 10
    if not 1 <= seq_len < len(joined) - split or batch_size < 1:
        raise ValueError(
            f"seq_len must be in [1, {len(joined) - split}) and batch_size at least 1, "
            f"got {seq_len} and {batch_size}"
        )
    data = np.frombuffer(joined, np.uint8)
    digest = hashlib.sha256(joined).hexdigest()[:16]
    source = (
        f"pydoc_data.topics of CPython {platform.python_version()}: {len(topics.topics)} topics, "
        f"{len(joined):,} bytes, sha256 {digest}"
    )
    return Text(data[:split], data[split:], seq_len, batch_size, seed, source, digest)
