"""Sketches are injected, as GaLore's projectors are; the limiter's norm as for Fira."""

from tests.goldens.methods.fira import arguments as arguments
from tests.goldens.methods.fira import observe as observe
