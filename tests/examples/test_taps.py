import jax
import numpy as np
import pytest
from flax import nnx

from examples.lm import taps
from examples.lm.model import LanguageModel, ModelConfig
from examples.lm.train import run, standard_hooks
from optimkit.nn import TappedLinear
from tests.examples.helpers import small


@pytest.mark.parametrize(("optimizer", "expected"), [("adamw", nnx.Linear), ("mkor", TappedLinear)])
def test_a_model_has_taps_only_if_its_optimizer_wants_them(optimizer, expected):
    linear = taps.linear_for(small(optimizer=optimizer))
    assert linear is expected
    shape = ModelConfig(width=32, depth=1, heads=2)
    model = LanguageModel(shape, rngs=nnx.Rngs(0), linear=linear)
    _, params, zeros = taps.split(model)
    assert len(jax.tree.leaves(zeros)) == (14 if optimizer == "mkor" else 0)  # two a projection
    plain = nnx.state(LanguageModel(shape, rngs=nnx.Rngs(0)))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(params), nnx.to_pure_dict(plain))


def test_mkor_trains_and_a_resumed_run_equals_a_whole_one(tmp_path):
    config = small(optimizer="mkor", opt_args="inv_freq=2", learning_rate=0.3)
    whole = run(config)
    assert whole.val_loss < whole.column("loss")[0] - 0.5

    settings = {**vars(config), "out": str(tmp_path), "checkpoint_every": 5}
    for changes in ({"steps": 5}, {"resume": True}):
        part = small(**{**settings, **changes})
        history = run(part, standard_hooks(part))
    assert history.column("loss").tolist() == whole.column("loss").tolist()
    assert history.val_loss == whole.val_loss
