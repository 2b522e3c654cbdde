import numpy as np

import optimkit as ok
from examples import mkor_digits


def test_mkor_learns_digits():
    losses = mkor_digits.losses_of(ok.mkor(0.03, inv_freq=10), steps=60)
    assert np.isfinite(losses).all()
    assert losses[-10:].mean() < 0.6 * losses[0]
    assert mkor_digits.steps_to(losses, losses[-10:].mean()) <= 60
    assert mkor_digits.steps_to(losses, 0.0) is None
