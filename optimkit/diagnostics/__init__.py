"""Measurements that change no update."""

from optimkit.diagnostics.continual import ContinualEval as ContinualEval
from optimkit.diagnostics.continual import continual_metrics as continual_metrics
from optimkit.diagnostics.continual import windowed_max_drop as windowed_max_drop
from optimkit.diagnostics.effective_rate import angular_update as angular_update
from optimkit.diagnostics.effective_rate import (
    effective_learning_rate as effective_learning_rate,
)
from optimkit.diagnostics.lion_k import constraint_violation as constraint_violation
from optimkit.diagnostics.lion_k import lion_k_lyapunov as lion_k_lyapunov
from optimkit.diagnostics.lr_sensitivity import lr_sensitivity as lr_sensitivity
from optimkit.diagnostics.metrics import metrics as metrics
from optimkit.diagnostics.principal_flow import (
    principal_flow_coefficient as principal_flow_coefficient,
)
from optimkit.diagnostics.sharpness import hessian_extremes as hessian_extremes
from optimkit.diagnostics.sharpness import hessian_noise as hessian_noise
from optimkit.diagnostics.sharpness import hessian_trace as hessian_trace
from optimkit.diagnostics.sharpness import max_learning_rate_sgd as max_learning_rate_sgd
from optimkit.diagnostics.sharpness import noisy_extreme as noisy_extreme
from optimkit.diagnostics.sharpness import scale_learning_rate as scale_learning_rate
from optimkit.diagnostics.sharpness import sharpness as sharpness
from optimkit.diagnostics.sharpness import stability_metrics as stability_metrics
from optimkit.diagnostics.spectrum import alpha_req as alpha_req
from optimkit.diagnostics.spectrum import effective_rank as effective_rank
from optimkit.diagnostics.spectrum import (
    effective_rank_dynamics as effective_rank_dynamics,
)
from optimkit.diagnostics.spectrum import eigenspectrum as eigenspectrum
from optimkit.diagnostics.spectrum import rankme as rankme
from optimkit.diagnostics.spectrum import (
    running_mean_difference as running_mean_difference,
)
from optimkit.diagnostics.spikes import gradient_spike_score as gradient_spike_score
