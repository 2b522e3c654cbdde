"""Stacks of matrices: batched kernels, and the engine that runs them over a tree of leaves."""

from optimkit.matrices.engine import leaf_axes as leaf_axes
from optimkit.matrices.engine import map_matrices as map_matrices
from optimkit.matrices.newton_schulz import NS_COEFFS as NS_COEFFS
from optimkit.matrices.newton_schulz import newton_schulz as newton_schulz
