"""Stacks of matrices: batched kernels, and the engine that runs them over a tree of leaves."""

from optimkit.matrices.balanced_factors import refactorize as refactorize
from optimkit.matrices.balanced_factors import refactorize_params as refactorize_params
from optimkit.matrices.coefficients import ROOT_COEFFS as ROOT_COEFFS
from optimkit.matrices.coefficients import fit_ns_coefficients as fit_ns_coefficients
from optimkit.matrices.engine import leaf_axes as leaf_axes
from optimkit.matrices.engine import map_matrices as map_matrices
from optimkit.matrices.frequent_directions import FrequentDirections as FrequentDirections
from optimkit.matrices.frequent_directions import frequent_directions as frequent_directions
from optimkit.matrices.newton_schulz import NS_COEFFS as NS_COEFFS
from optimkit.matrices.newton_schulz import newton_schulz as newton_schulz
from optimkit.matrices.statistics import column_norms as column_norms
from optimkit.matrices.statistics import magnitude_quantile as magnitude_quantile
from optimkit.matrices.statistics import row_norms as row_norms
from optimkit.matrices.subspace import leading_vectors as leading_vectors
from optimkit.matrices.subspace import orthonormal_columns as orthonormal_columns
from optimkit.matrices.subspace import range_finder as range_finder
