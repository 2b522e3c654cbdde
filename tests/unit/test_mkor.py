"""MKOR: factors by hand, messages, the taps of the layers, the switch, and LAMB."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import optimkit as ok
from optimkit import nn
from optimkit.matrices.input_gram import input_rows
from optimkit.protocols import MatrixAxes
from optimkit.transforms.mkor_layers import find_layers
from optimkit.wrappers import loss_decrease_rate

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


DENSE = {"dense": {"kernel": normal(3, 2), "bias": normal(2)}}
STATS = {"dense": {"a": normal(3), "g": normal(2)}}


def run(tx, grads, stats, steps=1):
    def several(state):
        updates = None
        for _ in range(steps):
            updates, state = tx.update(grads, state, grads, layer_stats=stats)
        return updates, state

    return jax.jit(several)(tx.init(grads))


def whole_factor(state, layer="dense"):
    square, border = state.inverse_inputs[layer]["kernel"], state.inverse_inputs[layer]["bias"]
    return np.block([[np.asarray(square), np.asarray(border)[:-1, None]], [np.asarray(border)]])


def test_the_exact_rule_inverts():
    decay = 0.9
    _, state = run(ok.scale_by_mkor(inv_freq=1, update_rule="exact", factor_decay=decay,
                                    threshold=1e3), DENSE, STATS, steps=3)  # fmt: skip
    v, expected = np.append(STATS["dense"]["a"], 1), np.eye(4)
    for _ in range(3):
        expected = decay * expected + (1 - decay) * np.outer(v, v)
    np.testing.assert_allclose(whole_factor(state), np.linalg.inv(expected), rtol=1e-4, atol=1e-4)


def test_the_step_is_a_product_that_keeps_the_norm():
    updates, state = run(ok.scale_by_mkor(inv_freq=1), DENSE, STATS, steps=2)
    g = DENSE["dense"]
    stacked = np.vstack([g["kernel"], g["bias"]])
    v = whole_factor(state) @ stacked @ np.asarray(state.inverse_outputs["dense"]["kernel"])
    norm = np.linalg.norm
    v *= (norm(stacked[:-1]) + norm(stacked[-1])) / (norm(v[:-1]) + norm(v[-1]))
    np.testing.assert_allclose(updates["dense"]["kernel"], v[:-1], rtol=1e-5)
    np.testing.assert_allclose(updates["dense"]["bias"], v[-1], rtol=1e-5)


def test_other_layouts_are_the_same_matrices():
    kernel, out = normal(2, 2, 3, 4), normal(3, 2, 2)
    grads = {"conv": {"kernel": kernel}, "out": {"kernel": out}, "up": {"kernel": normal(2, 3, 3)}}
    stats = {"conv": {"a": normal(12), "g": normal(4)}, "out": {"a": normal(6), "g": normal(2)}}
    stats["up"] = {"a": normal(2, 3), "g": normal(2, 3)}
    axes = {"up/*": MatrixAxes((0,), (1,), (2,))}
    updates, _ = run(ok.scale_by_mkor(inv_freq=1, matrix_axes=axes), grads, stats, steps=2)
    flat = {"conv": {"kernel": kernel.reshape(12, 4)}, "out": {"kernel": out.reshape(6, 2)}}
    flat |= {f"up_{i}": {"kernel": grads["up"]["kernel"][i]} for i in range(2)}
    alone = {**stats, **{f"up_{i}": {k: v[i] for k, v in stats["up"].items()} for i in range(2)}}
    expected, _ = run(ok.scale_by_mkor(inv_freq=1), flat, alone, steps=2)
    for name in ("conv", "out"):
        got = updates[name]["kernel"].reshape(flat[name]["kernel"].shape)
        np.testing.assert_allclose(got, expected[name]["kernel"], rtol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(
            updates["up"]["kernel"][i], expected[f"up_{i}"]["kernel"], rtol=1e-5
        )


def test_factors_are_refreshed_when_due():
    tx = ok.scale_by_mkor(inv_freq=3, warmup_steps=2)
    state, seen = tx.init(DENSE), []
    step = jax.jit(lambda state: tx.update(DENSE, state, DENSE, layer_stats=STATS)[1])
    for _ in range(5):
        new = step(state)
        seen.append(bool(jnp.any(whole_factor(new) != whole_factor(state))))
        state = new
    # Step 0 sets the identity that is there already; 1 is warm-up; 3 is due.
    assert seen == [False, True, False, True, False]


@pytest.mark.parametrize("rule", ["code", "paper", "exact"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_bad_statistics_poison_nothing(rule, bad):
    stats = {"dense": {"a": jnp.array([bad, 1.0, 2.0]), "g": STATS["dense"]["g"]}}
    updates, state = run(ok.scale_by_mkor(inv_freq=1, update_rule=rule), DENSE, stats, steps=3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    if np.isnan(bad):
        np.testing.assert_array_equal(whole_factor(state), np.eye(4))


def test_what_is_no_layer_passes():
    tree = {**DENSE, "embed": {"embedding": normal(5, 3)}, "norm": {"scale": normal(3)}}
    assert [layer.name for layer in find_layers(tree)] == ["dense"]
    updates, _ = run(ok.scale_by_mkor(inv_freq=1), tree, STATS, steps=2)
    np.testing.assert_array_equal(updates["embed"]["embedding"], tree["embed"]["embedding"])
    for skip in (["dense"], ["dense/kernel"], lambda name, leaf: name == "dense/kernel"):
        updates, _ = run(ok.scale_by_mkor(inv_freq=1, skip=skip), DENSE, {}, steps=2)
        np.testing.assert_array_equal(updates["dense"]["kernel"], DENSE["dense"]["kernel"])


def test_messages():
    tx = ok.scale_by_mkor()
    with pytest.raises(ValueError, match=r"layer_stats lacks layer 'dense' \(it has \['other'\]\)"):
        run(tx, DENSE, {"other": STATS["dense"]})
    with pytest.raises(ValueError, match=r"must hold 'a' of shape \(3,\), got .*\(4,\)"):
        run(tx, DENSE, {"dense": {"a": jnp.ones(4), "g": jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"skip: 'head' matches none of the layers \['dense'\]"):
        ok.scale_by_mkor(skip=["head"]).init(DENSE)
    with pytest.raises(ValueError, match="either learning_rate"):
        ok.mkor()
    with pytest.raises(ValueError, match="either learning_rate"):
        ok.mkor(0.1, optax.sgd(0.1))
    with pytest.raises(ValueError, match="value=loss"):
        run(ok.mkor_h(0.1), DENSE, STATS)
    with pytest.raises(ValueError, match="several ways"):
        ok.mkor(0.1).init({"block": {"kernel": jnp.ones((2, 3, 4))}})
    with pytest.raises(ValueError, match="inv_freq must be an integer >= 1"):
        ok.mkor(0.1, inv_freq=0)
    with pytest.raises(ValueError, match="floating-point"):
        ok.scale_by_mkor(factor_dtype=int)
    state = tx.init(DENSE)
    with pytest.raises(ValueError, match=r"missing leaves \['dense/bias'\]"):
        tx.update({"dense": {"kernel": jnp.ones((3, 2))}}, state, layer_stats=STATS)
    for shape in ((3, 4), (3,)):
        wrong = {"dense": {"kernel": jnp.ones(shape), "bias": jnp.ones(2)}}
        with pytest.raises(ValueError, match=f"'dense/kernel' of shape \\({shape[0]},"):
            tx.update(wrong, state, layer_stats=STATS)


# -- taps -------------------------------------------------------------------------------------


class Net(linen.Module):
    tapped: bool

    @linen.compact
    def __call__(self, x):
        conv, dense = (nn.TappedConv, nn.TappedDense) if self.tapped else (linen.Conv, linen.Dense)
        x = linen.tanh(conv(3, (3, 2), strides=(2, 1), padding=((1, 0), (0, 1)), name="conv")(x))
        return dense(2, name="dense")(x.reshape(len(x), -1))


def test_linen_taps_give_what_mkor_needs():
    x = normal(4, 6, 5, 2)
    net = Net(tapped=True)
    variables = jax.jit(net.init)(jax.random.key(0), x)

    def loss(variables, net=net):
        return jnp.mean(net.apply(variables, x) ** 3)

    grads = jax.jit(jax.grad(loss))(variables)
    bare = {"params": variables["params"]}
    plain = jax.jit(jax.grad(lambda v: loss(v, Net(tapped=False))))(bare)["params"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads["params"], plain
    )
    stats = nn.collect_layer_stats(grads["taps"])
    hidden = linen.tanh(linen.Conv(3, (3, 2), (2, 1), ((1, 0), (0, 1))).apply(
        {"params": variables["params"]["conv"]}, x))  # fmt: skip
    np.testing.assert_allclose(stats["dense"]["a"], hidden.reshape(4, -1).mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["dense"]["g"], plain["dense"]["bias"], rtol=1e-5)
    places = hidden.shape[1] * hidden.shape[2]
    np.testing.assert_allclose(
        stats["conv"]["g"], plain["conv"]["bias"] / places, rtol=1e-4, atol=1e-6
    )
    rows = input_rows(x, kind="conv", kernel_size=(3, 2), strides=(2, 1), padding=[(1, 0), (0, 1)])
    mean = rows.reshape(-1, 2, 6).mean(0).T.reshape(-1)  # by place in the window, then by input
    np.testing.assert_allclose(stats["conv"]["a"], mean, rtol=1e-4, atol=1e-6)
    updates, _ = run(ok.mkor(0.1), grads["params"], stats)
    assert updates["conv"]["kernel"].shape == (3, 2, 2, 3)


def test_nnx_taps_give_the_same():
    conv = nn.TappedConvolution(2, 3, (2, 2), padding="VALID", rngs=nnx.Rngs(0))
    dense = nn.TappedLinear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    x = normal(4, 3, 3, 2)
    for layer in (conv, dense):
        graphdef, params, taps = nnx.split(layer, nnx.Param, nn.Tap)

        def loss(params, taps, graphdef=graphdef):
            return jnp.mean(nnx.merge(graphdef, params, taps)(x) ** 2)

        grads, tapped = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, taps)
        stats = nn.collect_layer_stats(tapped)["(root)"]
        rows = x.reshape(-1, 2) if layer is dense else nn.mean_patches(x, (2, 2), padding="VALID")
        np.testing.assert_allclose(stats["a"], rows.mean(0), rtol=1e-5)
        updates, _ = run(ok.mkor(0.1), {"conv": grads}, {"conv": stats})
        assert jax.tree.structure(updates["conv"]) == jax.tree.structure(grads)


def test_rows_are_clipped_and_means_are_sown():
    x = jnp.array([[1.0, 500.0], [3.0, -500.0]])
    tap = jax.grad(lambda tap: jnp.sum(nn.tap_inputs(x, tap, clip=2.0)))(jnp.zeros(2))
    np.testing.assert_allclose(tap, [1.5, 0.0])
    y = jnp.array([[1.0], [300.0]])
    tap = jax.grad(lambda tap: jnp.sum(nn.tap_outputs(y, tap) ** 2) / 4)(jnp.zeros(1))
    np.testing.assert_allclose(tap, [(1.0 + 100.0) / 2])  # rows 2 * y / 2
    with pytest.raises(ValueError, match="'dense' has no g"):
        nn.collect_layer_stats({"dense": {"mean_act": (jnp.ones(2),)}})
    with pytest.raises(ValueError, match="groups"):
        nn.TappedConv(4, (3,), feature_group_count=2).init(jax.random.key(0), jnp.ones((1, 4, 2)))


# -- the switch, and LAMB ---------------------------------------------------------------------


def test_mkor_h_becomes_sgd_and_keeps_the_momentum():
    rule = loss_decrease_rate(window=1, decay=0.0, patience=1)
    tx, plain = ok.mkor_h(0.1, inv_freq=1, criterion=rule), ok.mkor(0.1, inv_freq=1)
    state, other = tx.init(DENSE), plain.init(DENSE)

    @jax.jit
    def step(state, loss):
        return tx.update(DENSE, state, DENSE, layer_stats=STATS, value=loss)

    for loss in (8.0, 4.0, 2.0):
        updates, state = step(state, loss)
    expected, other = run(plain, DENSE, STATS, steps=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates, expected
    )
    momentum = other[2].trace
    for loss in (1.99, 0.1):
        updates, state = step(state, loss)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, DENSE)
        jax.tree.map(
            lambda u, m: np.testing.assert_allclose(u, -0.1 * m, rtol=1e-5), updates, momentum
        )
    assert bool(state[0].switched)


def test_a_loss_that_is_not_finite_is_passed_over():
    rule = loss_decrease_rate(window=1, decay=0.0, patience=1)
    state, _ = rule.update(rule.init(), jnp.asarray(8.0))
    state, _ = rule.update(state, jnp.asarray(4.0))
    after, switch = rule.update(state, jnp.asarray(np.nan))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert not bool(switch)


def test_lamb_agrees_with_optax():
    ours, theirs = ok.lamb(0.1, weight_decay=0.01), optax.lamb(0.1, weight_decay=0.01)
    state, other = ours.init(DENSE), theirs.init(DENSE)
    for _ in range(3):
        updates, state = ours.update(DENSE, state, DENSE)
        expected, other = theirs.update(DENSE, other, DENSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), updates, expected)
