"""Measurements that change no update."""

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
from optimkit.diagnostics.spikes import gradient_spike_score as gradient_spike_score
