import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from flax import nnx

from examples import demo, four_bit
from examples.lm import spike_study
from examples.lm.config import ConfigError
from examples.lm.model import LanguageModel, ModelConfig
from examples.lm.spike_study import Entry, Study, conclusion, worst_rise
from examples.lm.spikes import spike_gradients, spike_steps
from examples.lm.train import Trainer, run
from tests.examples.helpers import run_python, small

STUDIES = {"demo": demo.STUDY, "fp4": four_bit.STUDIES["fp4"], "int4": four_bit.STUDIES["int4"]}

# --- the spikes ----------------------------------------------------------------------------------


def test_the_transformation_makes_the_spikes_of_the_table():
    tx = spike_gradients(0.25, factor=100.0, seed=3)
    grads = {"a": jnp.array([1.0, -2.0]), "b": jnp.ones((2, 2), jnp.bfloat16), "c": jnp.array(3.0)}
    update, state = jax.jit(tx.update), tx.init(grads)
    seen = []
    for _ in range(40):
        spiked, state = update(grads, state)
        ratio = jax.tree.map(lambda new, old: np.unique(np.asarray(new / old)), spiked, grads)
        assert all(len(r) == 1 for r in ratio.values())  # a whole leaf, or none of it
        assert spiked["b"].dtype == jnp.bfloat16
        seen.append([float(r[0]) for r in ratio.values()])
    table = spike_steps(3, steps=40, leaves=3, rate=0.25)
    np.testing.assert_array_equal(np.array(seen), np.where(table, 100.0, 1.0))
    assert 0 < table.sum() < table.size


def test_spikes_are_as_frequent_as_asked_and_leaves_have_their_own():
    table = spike_steps(0, steps=4000, leaves=10)
    assert table.mean() == pytest.approx(0.02, abs=0.003)  # four standard deviations are 0.0028
    both = (table[:, 0] & table[:, 1]).mean()
    assert both < 0.004
    assert not np.array_equal(table[:, 0], table[:, 1])
    # A spike depends on seed, step and leaf alone: neither on the length nor on the other leaves.
    np.testing.assert_array_equal(spike_steps(0, steps=50, leaves=4), table[:50, :4])
    assert not np.array_equal(spike_steps(1, steps=4000, leaves=10), table)


@pytest.mark.parametrize("setting", [{"rate": -0.1}, {"rate": 1.1}, {"factor": 0.0}])
def test_impossible_spikes_are_refused(setting):
    with pytest.raises(ValueError, match="rate must be in"):
        spike_gradients(**setting)


def test_the_trainer_puts_the_spikes_before_the_optimizer():
    config = small(steps=1)
    plain = Trainer(config, tx=optax.sgd(1e-3))
    spiked = Trainer(dataclasses.replace(config, spike_rate=1.0), tx=optax.sgd(1e-6))
    losses = [trainer.run().column("loss").tolist() for trainer in (plain, spiked)]
    assert losses[0] == losses[1]
    # With a spike everywhere, a thousandth of the rate makes the same step.
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(spiked.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


def test_a_run_with_spikes_is_repeated_by_its_seeds():
    config = small(steps=4, spike_rate=0.5)
    losses = [run(dataclasses.replace(config, spike_seed=seed)).column("loss") for seed in (0, 0)]
    np.testing.assert_array_equal(*losses)


def test_a_wrong_spike_rate_is_one_sentence():
    with pytest.raises(ConfigError, match="--spike_rate: rate must be in"):
        Trainer(small(spike_rate=2.0))


# --- what the study says -------------------------------------------------------------------------


def test_the_worst_rise_is_looked_for_after_spikes_only():
    loss = np.array([5.0, 4.0, 4.5, 6.0, 3.0, 9.0, 2.0])
    spiked = np.array([False, True, False, False, False, False, True])
    assert worst_rise(loss, spiked) == 2.0  # from 4 at the spike to 6, two updates later
    assert np.isnan(worst_rise(loss, np.zeros(7, bool)))


def entry(label, optimizer="adamw", **tried):
    return Entry(label, optimizer, {"": {"spikes": {1e-3: 1.0}, "no spikes": {1e-3: 1.0}, **tried}})


TINY = Study(
    title="tiny",
    config=small(steps=3, seq_len=16, spike_rate=0.5),
    entries=(entry("adamw"), entry("clip"), entry("spam"), entry("stable_spam")),
    authors=("spam", "stable_spam"),
    picture="tiny.png",
)


def losses(spikes, plain):
    labels = [e.label for e in TINY.entries]
    return {(x, "spikes"): value for x, value in zip(labels, spikes, strict=True)} | {
        (x, "no spikes"): value for x, value in zip(labels, plain, strict=True)
    }


def test_the_conclusion_follows_the_numbers():
    as_expected = losses((3.0, 2.8, 2.2, 2.0), (2.0, 2.0, 2.01, 1.9))
    otherwise = losses((3.0, 1.8, 2.2, 2.0), (2.0, 2.0, 2.01, 1.9))
    said = "\n".join(conclusion(TINY, [as_expected]))
    assert "With spikes, best first: stable_spam 2.000, spam 2.200, clip 2.800, adamw 3.000" in said
    assert "held in 1 of 1 seed(s)" in said
    assert "against adamw -26.7 % of loss with spikes, +0.5 % without (no real" in said
    assert "against adamw -33.3 % of loss with spikes, -5.0 % without (a difference" in said
    said = "\n".join(conclusion(TINY, [as_expected, otherwise]))
    assert "best first: stable_spam 2.000, spam 2.200, clip 2.300" in said
    assert "held in 1 of 2 seed(s)" in said
    assert "spam: with spikes ahead of adamw in 2, of clip in 1 of 2 seed(s)" in said
    assert "held in 0 of 1 seed(s)" in "\n".join(conclusion(TINY, [otherwise]))


def test_a_diverged_run_is_the_worst_and_not_an_error():
    said = conclusion(TINY, [losses((np.inf, 2.8, 2.2, 2.0), (2.0, 2.0, 2.0, 2.0))])
    assert said[0].endswith("adamw inf.")
    assert "held in 1 of 1" in said[2]


def test_an_entry_takes_its_best_variant_and_rates():
    made = Entry(
        "x",
        "adamw",
        {
            "b1=0.8": {"spikes": {1e-3: 2.0, 1e-2: 3.0}, "no spikes": {1e-3: 1.0, 1e-2: 0.5}},
            "b1=0.9": {"spikes": {1e-3: 2.5, 1e-2: 1.9}, "no spikes": {1e-3: 1.0, 1e-2: 1.5}},
        },
    )
    assert made.opt_args == "b1=0.9"
    assert (made.rate("spikes"), made.rate("no spikes")) == (1e-2, 1e-3)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_the_recorded_rates_are_in_the_middle_of_what_was_tried(study):
    for made in study.entries:
        for condition, tried in made.variants[made.opt_args].items():
            assert len(tried) >= 3
            best, rates = made.rate(condition), sorted(tried)
            assert rates[0] < best < rates[-1], (made.label, condition)


# --- the programs --------------------------------------------------------------------------------


def test_the_demo_prints_its_table_and_draws_its_picture(tmp_path):
    done = run_python("-m", "examples.demo", "--steps=3", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    for made in demo.STUDY.entries:
        for condition in ("spikes", "no spikes"):
            shown = f"{made.label}, {condition}"
            assert f"{shown:<26} step 3/3" in done.stdout
    assert "bytes/param" in done.stdout
    assert "With spikes, best first: " in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


TINY_SHAPE = {"width": 32, "depth": 1, "heads": 2, "seq_len": 16, "batch_size": 4}


@pytest.mark.parametrize("kind", four_bit.KINDS)
def test_the_projections_are_rounded_to_four_bits(kind):
    study = four_bit.STUDIES[kind]
    config = dataclasses.replace(study.config, **TINY_SHAPE)
    plain, rounded = Trainer(config), Trainer(config, linear=study.linear)
    assert rounded.history.parameters == plain.history.parameters
    batch = rounded.place(rounded.data.batch(0))
    exact, loss = (float(trainer.eval_step(rounded.params, batch)) for trainer in (plain, rounded))
    assert exact != loss
    assert exact == pytest.approx(loss, rel=0.01)


def test_no_position_sees_a_later_one_through_a_shared_scale():
    linear = four_bit.row_linear("fp4")
    model = LanguageModel(ModelConfig(width=32, depth=1, heads=2), rngs=nnx.Rngs(0), linear=linear)
    tokens = jnp.arange(2 * 8).reshape(2, 8)
    before, after = model(tokens), model(tokens.at[:, 5].set(200))
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)


def test_the_four_bit_program_prints_its_table_and_draws_its_picture(tmp_path, capsys):
    study = four_bit.STUDIES["fp4"]
    tiny = dataclasses.replace(
        study,
        config=dataclasses.replace(study.config, **TINY_SHAPE),
        entries=(study.entries[0], study.entries[-1]),
        authors=("stable_spam",),
    )
    values = flags.FlagValues()
    spike_study.define_flags(3, values)
    values(["program", "--steps=3", "--seeds=2", f"--out={tmp_path}"])
    spike_study.main(tiny, values)
    out = capsys.readouterr().out
    assert "Training 8 models of 3 steps" in out
    assert "of 2 seed(s)" in out
    assert (tmp_path / study.picture).read_bytes().startswith(b"\x89PNG")
