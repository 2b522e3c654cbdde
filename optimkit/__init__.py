"""optimkit: the training-update methods of some seventy papers as composable optax transformations.

Whatever returns a gradient transformation or a schedule stands here; everything else is one level
down (``optimkit.multitask``, ``optimkit.layout``, ``optimkit.catalog`` ...).
"""

from optimkit.optimizers.adamp import adamp as adamp
from optimkit.optimizers.lion import lion as lion
from optimkit.protocols import MatrixAxes as MatrixAxes
from optimkit.transforms.adam import scale_by_adam as scale_by_adam
from optimkit.transforms.lion import scale_by_lion as scale_by_lion
from optimkit.transforms.tracked_max import clip_by_tracked_max as clip_by_tracked_max
from optimkit.wrappers.inject import inject_hyperparams as inject_hyperparams
from optimkit.wrappers.momentum_reset import momentum_reset as momentum_reset
from optimkit.wrappers.radial import project_radial as project_radial

__version__ = "0.1.0"
