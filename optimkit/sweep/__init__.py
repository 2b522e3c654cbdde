"""Many settings of one method, trained at once under one compilation.

A setting is a value for each swept argument; ``vmap`` trains all of them on one device, and
``shard_map`` spreads them over several. The best one comes back with its curve.
"""

from optimkit.sweep.result import SweepResult as SweepResult
from optimkit.sweep.result import plot as plot
from optimkit.sweep.training import sweep as sweep
