"""Strict numerics for every test: mixing ranks in silence is an error, and so is any warning."""

import os

import jax
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def x64():
    """Runs a test with 64-bit types switched on."""
    with jax.enable_x64(True):
        yield
