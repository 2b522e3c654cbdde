"""Checkpoints: parameters, optimizer state and data position, saved whole and restored whole.

Arrays are written by Orbax, with a schema beside them: a version, and the name, shape, dtype and
checksum of every leaf. What does not fit the target raises one error that says what differs; a
damaged checkpoint is found by its checksums. Orbax loads on first use, and nothing is pickled.
"""

from optimkit.checkpoint.averaging import average_checkpoints as average_checkpoints
from optimkit.checkpoint.averaging import average_saved as average_saved
from optimkit.checkpoint.averaging import checkpoint_weights as checkpoint_weights
from optimkit.checkpoint.averaging import decay_equivalent_weights as decay_equivalent_weights
from optimkit.checkpoint.folder import Restored as Restored
from optimkit.checkpoint.folder import restore as restore
from optimkit.checkpoint.folder import save as save
from optimkit.checkpoint.schema import SCHEMA_VERSION as SCHEMA_VERSION
from optimkit.checkpoint.schema import CheckpointError as CheckpointError
from optimkit.checkpoint.schema import CheckpointMismatch as CheckpointMismatch
from optimkit.checkpoint.schema import DamagedCheckpoint as DamagedCheckpoint
from optimkit.checkpoint.sequence import Checkpoints as Checkpoints
