"""optimkit: the training-update methods of some seventy papers as composable optax transformations.

Whatever returns a gradient transformation or a schedule stands here; everything else is one level
down (``optimkit.multitask``, ``optimkit.layout``, ``optimkit.catalog`` ...).
"""

from optimkit.multitask.sam_gs import sam_gs_optimizer as sam_gs_optimizer
from optimkit.optimizers.adamp import adamp as adamp
from optimkit.optimizers.lion import lion as lion
from optimkit.optimizers.lion_k import lion_k as lion_k
from optimkit.optimizers.muon import muon as muon
from optimkit.optimizers.schedule_free import schedule_free_adamw as schedule_free_adamw
from optimkit.optimizers.schedule_free import schedule_free_radam as schedule_free_radam
from optimkit.optimizers.schedule_free import schedule_free_sgd as schedule_free_sgd
from optimkit.optimizers.sgdp import sgdp as sgdp
from optimkit.optimizers.spam import scale_by_spam as scale_by_spam
from optimkit.optimizers.spam import spam as spam
from optimkit.optimizers.stable_spam import stable_spam as stable_spam
from optimkit.protocols import MatrixAxes as MatrixAxes
from optimkit.schedules.cyclic import cyclic_cosine_schedule as cyclic_cosine_schedule
from optimkit.schedules.cyclic import wsd_s_schedule as wsd_s_schedule
from optimkit.schedules.linear import linear_decay_schedule as linear_decay_schedule
from optimkit.schedules.linear import scale_schedule as scale_schedule
from optimkit.schedules.one_cycle import one_cycle_schedule as one_cycle_schedule
from optimkit.schedules.rex import profile_schedule as profile_schedule
from optimkit.schedules.rex import rex_schedule as rex_schedule
from optimkit.schedules.sampling import sample_schedule as sample_schedule
from optimkit.schedules.wsd import wsd_branch as wsd_branch
from optimkit.schedules.wsd import wsd_schedule as wsd_schedule
from optimkit.schedules.wsd import wsdc_schedule as wsdc_schedule
from optimkit.transforms.adam import scale_by_adam as scale_by_adam
from optimkit.transforms.clip_spikes import clip_spikes as clip_spikes
from optimkit.transforms.decay_after_step import decay_after_step as decay_after_step
from optimkit.transforms.exponentiate_updates import exponentiate_updates as exponentiate_updates
from optimkit.transforms.gate_small_gradients import gate_small_gradients as gate_small_gradients
from optimkit.transforms.limit_norm_growth import limit_norm_growth as limit_norm_growth
from optimkit.transforms.lion import scale_by_lion as scale_by_lion
from optimkit.transforms.lion_k import scale_by_lion_k as scale_by_lion_k
from optimkit.transforms.matrix_shape import scale_by_matrix_shape as scale_by_matrix_shape
from optimkit.transforms.momentum import dampened_trace as dampened_trace
from optimkit.transforms.momentum import ema_momentum as ema_momentum
from optimkit.transforms.normalize_columns import normalize_columns as normalize_columns
from optimkit.transforms.normuon import scale_by_normuon as scale_by_normuon
from optimkit.transforms.orthogonal_to_params import orthogonal_to_params as orthogonal_to_params
from optimkit.transforms.orthogonalize import orthogonalize_updates as orthogonalize_updates
from optimkit.transforms.orthogonalize import scale_by_muon as scale_by_muon
from optimkit.transforms.project_to_norm import project_to_norm as project_to_norm
from optimkit.transforms.spike_score import track_spike_score as track_spike_score
from optimkit.transforms.suppress_outliers import suppress_outliers as suppress_outliers
from optimkit.transforms.tracked_max import clip_by_tracked_max as clip_by_tracked_max
from optimkit.transforms.tracked_norm import (
    normalize_by_tracked_norm as normalize_by_tracked_norm,
)
from optimkit.wrappers.by_kind import by_kind as by_kind
from optimkit.wrappers.inject import inject_hyperparams as inject_hyperparams
from optimkit.wrappers.momentum_reset import momentum_reset as momentum_reset
from optimkit.wrappers.radial import project_radial as project_radial
from optimkit.wrappers.schedule_free import schedule_free as schedule_free
from optimkit.wrappers.schedule_free_params import (
    schedule_free_eval_params as schedule_free_eval_params,
)
from optimkit.wrappers.schedule_free_params import (
    schedule_free_train_params as schedule_free_train_params,
)
from optimkit.wrappers.sparse_momentum import sparse_momentum as sparse_momentum

__version__ = "0.1.0"
