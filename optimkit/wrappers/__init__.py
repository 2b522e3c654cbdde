"""Transformations that take an ``inner`` one and change how or when it runs."""

from optimkit.wrappers.momentum_reset import reset_warmup_factor as reset_warmup_factor
