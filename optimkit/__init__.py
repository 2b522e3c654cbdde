"""optimkit: the training-update methods of some seventy papers as composable optax transformations.

Whatever returns a gradient transformation or a schedule stands here; everything else is one level
down (``optimkit.multitask``, ``optimkit.layout``, ``optimkit.catalog`` ...).
"""

from optimkit.multitask.sam_gs import sam_gs_optimizer as sam_gs_optimizer
from optimkit.optimizers.adabelief import adabelief as adabelief
from optimkit.optimizers.adamp import adamp as adamp
from optimkit.optimizers.adamw_8bit import adamw_8bit as adamw_8bit
from optimkit.optimizers.adan import adan as adan
from optimkit.optimizers.adaptive_memory import am_adamw as am_adamw
from optimkit.optimizers.adaptive_memory import am_sgd as am_sgd
from optimkit.optimizers.apollo import apollo as apollo
from optimkit.optimizers.apollo import apollo_mini as apollo_mini
from optimkit.optimizers.apollo import scale_by_apollo as scale_by_apollo
from optimkit.optimizers.auon import auon as auon
from optimkit.optimizers.auon import hybrid_auon as hybrid_auon
from optimkit.optimizers.classp import classp as classp
from optimkit.optimizers.coso import coso as coso
from optimkit.optimizers.coso import coso_end_task as coso_end_task
from optimkit.optimizers.curl_descent import curl_descent as curl_descent
from optimkit.optimizers.dale_langevin import dale_langevin as dale_langevin
from optimkit.optimizers.diffgrad import diffgrad as diffgrad
from optimkit.optimizers.drift_adjusted_sgd import drift_adjusted_sgd as drift_adjusted_sgd
from optimkit.optimizers.exponentiated_gradient import adamw_eg as adamw_eg
from optimkit.optimizers.exponentiated_gradient import (
    exponentiated_gradient as exponentiated_gradient,
)
from optimkit.optimizers.exponentiated_gradient import (
    sign_constrained_sgd as sign_constrained_sgd,
)
from optimkit.optimizers.fedhyper import fedhyper_client_local as fedhyper_client_local
from optimkit.optimizers.fira import fira as fira
from optimkit.optimizers.galore import galore as galore
from optimkit.optimizers.gradient_regularized_newton import (
    gradient_regularized_newton as gradient_regularized_newton,
)
from optimkit.optimizers.gradient_regularized_newton import (
    normalized_gradient_search as normalized_gradient_search,
)
from optimkit.optimizers.gradnormlorp import gradnormlorp as gradnormlorp
from optimkit.optimizers.gradnormlorp import weight_norm_adam as weight_norm_adam
from optimkit.optimizers.hypergradient import adam_hd as adam_hd
from optimkit.optimizers.hypergradient import sgd_hd as sgd_hd
from optimkit.optimizers.lamb import lamb as lamb
from optimkit.optimizers.lion import lion as lion
from optimkit.optimizers.lion_k import lion_k as lion_k
from optimkit.optimizers.mkor import mkor as mkor
from optimkit.optimizers.mkor import mkor_h as mkor_h
from optimkit.optimizers.muon import muon as muon
from optimkit.optimizers.perp_grad import perp_adamw as perp_adamw
from optimkit.optimizers.perp_grad import perp_sgd as perp_sgd
from optimkit.optimizers.root import root as root
from optimkit.optimizers.scale_sgd import scale_sgd as scale_sgd
from optimkit.optimizers.schedule_free import schedule_free_adamw as schedule_free_adamw
from optimkit.optimizers.schedule_free import schedule_free_radam as schedule_free_radam
from optimkit.optimizers.schedule_free import schedule_free_sgd as schedule_free_sgd
from optimkit.optimizers.sgd_sai import sgd_sai as sgd_sai
from optimkit.optimizers.sgdp import sgdp as sgdp
from optimkit.optimizers.snr_sgd import snr_sgd as snr_sgd
from optimkit.optimizers.spam import scale_by_spam as scale_by_spam
from optimkit.optimizers.spam import spam as spam
from optimkit.optimizers.stable_spam import stable_spam as stable_spam
from optimkit.protocols import MatrixAxes as MatrixAxes
from optimkit.schedules.batch_scaling import scale_lr_for_batch as scale_lr_for_batch
from optimkit.schedules.batch_scaling import stretch_schedule as stretch_schedule
from optimkit.schedules.cyclic import cyclic_cosine_schedule as cyclic_cosine_schedule
from optimkit.schedules.cyclic import wsd_s_schedule as wsd_s_schedule
from optimkit.schedules.damped_cosine import damped_cosine_schedule as damped_cosine_schedule
from optimkit.schedules.fine_tuning import moderate_decay_schedule as moderate_decay_schedule
from optimkit.schedules.fine_tuning import (
    slow_start_fast_decay_schedule as slow_start_fast_decay_schedule,
)
from optimkit.schedules.infinite import anneal_from as anneal_from
from optimkit.schedules.infinite import infinite_cosine_schedule as infinite_cosine_schedule
from optimkit.schedules.infinite import infinite_linear_schedule as infinite_linear_schedule
from optimkit.schedules.infinite import infinite_rsqrt_schedule as infinite_rsqrt_schedule
from optimkit.schedules.linear import linear_decay_schedule as linear_decay_schedule
from optimkit.schedules.linear import scale_schedule as scale_schedule
from optimkit.schedules.one_cycle import one_cycle_schedule as one_cycle_schedule
from optimkit.schedules.power import exponential_cooldown as exponential_cooldown
from optimkit.schedules.power import power_schedule as power_schedule
from optimkit.schedules.quick_recovery import (
    cosine_quick_recovery_schedule as cosine_quick_recovery_schedule,
)
from optimkit.schedules.refined import refined_schedule as refined_schedule
from optimkit.schedules.rewarm import rewarm_schedule as rewarm_schedule
from optimkit.schedules.rex import profile_schedule as profile_schedule
from optimkit.schedules.rex import rex_schedule as rex_schedule
from optimkit.schedules.sampling import sample_schedule as sample_schedule
from optimkit.schedules.uba import uba_cycles as uba_cycles
from optimkit.schedules.uba import uba_schedule as uba_schedule
from optimkit.schedules.wsd import wsd_branch as wsd_branch
from optimkit.schedules.wsd import wsd_schedule as wsd_schedule
from optimkit.schedules.wsd import wsdc_schedule as wsdc_schedule
from optimkit.transforms.adam import scale_by_adam as scale_by_adam
from optimkit.transforms.adan import scale_by_adan as scale_by_adan
from optimkit.transforms.adaptive_memory import (
    scale_by_adaptive_memory as scale_by_adaptive_memory,
)
from optimkit.transforms.belief import scale_by_belief as scale_by_belief
from optimkit.transforms.belief import scale_by_rectified_belief as scale_by_rectified_belief
from optimkit.transforms.bias_correction import (
    scale_by_bias_correction as scale_by_bias_correction,
)
from optimkit.transforms.classp import scale_by_classp as scale_by_classp
from optimkit.transforms.clip_spikes import clip_spikes as clip_spikes
from optimkit.transforms.cosh_rms import scale_by_cosh_rms as scale_by_cosh_rms
from optimkit.transforms.decay_after_step import decay_after_step as decay_after_step
from optimkit.transforms.diffgrad import gradient_friction as gradient_friction
from optimkit.transforms.diffgrad import scale_by_diffgrad as scale_by_diffgrad
from optimkit.transforms.drift import scale_by_drift as scale_by_drift
from optimkit.transforms.exponentiate_updates import exponentiate_updates as exponentiate_updates
from optimkit.transforms.fedhyper import fedhyper_global as fedhyper_global
from optimkit.transforms.fedhyper_client import (
    scale_by_fedhyper_client as scale_by_fedhyper_client,
)
from optimkit.transforms.flip_signs import flip_signs as flip_signs
from optimkit.transforms.gate_small_gradients import gate_small_gradients as gate_small_gradients
from optimkit.transforms.gradient_disorder import track_gradient_disorder as track_gradient_disorder
from optimkit.transforms.independent_weight_decay import (
    independent_weight_decay as independent_weight_decay,
)
from optimkit.transforms.init_snr import scale_by_init_snr as scale_by_init_snr
from optimkit.transforms.keep_signs import keep_signs as keep_signs
from optimkit.transforms.last_layer_momentum import last_layer_momentum as last_layer_momentum
from optimkit.transforms.limit_norm_growth import limit_norm_growth as limit_norm_growth
from optimkit.transforms.lion import scale_by_lion as scale_by_lion
from optimkit.transforms.lion_k import scale_by_lion_k as scale_by_lion_k
from optimkit.transforms.matrix_shape import scale_by_matrix_shape as scale_by_matrix_shape
from optimkit.transforms.mkor import scale_by_mkor as scale_by_mkor
from optimkit.transforms.momentum import dampened_trace as dampened_trace
from optimkit.transforms.momentum import ema_momentum as ema_momentum
from optimkit.transforms.multiplicative_noise import (
    multiplicative_gradient_noise as multiplicative_gradient_noise,
)
from optimkit.transforms.mup import mup_simple as mup_simple
from optimkit.transforms.mup import scale_by_mup as scale_by_mup
from optimkit.transforms.normalize_columns import normalize_columns as normalize_columns
from optimkit.transforms.normuon import scale_by_normuon as scale_by_normuon
from optimkit.transforms.orthogonal_to_params import orthogonal_to_params as orthogonal_to_params
from optimkit.transforms.orthogonalize import orthogonalize_updates as orthogonalize_updates
from optimkit.transforms.orthogonalize import scale_by_muon as scale_by_muon
from optimkit.transforms.project_scale_offset import project_scale_offset as project_scale_offset
from optimkit.transforms.project_to_norm import project_to_norm as project_to_norm
from optimkit.transforms.proximal_decay import apply_proximal_decay as apply_proximal_decay
from optimkit.transforms.record_norms import record_gradient_norms as record_gradient_norms
from optimkit.transforms.regularize_gradient import regularize_gradient as regularize_gradient
from optimkit.transforms.snr import scale_by_snr as scale_by_snr
from optimkit.transforms.spike_score import track_spike_score as track_spike_score
from optimkit.transforms.suppress_outliers import suppress_outliers as suppress_outliers
from optimkit.transforms.track_update_spectrum import track_update_spectrum as track_update_spectrum
from optimkit.transforms.tracked_max import clip_by_tracked_max as clip_by_tracked_max
from optimkit.transforms.tracked_norm import (
    normalize_by_tracked_norm as normalize_by_tracked_norm,
)
from optimkit.transforms.tract import tract_precondition as tract_precondition
from optimkit.transforms.trust_ratio import scale_to_weight_norm as scale_to_weight_norm
from optimkit.wrappers.accumulate import accumulate as accumulate
from optimkit.wrappers.averaging import averaged_params as averaged_params
from optimkit.wrappers.averaging import with_averaged_params as with_averaged_params
from optimkit.wrappers.by_kind import by_kind as by_kind
from optimkit.wrappers.dynamic_sparse import dynamic_sparse as dynamic_sparse
from optimkit.wrappers.gradient_regularized_lora import (
    gradient_regularized_lora as gradient_regularized_lora,
)
from optimkit.wrappers.hybrid import hybrid as hybrid
from optimkit.wrappers.hypergradient import get_learning_rate as get_learning_rate
from optimkit.wrappers.hypergradient import hypergradient as hypergradient
from optimkit.wrappers.inject import inject_hyperparams as inject_hyperparams
from optimkit.wrappers.lanczos_learning_rate import lanczos_learning_rate as lanczos_learning_rate
from optimkit.wrappers.momentum_reset import momentum_reset as momentum_reset
from optimkit.wrappers.normalize_and_project import normalize_and_project as normalize_and_project
from optimkit.wrappers.project_low_rank import project_low_rank as project_low_rank
from optimkit.wrappers.project_out import project_out as project_out
from optimkit.wrappers.quantize_state import quantize_state as quantize_state
from optimkit.wrappers.radial import project_radial as project_radial
from optimkit.wrappers.refactorized import refactorized as refactorized
from optimkit.wrappers.sam import sam as sam
from optimkit.wrappers.schedule_free import schedule_free as schedule_free
from optimkit.wrappers.schedule_free_params import (
    schedule_free_eval_params as schedule_free_eval_params,
)
from optimkit.wrappers.schedule_free_params import (
    schedule_free_train_params as schedule_free_train_params,
)
from optimkit.wrappers.skip_bad_steps import skip_bad_steps as skip_bad_steps
from optimkit.wrappers.snr_learning_rate import snr_learning_rate as snr_learning_rate
from optimkit.wrappers.sparse_momentum import sparse_momentum as sparse_momentum
from optimkit.wrappers.state_dtype import with_state_dtype as with_state_dtype
from optimkit.wrappers.track_clip_fraction import track_clip_fraction as track_clip_fraction
from optimkit.wrappers.weight_normalized import weight_normalized as weight_normalized

__version__ = "0.1.0"
