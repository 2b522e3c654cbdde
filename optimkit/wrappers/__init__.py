"""Transformations that take an ``inner`` one and change how or when it runs."""

from optimkit.wrappers.averagers import Averager as Averager
from optimkit.wrappers.averagers import sqrt_decay_weights as sqrt_decay_weights
from optimkit.wrappers.averagers import uniform_window_average as uniform_window_average
from optimkit.wrappers.averagers import weighted_running_average as weighted_running_average
from optimkit.wrappers.ema_params import ema_params as ema_params
from optimkit.wrappers.hybrid import SwitchCriterion as SwitchCriterion
from optimkit.wrappers.hybrid import loss_decrease_rate as loss_decrease_rate
from optimkit.wrappers.momentum_reset import reset_warmup_factor as reset_warmup_factor
from optimkit.wrappers.projectors import compute_projector as compute_projector
from optimkit.wrappers.refresh_projectors import refresh_projectors as refresh_projectors
