"""Small pieces of a chain, one idea a file.

The pieces themselves stand in ``optimkit``; here are the functions of arrays that they share.
"""

from optimkit.transforms.kappa import kappa_subgradient as kappa_subgradient
from optimkit.transforms.radial import project_radial_leaf as project_radial_leaf
from optimkit.transforms.radial import radial_component as radial_component
