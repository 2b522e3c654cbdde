"""Small pieces of a chain, one idea a file.

The pieces themselves stand in ``optimkit``; here are the functions of arrays that they share.
"""

from optimkit.transforms.adaptive_memory import adaptive_beta as adaptive_beta
from optimkit.transforms.adaptive_memory import bias_corrected_rms as bias_corrected_rms
from optimkit.transforms.block_codes import QuantizedArray as QuantizedArray
from optimkit.transforms.block_codes import dequantize_blockwise as dequantize_blockwise
from optimkit.transforms.block_codes import dynamic_map as dynamic_map
from optimkit.transforms.block_codes import quantize_blockwise as quantize_blockwise
from optimkit.transforms.fedhyper import fedhyper_server_local as fedhyper_server_local
from optimkit.transforms.flip_signs import rule_flip_mask as rule_flip_mask
from optimkit.transforms.gradient_disorder import gradient_disorder as gradient_disorder
from optimkit.transforms.init_snr import init_snr as init_snr
from optimkit.transforms.kappa import kappa_subgradient as kappa_subgradient
from optimkit.transforms.masks import apply_masks as apply_masks
from optimkit.transforms.masks import erk_densities as erk_densities
from optimkit.transforms.masks import init_masks as init_masks
from optimkit.transforms.move_masks import update_masks as update_masks
from optimkit.transforms.multiplicative_langevin import dale_langevin_step as dale_langevin_step
from optimkit.transforms.multiplicative_langevin import (
    unconstrained_multiplicative_step as unconstrained_multiplicative_step,
)
from optimkit.transforms.norm_based_scaling import norm_based_scaling as norm_based_scaling
from optimkit.transforms.radial import project_radial_leaf as project_radial_leaf
from optimkit.transforms.radial import radial_component as radial_component
