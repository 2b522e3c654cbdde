"""What the tests of this folder need."""

from __future__ import annotations

import jax
import pytest

EIGHT_DEVICES = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
