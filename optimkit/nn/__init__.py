"""Layers and number formats for training in few bits; the Flax modules load when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimkit.nn.fake_quant import Int4Codes as Int4Codes
from optimkit.nn.fake_quant import fake_quant_fp4 as fake_quant_fp4
from optimkit.nn.fake_quant import fake_quant_int4_activation as fake_quant_int4_activation
from optimkit.nn.fake_quant import fake_quant_int4_weight as fake_quant_int4_weight
from optimkit.nn.fake_quant import int4_weight_codes as int4_weight_codes
from optimkit.nn.fake_quant import quantized_dense as quantized_dense

if TYPE_CHECKING:
    from optimkit.nn.quant_dense import QuantDense as QuantDense
    from optimkit.nn.quant_dense import QuantLinear as QuantLinear

FLAX_MODULES = ("QuantDense", "QuantLinear")
"""Names of this package that need Flax."""


def __getattr__(name: str) -> Any:
    if name not in FLAX_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from optimkit.nn import quant_dense
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "flax":
            raise
        raise ImportError(
            f'optimkit.nn.{name} needs Flax: pip install "optimkit[flax]"', name="flax"
        ) from None
    return getattr(quant_dense, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FLAX_MODULES})
