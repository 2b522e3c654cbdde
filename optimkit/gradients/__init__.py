"""What is made of a loss beside its gradient: curvature, drift terms, noise, baselines."""

from optimkit.gradients.directions import directional_derivative as directional_derivative
from optimkit.gradients.directions import sample_direction as sample_direction
from optimkit.gradients.fisher import fisher_importance as fisher_importance
from optimkit.gradients.hessian import finite_difference_hvp as finite_difference_hvp
from optimkit.gradients.hessian import fisher_product as fisher_product
from optimkit.gradients.hessian import gauss_newton_product as gauss_newton_product
from optimkit.gradients.hessian import hessian_gradient as hessian_gradient
from optimkit.gradients.hessian import hessian_product as hessian_product
from optimkit.gradients.ignite import ignite_gradient as ignite_gradient
from optimkit.gradients.ignite import ignite_multiplier as ignite_multiplier
from optimkit.gradients.krylov import conjugate_gradient as conjugate_gradient
from optimkit.gradients.krylov import lanczos as lanczos
from optimkit.gradients.krylov import slq_density as slq_density
from optimkit.gradients.mezo import mezo as mezo
from optimkit.gradients.noise import GradientSNR as GradientSNR
from optimkit.gradients.noise import gradient_snr as gradient_snr
from optimkit.gradients.noise import optimal_baseline as optimal_baseline
from optimkit.gradients.sam import sam_gradient as sam_gradient
from optimkit.gradients.sam import sam_gradient_parts as sam_gradient_parts
from optimkit.gradients.sam import sam_perturbed_params as sam_perturbed_params
from optimkit.gradients.sam import sam_reference_grads as sam_reference_grads
from optimkit.gradients.sample_weighting import MomentumDifficulty as MomentumDifficulty
from optimkit.gradients.sample_weighting import beta_kernel_weight as beta_kernel_weight
from optimkit.gradients.sample_weighting import weighted_mean as weighted_mean
from optimkit.gradients.straight_through import OptimalBaseline as OptimalBaseline
from optimkit.gradients.straight_through import noisy_rectifier as noisy_rectifier
from optimkit.gradients.straight_through import reinforce_neuron_grad as reinforce_neuron_grad
from optimkit.gradients.straight_through import straight_through as straight_through
from optimkit.gradients.straight_through import (
    straight_through_bernoulli as straight_through_bernoulli,
)
from optimkit.gradients.straight_through import (
    straight_through_threshold as straight_through_threshold,
)
from optimkit.gradients.straight_through import sts_neuron as sts_neuron
from optimkit.gradients.synaptic_dampening import (
    selective_synaptic_dampening as selective_synaptic_dampening,
)
from optimkit.gradients.synaptic_dampening import ssd_statistics as ssd_statistics
from optimkit.gradients.two_player import drift_coefficients as drift_coefficients
from optimkit.gradients.two_player import two_player_drift_gradients as two_player_drift_gradients
from optimkit.gradients.upsampling import upsample_hard_cluster as upsample_hard_cluster
from optimkit.gradients.zeroth_order import forward_gradient as forward_gradient
from optimkit.gradients.zeroth_order import spsa as spsa
