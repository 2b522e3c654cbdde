"""Muon and its pieces: momentum, orthogonalisation, shape scale, the split by kind."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import optimkit as ok
from optimkit.matrices.newton_schulz import newton_schulz
from optimkit.transforms.matrix_shape import matrix_scale
from optimkit.wrappers.by_kind import matrix_tree

PARAMS = {
    "embed": {"embedding": jnp.ones((5, 2))},
    "hidden": {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.ones(2)},
    "lm_head": {"kernel": jnp.ones((2, 5))},
    "multi_head_attention": {"kernel": jnp.full((2, 2), -0.5)},
}
MATRICES = ("hidden/kernel", "multi_head_attention/kernel")


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def trajectory(tx, params, steps=3):
    state, out = tx.init(params), []
    for seed in range(steps):
        updates, state = tx.update(random_like(params, seed), state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


# -- momentum ---------------------------------------------------------------------------------


class MomentumTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        # gradients 4, -2 at b = 0.5; ema: m = 2, 0; sum: m = 4, 0
        ("ema", False, [2.0, 0.0]),
        ("ema", True, [0.5 * 2 + 0.5 * 4, 0.5 * 0 + 0.5 * -2]),
        ("sum", False, [4.0, 0.0]),
        ("sum", True, [0.5 * 4 + 4, 0.5 * 0 - 2]),
    )
    def test_ema_momentum(self, form, nesterov, expected):
        tx = ok.ema_momentum(0.5, nesterov=nesterov, form=form)
        state = self.variant(tx.init)(jnp.zeros(1))
        for gradient, wanted in zip([4.0, -2.0], expected, strict=True):
            update, state = self.variant(tx.update)(jnp.array([gradient]), state)
            np.testing.assert_allclose(update, [wanted], atol=1e-7)
        chex.assert_shape(state.mu, (1,))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        # gradients 4, 4 at momentum 0.5, dampening 0.25
        ("dampened", False, [3.0, 4.5]),
        ("copy", False, [4.0, 5.0]),
        ("dampened", True, [4 + 1.5, 4 + 2.25]),
        ("copy", True, [4 + 2.0, 4 + 2.5]),
    )
    def test_dampened_trace(self, first, nesterov, expected):
        tx = ok.dampened_trace(0.5, 0.25, nesterov, first)
        state = self.variant(tx.init)(jnp.zeros(1))
        for wanted in expected:
            update, state = self.variant(tx.update)(jnp.array([4.0]), state)
            np.testing.assert_allclose(update, [wanted], rtol=1e-6)
        assert ("count" in state._fields) == (first == "copy")


@pytest.mark.parametrize("nesterov", [False, True])
def test_dampened_trace_without_dampening_is_optax_trace(nesterov):
    params = jnp.zeros(3)
    ours = trajectory(ok.dampened_trace(0.9, nesterov=nesterov), params)
    chex.assert_trees_all_close(ours, trajectory(optax.trace(0.9, nesterov), params), rtol=1e-6)


def test_momentum_dtype():
    state = ok.ema_momentum(0.9, mu_dtype=jnp.bfloat16).init(jnp.zeros(2))
    assert state.mu.dtype == jnp.bfloat16
    assert ok.ema_momentum(0.9).init(jnp.zeros(2, jnp.float16)).mu.dtype == jnp.float32


# -- orthogonalisation ------------------------------------------------------------------------


def test_scale_by_muon_is_momentum_then_newton_schulz():
    params = {"kernel": jnp.zeros((3, 4))}
    gradients = [random_like(params, seed) for seed in (0, 1)]
    tx = ok.scale_by_muon(0.5, ns_dtype=None)
    state = tx.init(params)
    _, state = tx.update(gradients[0], state)
    got, state = tx.update(gradients[1], state)
    mu = 0.5 * 0.5 * gradients[0]["kernel"] + 0.5 * gradients[1]["kernel"]
    np.testing.assert_allclose(state[0].mu["kernel"], mu, atol=1e-6)
    nesterov = 0.5 * mu + 0.5 * gradients[1]["kernel"]
    np.testing.assert_allclose(got["kernel"], newton_schulz(nesterov), atol=1e-5)


def test_one_batched_product_for_all_matrices_of_a_size():
    params = {"stack": {"kernel": jnp.ones((3, 2, 4))}} | {
        f"layer_{i}": {"kernel": jnp.ones((4, 2) if i % 2 else (2, 4))} for i in range(4)
    }
    axes = {"stack/kernel": ok.MatrixAxes((0,), (1,), (2,))}

    def products(bucket):
        tx = ok.orthogonalize_updates(bucket=bucket, matrix_axes=axes)
        jaxpr = jax.make_jaxpr(lambda p: tx.update(p, tx.init(p))[0])(params)
        return str(jaxpr).count("dot_general")

    assert products(bucket=True) == 15  # three products a step
    assert products(bucket=False) == 5 * 15


def test_the_default_is_bfloat16_and_vectors_pass():
    updates = {"kernel": jnp.ones((2, 3)), "bias": jnp.array([3.0])}
    tx = ok.orthogonalize_updates()
    assert "bf16" in str(jax.make_jaxpr(lambda u: tx.update(u, tx.init(u))[0])(updates))
    np.testing.assert_array_equal(tx.update(updates, tx.init(updates))[0]["bias"], [3.0])


# -- scales -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "shape", "axes", "expected"),
    [
        ("keller", (2, 8), ok.MatrixAxes((), (0,), (1,)), 2.0),
        ("keller", (8, 2), ok.MatrixAxes((), (0,), (1,)), 1.0),
        ("moonlight", (9, 4), ok.MatrixAxes((), (0,), (1,)), 0.6),
        ("spectral", (8, 2), ok.MatrixAxes((), (0,), (1,)), 0.5),
        ("none", (2, 8), ok.MatrixAxes((), (0,), (1,)), 1.0),
        ("keller", (3, 3, 2, 72), ok.MatrixAxes((), (0, 1, 2), (3,)), 1.0),
        ("keller", (4, 1, 2, 3), ok.MatrixAxes((), (0, 1, 2), (3,)), 2.0),
        ("keller", (3, 2, 72), ok.MatrixAxes((), (0, 1), (2,)), math.sqrt(12)),
        ("spectral", (3, 3, 2, 72), ok.MatrixAxes((), (0, 1, 2), (3,)), 2.0),
        ("keller", (7, 2, 2, 4), ok.MatrixAxes((0,), (1,), (2, 3)), 2.0),
        ("spectral", (7, 3, 12), ok.MatrixAxes((0,), (1,), (2,)), 2.0),
        ("keller", (0, 3), ok.MatrixAxes((), (0,), (1,)), 1.0),
    ],
)
def test_matrix_scale(scaling, shape, axes, expected):
    assert matrix_scale(scaling, shape, axes) == pytest.approx(expected)
    tx = ok.scale_by_matrix_shape(scaling, matrix_axes={"kernel": axes})
    updates, _ = tx.update({"kernel": jnp.ones(shape), "bias": jnp.ones(2)}, optax.EmptyState())
    np.testing.assert_allclose(updates["kernel"], np.full(shape, expected), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], [1.0, 1.0])


def test_normuon_evens_out_the_channels_and_keeps_the_norm():
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    tx = ok.scale_by_normuon(0.75)
    state = tx.init(params)
    chex.assert_shape(state.output_nu["kernel"], (1, 3))
    x = {"kernel": jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]]), "bias": jnp.ones(3)}
    updates, state = tx.update(x, state)
    # mean squares of the channels: 12.5, 0, 1
    np.testing.assert_allclose(state.output_nu["kernel"], [[3.125, 0.0, 0.25]], rtol=1e-6)
    y = np.array([[3 / math.sqrt(12.5), 0, 1], [4 / math.sqrt(12.5), 0, -1]])
    np.testing.assert_allclose(
        updates["kernel"], y * math.sqrt(27) / np.linalg.norm(y), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(updates["bias"], x["bias"])
    with pytest.raises(ValueError, match=r"output_nu|state leaf 'kernel' has shape \(1, 3\)"):
        tx.update({"kernel": jnp.ones((2, 1)), "bias": jnp.ones(3)}, state)


def test_normuon_treats_each_layer_of_a_stack_alone():
    layers = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    axes = {"kernel": ok.MatrixAxes((0,), (1,), (2,))}
    tx = ok.scale_by_normuon(matrix_axes=axes)
    got, _ = tx.update({"kernel": layers}, tx.init({"kernel": layers}))
    single = ok.scale_by_normuon()
    for index in range(3):
        layer = {"kernel": layers[index]}
        expected, _ = single.update(layer, single.init(layer))
        np.testing.assert_allclose(got["kernel"][index], expected["kernel"], rtol=1e-5)


# -- the split --------------------------------------------------------------------------------


def test_hidden_matrices_are_found_by_name_and_shape():
    chosen = matrix_tree(PARAMS)
    names = {name for name, use in ok.layout.named_leaves(chosen) if use}
    assert names == set(MATRICES)
    none = matrix_tree(PARAMS, matrix_axes={"*": None})
    assert not any(jax.tree.leaves(none))
    chosen = matrix_tree(PARAMS, ["hidden/kernel", "embed/*"])
    assert chosen["embed"]["embedding"]
    assert not chosen["multi_head_attention"]["kernel"]


def test_what_cannot_be_a_matrix_is_refused_by_name():
    with pytest.raises(ValueError, match=r"leaf 'hidden/bias' of shape \(2,\).*no matrix"):
        ok.muon(0.1, matrix_leaves=lambda path, leaf: "hidden" in path).init(PARAMS)
    with pytest.raises(ValueError, match="matrix_leaves: 'typo' matches none"):
        ok.muon(0.1, matrix_leaves=["typo"]).init(PARAMS)
    with pytest.raises(ValueError, match=r"'blocks/kernel'.*several ways.*matrix_axes="):
        ok.muon(0.1).init({"blocks": {"kernel": jnp.ones((2, 3, 4))}})


class ByKindTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_each_kind_goes_its_way(self):
        tx = ok.by_kind(optax.scale(2.0), optax.trace(0.5))
        state = self.variant(tx.init)(PARAMS)
        updates, state = self.variant(tx.update)(PARAMS, state, PARAMS)
        updates, state = self.variant(tx.update)(PARAMS, state, PARAMS)
        factors = {name: 2.0 if name in MATRICES else 1.5 for name, _ in named(PARAMS)}
        for name, leaf in named(PARAMS):
            np.testing.assert_allclose(dict(named(updates))[name], factors[name] * leaf)
        places = optax.tree_map_params(tx, lambda leaf: leaf.shape, state)
        others = [leaf for name, leaf in named(PARAMS) if name not in MATRICES]
        trace = places.inner_states["vector"].inner_state.trace
        assert jax.tree.leaves(trace) == [size for leaf in others for size in leaf.shape]


def named(tree):
    return ok.layout.named_leaves(tree)


def test_extras_shaped_like_the_tree_are_divided_too():
    def update(updates, state, params=None, *, grad, value, **extra):
        return jax.tree.map(lambda u, g: u + value * g, updates, grad), state

    adds = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = ok.by_kind(adds, optax.identity())
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad=PARAMS, value=jnp.array(3.0))
    np.testing.assert_allclose(updates["hidden"]["kernel"], 4 * PARAMS["hidden"]["kernel"])
    np.testing.assert_allclose(updates["hidden"]["bias"], PARAMS["hidden"]["bias"])


def test_a_scalar_extra_is_not_taken_for_a_bare_array():
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: value * u, updates), state + value

    scales = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(()), update)
    tx, bare = ok.by_kind(scales, scales), jnp.ones(2)
    updates, state = tx.update(bare, tx.init(bare), bare, value=jnp.array(3.0))
    np.testing.assert_allclose(updates, [3.0, 3.0])
    np.testing.assert_allclose(jax.tree.leaves(state), [3.0, 3.0])


# -- the recipe -------------------------------------------------------------------------------


class MuonTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_first_step(self):
        # One cubic step p(s) = 1.5 s - 0.5 s^3 on singular values 3/5 and 4/5: 0.792 and 0.944.
        tx = ok.muon(0.1, weight_decay=0.5, ns_steps=1, ns_coeffs=(1.5, -0.5, 0.0), ns_dtype=None)
        params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 2.0]]), "bias": jnp.array([2.0, 0.0])}
        grads = {"kernel": jnp.array([[0.0, 3.0], [-4.0, 0.0]]), "bias": jnp.array([7.0, -7.0])}
        state = self.variant(tx.init)(params)
        updates, state = self.variant(tx.update)(grads, state, params)
        np.testing.assert_allclose(
            updates["kernel"], -0.1 * np.array([[1.0, 0.792], [-0.944, 1.0]]), atol=1e-6
        )
        np.testing.assert_allclose(updates["bias"], [-0.1 * (1 + 1.0), 0.1], atol=1e-6)


def reference(gradients, w, rate, decay, b=0.95):
    """Muon in NumPy, torch's layout turned round: out = last axis."""
    m, out = np.zeros_like(w), []
    for g in gradients:
        m = b * m + (1 - b) * g
        x = (1 - b) * g + b * m
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        w = w * (1 - rate * decay) - rate * math.sqrt(max(1, w.shape[1] / w.shape[0])) * x
        out.append(w)
    return out


def test_three_steps_against_numpy():
    params = {"kernel": jnp.full((3, 6), 0.5)}
    gradients = [np.asarray(random_like(params, seed)["kernel"]) for seed in range(3)]
    expected = reference(gradients, np.full((3, 6), 0.5), 0.1, 0.3)
    got = trajectory(ok.muon(0.1, weight_decay=0.3, ns_dtype="float32"), params)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours["kernel"], theirs, atol=2e-5)


def test_other_leaves_are_adamw():
    tx = ok.muon(0.1, weight_decay=0.2)
    adamw = optax.adamw(0.1, b2=0.95, eps=1e-10, weight_decay=0.2)
    for ours, theirs in zip(trajectory(tx, PARAMS), trajectory(adamw, PARAMS), strict=True):
        ours, theirs = dict(named(ours)), dict(named(theirs))
        for name in ours.keys() - set(MATRICES):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
        assert not np.allclose(ours["hidden/kernel"], theirs["hidden/kernel"], atol=1e-3)


def test_the_first_step_agrees_with_optax():
    # From the second step on, optax mixes two bias corrections.
    params = {"kernel": jnp.zeros((3, 5))}
    (ours,) = trajectory(ok.muon(0.1, eps=1e-8, ns_dtype=None), params, 1)
    (theirs,) = trajectory(optax.contrib.muon(0.1), params, 1)
    chex.assert_trees_all_close(ours, theirs, atol=1e-5)


def test_decay_and_rate_by_kind_with_a_mask():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)

    def decays(**keywords):
        tx = ok.muon(0.1, weight_decay=0.2, **keywords)
        updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
        ratio = jax.tree.map(lambda u, p: round(float((u / p).ravel()[0]), 4), updates, PARAMS)
        return {name: -value + 0.0 for name, value in named(ratio)}

    rest = [name for name, _ in named(PARAMS) if name not in MATRICES]

    def expect(matrix, other):
        return {**dict.fromkeys(MATRICES, matrix), **dict.fromkeys(rest, other)}

    assert decays() == expect(0.02, 0.02)
    assert decays(adam_weight_decay=0.5) == expect(0.02, 0.05)
    assert decays(adam_weight_decay=0.5, adam_learning_rate=1.0) == expect(0.02, 0.5)
    assert decays(adam_weight_decay=0.0) == expect(0.02, 0.0)
    no_vectors = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    prefix = {**dict.fromkeys(PARAMS, True), "hidden": {"kernel": True, "bias": False}}
    for mask in (no_vectors, no_vectors(PARAMS), prefix):
        assert decays(mask=mask) == {**expect(0.02, 0.02), "hidden/bias": 0.0}
        assert decays(mask=mask, adam_weight_decay=0.5) == {
            **expect(0.02, 0.05),
            "hidden/bias": 0.0,
        }


def test_sum_and_ema_take_the_same_steps():
    params = {"kernel": jnp.zeros((3, 5))}
    ema = trajectory(ok.muon(0.1, ns_dtype=None), params)
    total = trajectory(ok.muon(0.1, ns_dtype=None, momentum_form="sum"), params)
    chex.assert_trees_all_close(ema, total, atol=1e-4)


def test_schedules_and_tracers():
    schedule = optax.piecewise_constant_schedule(0.1, {1: 0.5})
    tx = ok.muon(schedule, adam_learning_rate=lambda count: 0.01 * (count + 1), ns_dtype=None)
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(1)}
    first, second, _ = trajectory(tx, params)
    size = lambda p: float(jnp.linalg.norm(p["kernel"]))  # noqa: E731
    assert size(jax.tree.map(jnp.subtract, second, first)) < 0.8 * size(first)
    np.testing.assert_allclose(jnp.abs(first["bias"]), [0.01], rtol=1e-4)

    @jax.jit
    def step(rate, momentum, eps, decay):
        tx = ok.muon(rate, momentum, weight_decay=decay, eps=eps, ns_dtype=None)
        return tx.update(params, tx.init(params), params)[0]

    chex.assert_tree_all_finite(step(0.1, 0.9, 1e-7, 0.1))
    injected = ok.inject_hyperparams(ok.muon)(0.1, ns_coeffs="dion", adam_learning_rate=3e-4)
    held = injected.init(params).hyperparams
    assert {"learning_rate", "momentum", "eps", "adam_learning_rate", "adam_b2"} <= held.keys()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1"),
        ({"learning_rate": -1.0}, "learning_rate must be >= 0"),
        ({"adam_learning_rate": -1.0}, "adam_learning_rate must be >= 0"),
        ({"adam_b1": 1.0}, "adam_b1 must be"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"ns_steps": 0}, "ns_steps must be an integer >= 1"),
        ({"ns_steps": 6, "ns_coeffs": "dion"}, "triples for 5 steps"),
        ({"ns_dtype": "int32"}, "ns_dtype must be a floating-point dtype"),
        ({"scaling": "kaller"}, "scaling must be one of 'keller'"),
        ({"momentum_form": "mean"}, "momentum_form must be one of"),
        ({"adam_eps_form": "inside"}, "adam_eps_form must be one of"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        ok.muon(**{"learning_rate": 0.1, **keywords})


def test_polar_express_and_float16_products_on_tiny_and_huge_gradients():
    params = {"kernel": jnp.zeros((3, 4))}
    for size in (1e-30, 1e-8, 1e30):
        grads = jax.tree.map(lambda g, size=size: g * size, random_like(params, 0))
        for keywords in ({"ns_coeffs": "polar_express"}, {"ns_dtype": "float16"}):
            tx = ok.muon(1.0, scaling="none", **keywords)
            updates, _ = tx.update(grads, tx.init(params), params)
            chex.assert_tree_all_finite(updates)
            if size > 1:
                assert 0.5 < np.linalg.norm(updates["kernel"], 2) < 1.2


# -- fused kernels, heads, NorMuon ------------------------------------------------------------


def test_a_fused_kernel_steps_as_its_parts():
    sizes = (4, 2, 2)
    fused = {"qkv": {"kernel": random_like(jnp.zeros((4, 8)), 0)}}
    apart = {
        name: {"kernel": part}
        for name, part in zip("qkv", jnp.split(fused["qkv"]["kernel"], (4, 6), 1), strict=True)
    }
    settings = {"ns_dtype": None, "scaling": "spectral", "normuon_b2": 0.9}
    tx = ok.muon(0.1, split_outputs={"qkv/*": sizes}, **settings)
    got, state = tx.update(fused, tx.init(fused), fused)
    alone = ok.muon(0.1, **settings)
    expected, _ = alone.update(apart, alone.init(apart), apart)
    joined = jnp.concatenate([expected[name]["kernel"] for name in "qkv"], axis=1)
    np.testing.assert_allclose(got["qkv"]["kernel"], joined, atol=1e-6)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert shapes == [(4, 8), (1, 8)]  # momentum and NorMuon's moment, in the parameter's place
    with pytest.raises(ValueError, match="add up to its 8 outputs"):
        ok.muon(0.1, split_outputs={"qkv/*": (4, 2)}).init(fused)


def test_heads_are_a_batch():
    kernel = random_like(jnp.zeros((6, 2, 3)), 0)  # (d, heads, head_dim)
    per_head = {"query/*": ok.MatrixAxes((1,), (0,), (2,))}
    tx = ok.orthogonalize_updates(ns_dtype=None, matrix_axes=per_head)
    got, _ = tx.update({"query": {"kernel": kernel}}, tx.init(None))
    for head in range(2):
        expected = newton_schulz(kernel[:, head])
        np.testing.assert_allclose(got["query"]["kernel"][:, head], expected, atol=1e-6)


def test_normuon_is_a_link_of_muon():
    params = {"kernel": random_like(jnp.zeros((3, 4)), 9)}
    got = trajectory(ok.muon(0.1, normuon_b2=0.9, ns_dtype=None), params)
    chain = optax.chain(
        ok.scale_by_muon(ns_dtype=None),
        ok.scale_by_normuon(0.9),
        ok.scale_by_matrix_shape(),
        optax.scale_by_learning_rate(0.1),
    )
    chex.assert_trees_all_close(got, trajectory(chain, params), atol=1e-6)
    with pytest.raises(ValueError, match="normuon_b2 must be >= 0 and < 1, got 1"):
        ok.muon(0.1, normuon_b2=1.0)
