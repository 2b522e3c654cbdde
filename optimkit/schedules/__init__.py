"""Step count -> rate.

Every schedule is a transition of one of the ``shapes``, or several joined by ``phases``. It takes
the 0-based count as a Python integer, a NumPy number or a traced array of any shape, and gives the
rate as f32 (f64 under x64), the same under ``jit``, ``vmap`` and ``scan``. Counts before the start
and after the end are clipped, in every piece, so that no NaN arises even where none is selected.
"""

from optimkit.schedules.batch_scaling import Regime as Regime
from optimkit.schedules.batch_scaling import adapt_regime as adapt_regime
from optimkit.schedules.plotting import plot as plot
from optimkit.schedules.refined import median_filter_norms as median_filter_norms
from optimkit.schedules.refined import refine_weights as refine_weights
