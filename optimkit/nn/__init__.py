"""Layers, number formats for training in few bits, and losses; Flax loads when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from optimkit.nn.fake_quant import Int4Codes as Int4Codes
from optimkit.nn.fake_quant import fake_quant_fp4 as fake_quant_fp4
from optimkit.nn.fake_quant import fake_quant_int4_activation as fake_quant_int4_activation
from optimkit.nn.fake_quant import fake_quant_int4_weight as fake_quant_int4_weight
from optimkit.nn.fake_quant import int4_weight_codes as int4_weight_codes
from optimkit.nn.lognormal import lognormal_signed_init as lognormal_signed_init
from optimkit.nn.mkor import collect_layer_stats as collect_layer_stats
from optimkit.nn.mkor import mean_patches as mean_patches
from optimkit.nn.mkor import tap_inputs as tap_inputs
from optimkit.nn.mkor import tap_outputs as tap_outputs
from optimkit.nn.mkor import tap_patches as tap_patches
from optimkit.nn.quantized_dense import quantized_dense as quantized_dense
from optimkit.nn.stablemax import log_stablemax as log_stablemax
from optimkit.nn.stablemax import stablemax as stablemax
from optimkit.nn.stablemax import stablemax_cross_entropy as stablemax_cross_entropy
from optimkit.nn.tract import tract_conv as tract_conv
from optimkit.nn.tract import tract_conv_general_dilated as tract_conv_general_dilated
from optimkit.nn.tract import tract_dense as tract_dense
from optimkit.nn.tract import tract_gram as tract_gram
from optimkit.nn.tract import tract_kernel as tract_kernel
from optimkit.nn.weight_norm_lora import init_weight_norm_lora as init_weight_norm_lora
from optimkit.nn.weight_norm_lora import weight_norm_lora as weight_norm_lora
from optimkit.nn.z_loss import z_loss as z_loss

if TYPE_CHECKING:
    from optimkit.nn.ghost_batch_norm import GhostBatchNorm as GhostBatchNorm
    from optimkit.nn.mkor_layers import Tap as Tap
    from optimkit.nn.mkor_layers import TappedConv as TappedConv
    from optimkit.nn.mkor_layers import TappedConvolution as TappedConvolution
    from optimkit.nn.mkor_layers import TappedDense as TappedDense
    from optimkit.nn.mkor_layers import TappedLinear as TappedLinear
    from optimkit.nn.quant_layers import QuantDense as QuantDense
    from optimkit.nn.quant_layers import QuantLinear as QuantLinear
    from optimkit.nn.tract_layers import TrActConv as TrActConv
    from optimkit.nn.tract_layers import TrActDense as TrActDense
    from optimkit.nn.tract_layers import TrActLinear as TrActLinear

FLAX_MODULES = {
    "GhostBatchNorm": "ghost_batch_norm",
    "QuantDense": "quant_layers",
    "QuantLinear": "quant_layers",
    "Tap": "mkor_layers",
    "TappedConv": "mkor_layers",
    "TappedConvolution": "mkor_layers",
    "TappedDense": "mkor_layers",
    "TappedLinear": "mkor_layers",
    "TrActConv": "tract_layers",
    "TrActDense": "tract_layers",
    "TrActLinear": "tract_layers",
}
"""Names of this package that need Flax, and their modules."""


def __getattr__(name: str) -> Any:
    if name not in FLAX_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"optimkit.nn.{FLAX_MODULES[name]}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "flax":
            raise
        raise ImportError(
            f'optimkit.nn.{name} needs Flax: pip install "optimkit[flax]"', name="flax"
        ) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FLAX_MODULES})
