"""The checkpoints of one training run: the newest few, and the way back to the newest whole one."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optimkit.checkpoint.folder import Restored, restore, write
from optimkit.checkpoint.schema import DamagedCheckpoint, prepare
from optimkit.numerics import check_count
from optimkit.protocols import PyTree

_TEMPORARY = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")
_log = logging.getLogger("optimkit.checkpoint")


def _everyone(fine: bool) -> bool:
    """Whether all processes say so: they must restore the same checkpoint."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


class Checkpoints:
    """The checkpoints of one training run, in one folder: ``<folder>/<step>``.

    A checkpoint appears under its name only when it is complete. A process that is killed while it
    saves leaves a temporary folder, which is ignored and which the next ``save`` removes. One run
    at a time may save into a folder; any number may read.

    Args:
      folder: where; it is created by the first ``save``.
      keep: how many to keep, >= 1. Each ``save`` removes the oldest beyond that number.

    >>> import tempfile, jax.numpy as jnp
    >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep=2)
    >>> for step in (10, 20, 30):
    ...     _ = checkpoints.save(step, params={"w": jnp.full(2, step)}, metadata={"batch": step})
    >>> checkpoints.steps(), checkpoints.latest()
    ([20, 30], 30)
    >>> found = checkpoints.restore_latest(params={"w": jnp.zeros(2, jnp.int32)})
    >>> found.step, found.trees["params"]["w"].tolist(), found.metadata
    (30, [30, 30], {'batch': 30})
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3):
        check_count(least=1, keep=keep)
        self.folder = Path(folder).absolute()
        self.keep = keep

    def save(
        self, step: int, *, metadata: Mapping[str, Any] | None = None, **trees: PyTree
    ) -> Path:
        """Writes the checkpoint of a step, replacing the one that has it, and removes the oldest.

        Args:
          step: >= 0.
          metadata: plain JSON.
          **trees: as in ``save``.

        Returns:
          Its folder.

        Raises:
          TypeError: for a leaf or metadata of another kind, naming it.
        """
        check_count(step=step)
        written = prepare(trees, metadata)
        path, primary = self.folder / str(step), jax.process_index() == 0
        replaced = path.with_name(f"{step}.replaced")
        if primary:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            if path.exists():  # it counts under this name until the new one is complete
                path.rename(replaced)
        write(path, *written)
        if primary:
            self._remove(replaced)
            # Later steps belong to a run that was given up, and must not push these out.
            for old in [s for s in self.steps() if s <= step][: -self.keep]:
                self._remove(self._path(old))
        return path

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending; it may still be damaged."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        found = (re.fullmatch(r"(0|[1-9]\d*)(\.replaced)?", name) for name in names)
        return sorted({int(match[1]) for match in found if match})

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int, **targets: PyTree) -> Restored:
        """Reads the checkpoint of a step; arguments and errors as in the function ``restore``."""
        return restore(self._path(step), targets)._replace(step=step)

    def restore_latest(self, **targets: PyTree) -> Restored | None:
        """Reads the newest checkpoint that is whole.

        A damaged one is skipped, with a warning in the log of ``optimkit.checkpoint`` and its
        reason in ``skipped``, and the one before is tried. One that does not fit the targets
        is an error, not a reason to go back.

        Returns:
          ``Restored(trees, metadata, step, skipped)``, or None if the folder has no checkpoint.

        Raises:
          DamagedCheckpoint: if there are checkpoints and all are damaged.
          CheckpointMismatch: as in the function ``restore``.
        """
        skipped: dict[int, str] = {}
        for step in reversed(self.steps()):
            found, reason = None, "another process could not read it"
            try:
                found = self.restore(step, **targets)
            except DamagedCheckpoint as error:
                reason = str(error)
            if _everyone(found is not None) and found is not None:
                return found._replace(skipped=skipped)
            skipped[step] = reason
            _log.warning("skipped the damaged checkpoint of step %d: %s", step, reason)
        if skipped:
            raise DamagedCheckpoint(
                f"all {len(skipped)} checkpoints in {self.folder} are damaged: "
                + "; ".join(f"step {step}: {reason}" for step, reason in skipped.items())
            )
        return None

    def _path(self, step: int) -> Path:
        path = self.folder / str(step)
        replaced = path.with_name(f"{step}.replaced")
        return replaced if replaced.exists() and not path.exists() else path

    def _clean(self) -> None:
        """Removes what a killed process has left."""
        for path in self.folder.iterdir():
            superseded = path.suffix == ".replaced" and path.with_suffix("").exists()
            if _TEMPORARY.fullmatch(path.name) or superseded:
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _remove(path: Path) -> None:
        """Removes a checkpoint in one step: renamed first, so that none is ever half removed."""
        if path.exists():
            doomed = path.with_name(path.name.split(".")[0] + ".deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
