"""Measurements that change no update."""

from optimkit.diagnostics.lion_k import constraint_violation as constraint_violation
from optimkit.diagnostics.lion_k import lion_k_lyapunov as lion_k_lyapunov
from optimkit.diagnostics.spikes import gradient_spike_score as gradient_spike_score
