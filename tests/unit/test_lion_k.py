"""Lion-K: subgradients against their definition, the constraints, and the Lyapunov function."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import optimkit as ok
from optimkit.diagnostics import constraint_violation, lion_k_lyapunov
from optimkit.transforms.kappa import KAPPAS, kappa_function, kappa_subgradient

ARGUMENTS = {
    "lp": {"p": 1.5},
    "soft_l1": {"threshold": 0.5},
    "top_k": {"k": 2},
    "huber": {"threshold": 0.5},
    "log_cosh": {"sharpness": 2.0},
}
"""One choice of arguments for the functions that need some."""

HAND = (
    ("l1", {}, [3.0, 0.0, -4.0], [1.0, 0.0, -1.0]),
    ("l2", {}, [3.0, 0.0, -4.0], [0.6, 0.0, -0.8]),
    ("lp", {"p": 2.0}, [3.0, 0.0, -4.0], [0.6, 0.0, -0.8]),
    ("lp", {"p": 1.0}, [3.0, 0.0, -4.0], [1.0, 0.0, -1.0]),
    ("lp", {"p": 3.0}, [1.0, 1.0, -2.0], [0.01 ** (1 / 3), 0.01 ** (1 / 3), -(0.64 ** (1 / 3))]),
    ("linf", {}, [3.0, -4.0, 4.0], [0.0, -0.5, 0.5]),
    ("soft_l1", {"threshold": 1.0}, [0.5, 1.0, -2.0], [0.0, 0.0, -1.0]),
    ("top_k", {"k": 2}, [3.0, -1.0, -4.0], [1.0, 0.0, -1.0]),
    ("top_k", {"k": 2}, [1.0, -1.0, -4.0], [0.5, -0.5, -1.0]),  # the tie shares the last place
    ("top_k", {"k": 9}, [3.0, 0.0, -4.0], [1.0, 0.0, -1.0]),
    ("huber", {"threshold": 2.0}, [1.0, 5.0, -4.0], [0.5, 1.0, -1.0]),
    ("half_squared", {}, [1.0, 5.0, -4.0], [1.0, 5.0, -4.0]),
    ("log_cosh", {"sharpness": 2.0}, [0.0, 0.5, -50.0], [0.0, np.tanh(1.0), -1.0]),
    ("group_l2", {}, [3.0, 0.0, -4.0], [0.6, 0.0, -0.8]),
    ("nuclear", {}, [3.0, 0.0, -4.0], [0.6, 0.0, -0.8]),
)


class SubgradientTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*HAND)
    def test_by_hand(self, name, arguments, x, expected):
        subgradient = self.variant(kappa_subgradient(name, **arguments))
        np.testing.assert_allclose(subgradient(jnp.array(x)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", KAPPAS)
@pytest.mark.parametrize("shape", [(6,), (4, 3), ()])
def test_subgradient_and_conjugate_obey_fenchel(name: str, shape: tuple[int, ...]) -> None:
    """K(y) >= K(x) + <s, y-x> for all y, and K(x) + K*(s) = <s, x> with s in the domain of K*."""
    if name == "top_k" and not shape:
        pytest.skip("two entries of one: the same as l1")
    function = kappa_function(name, **ARGUMENTS.get(name, {}))
    rng = np.random.default_rng(0)

    @jax.jit
    def gaps(x, y):
        (s,) = function.subgradient([x])
        tangent = function.value([x]) + jnp.sum(s * (y - x))
        below = function.value([y]) - tangent
        equal = function.value([x]) + function.conjugate([s]) - jnp.sum(s * x)
        return below, equal, function.gauge([s])

    with jax.enable_x64(True):
        exact = 1e-3 if name == "nuclear" else 1e-9  # Newton-Schulz: singular values near one
        for _ in range(5):
            x, y = jnp.asarray(rng.normal(size=(2, *shape)))
            below, equal, gauge = gaps(x, y)
            assert below >= -exact
            np.testing.assert_allclose(equal, 0, atol=exact)
            assert gauge <= 1 + 1e-9


@pytest.mark.parametrize("name", KAPPAS)
def test_zero_gives_zero_and_extremes_stay_finite(name: str) -> None:
    subgradient = jax.jit(kappa_subgradient(name, **ARGUMENTS.get(name, {})))
    for shape in ((3,), (3, 2), ()):
        zeros = jnp.zeros(shape)
        np.testing.assert_array_equal(subgradient(zeros), zeros)
        for size in (1e-45, 1e-38, 1e-20, 1e15, 1e30):
            x = jnp.full(shape, size)
            assert jnp.all(jnp.isfinite(subgradient(x)))
            mixed = x if not shape else x.at[0].set(1.0)
            assert jnp.all(jnp.isfinite(subgradient(mixed)))
    np.testing.assert_array_equal(subgradient(jnp.zeros((0, 3))), jnp.zeros((0, 3)))


def test_group_axis_and_nuclear_on_a_matrix() -> None:
    x = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    outputs = kappa_subgradient("group_l2", axis=0)(x)
    np.testing.assert_allclose(outputs, [[0.6, 0.0], [0.8, 0.0]], rtol=1e-6)
    inputs = kappa_subgradient("group_l2", axis=-1)(x)
    np.testing.assert_allclose(inputs, [[1.0, 0.0], [1.0, 0.0]], rtol=1e-6)
    rotation = jnp.array([[0.6, -0.8], [0.8, 0.6]])
    polar = kappa_subgradient("nuclear")(rotation @ jnp.diag(jnp.array([5.0, 0.2])))
    np.testing.assert_allclose(polar, rotation, atol=1e-3)
    assert jnp.linalg.norm(polar, 2) <= 1 + 1e-6


def test_relative_threshold_does_not_see_the_scale() -> None:
    subgradient = kappa_subgradient("soft_l1", threshold=1.0, relative=True)
    x = jnp.array([1.0, 1.0, 3.0])  # root mean square 1.9
    for scale in (1e-6, 1.0, 1e6):
        np.testing.assert_array_equal(subgradient(scale * x), [0.0, 0.0, 1.0])
    np.testing.assert_array_equal(subgradient(0 * x), jnp.zeros(3))


# -- the optimizer ----------------------------------------------------------------------------

TREE = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([0.5, 0.0, 3.0])}


def run(tx, params, grads_of, steps):
    @jax.jit
    def all_steps(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads_of(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[0][0]

    return all_steps(params)


def test_l1_is_lion_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    pull = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), TREE)
    grads_of = lambda params: jax.tree.map(lambda p, q: jnp.sin(9 * p) + q, params, pull)  # noqa: E731
    ours = run(ok.lion_k(0.01, weight_decay=0.1), TREE, grads_of, 50)
    lion = run(ok.lion(0.01, weight_decay=0.1), TREE, grads_of, 50)
    chex.assert_trees_all_equal(ours, lion)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l2", {"a": [[0.6, 0.0]], "b": [0.0, 0.0, -0.8]}),
        ("lp", {"a": [[0.6, 0.0]], "b": [0.0, 0.0, -0.8]}),
        ("linf", {"a": [[0.0, 0.0]], "b": [0.0, 0.0, -1.0]}),
    ],
)
def test_global_scope_takes_one_norm(name: str, expected) -> None:
    arguments = {"p": 2.0} if name == "lp" else {}
    tx = ok.lion_k(1.0, kappa=name, scope="global", **arguments)
    grads = {"a": jnp.array([[3.0, 0.0]]), "b": jnp.array([0.0, 0.0, -4.0])}
    updates, _ = jax.jit(tx.update)(grads, tx.init(TREE), TREE)
    for leaf, wanted in expected.items():
        np.testing.assert_allclose(-updates[leaf], wanted, rtol=1e-6)


def test_a_callable_kappa() -> None:
    ours = ok.lion_k(0.1, kappa=lambda x: x / (1 + jnp.abs(x)))
    updates, _ = ours.update(jnp.array([10.0]), ours.init(jnp.zeros(1)), jnp.zeros(1))
    np.testing.assert_allclose(updates, [-0.05], rtol=1e-5)  # the mix is 0.1 * 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": "l3"}, "kappa must be one of 'l1', 'lp', .*'nuclear', got 'l3'"),
        ({"kappa": "lp"}, "kappa='lp' needs 'p'"),
        ({"kappa": "lp", "p": 0.5}, "p must be >= 1"),
        ({"kappa": "l1", "p": 2.0}, "kappa='l1' has no argument 'p'"),
        ({"kappa": "huber", "threshold": 0.0}, "threshold must be > 0"),
        ({"kappa": "top_k", "k": 0}, "k must be an integer >= 1"),
        ({"kappa": "l1", "scope": "global"}, "scope='global' is for l2, lp, linf"),
        ({"kappa": jnp.sign, "p": 2.0}, "a kappa of your own takes no"),
        ({"b1": 1.1}, "b1 must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ok.lion_k(0.1, **arguments)


def test_nuclear_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"nuclear.*\(2, 2, 2\)"):
        kappa_subgradient("nuclear")(jnp.ones((2, 2, 2)))


# -- the problem that it solves ---------------------------------------------------------------

TARGET = jnp.array([2.0, -0.3, 0.5, -1.5])


@pytest.mark.parametrize("name", ["l1", "l2", "lp", "soft_l1"])
def test_it_ends_at_the_constrained_minimum(name: str) -> None:
    """The minimum of |x - target|^2/2 + K*(x), at weight decay 1."""
    arguments = {"soft_l1": {"threshold": 0.4}, "lp": {"p": 1.5}}.get(name, {})
    rate = optax.cosine_decay_schedule(0.02, 4000)
    tx = ok.lion_k(rate, 0.9, 0.99, weight_decay=1.0, kappa=name, **arguments)
    x = run(tx, jnp.zeros(4), lambda x: x - TARGET, 4000)
    if name == "l2":
        expected = TARGET / np.linalg.norm(TARGET)
    elif name == "lp":
        expected = _nearest_in_q_ball(np.asarray(TARGET, np.float64), q=3.0)
    else:  # K* is e times the 1-norm, in the box
        shrunk = np.maximum(np.abs(TARGET) - arguments.get("threshold", 0.0), 0)
        expected = np.clip(np.sign(TARGET) * shrunk, -1, 1)
    np.testing.assert_allclose(x, expected, atol=2e-3)
    function = kappa_function(name, **arguments)
    assert constraint_violation(x, function, 1.0) <= 1e-5


def _nearest_in_q_ball(target: np.ndarray, q: float) -> np.ndarray:
    """The nearest point with |x|_q <= 1: x + mu |x|^(q-1) sign x = target, mu by bisection."""

    def at(mu: float) -> np.ndarray:
        x = np.zeros_like(target)
        for i, t in enumerate(np.abs(target)):
            low, high = 0.0, t
            for _ in range(80):
                middle = (low + high) / 2
                low, high = (middle, high) if middle + mu * middle ** (q - 1) < t else (low, middle)
            x[i] = low
        return x * np.sign(target)

    low, high = 0.0, 1e3
    for _ in range(80):
        mu = (low + high) / 2
        low, high = (mu, high) if np.sum(np.abs(at(mu)) ** q) > 1 else (low, mu)
    return at(low)


def test_decay_brings_weights_into_the_box_and_keeps_them_there() -> None:
    start = {"w": jnp.array([3.0, -0.1, 8.0])}
    assert constraint_violation(start, "l1", 2.0) == 15.0
    tx = ok.lion_k(0.01, weight_decay=2.0)
    after = run(tx, start, lambda p: jax.tree.map(lambda x: jnp.full_like(x, -1.0), p), 1000)
    assert constraint_violation(after, "l1", 2.0) <= 1e-5
    np.testing.assert_allclose(after["w"], 0.5, rtol=1e-5)  # pushed outward, to 1/wd
    tenth = run(tx, start, lambda p: jax.tree.map(jnp.ones_like, p), 10)
    assert constraint_violation(tenth, "l1", 2.0) <= 15.0 * (1 - 0.01 * 2.0) ** 10


def test_violation_of_other_norms() -> None:
    x = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([12.0])}
    assert constraint_violation(x, "l2", 1.0) == 11.0  # the worst leaf
    np.testing.assert_allclose(constraint_violation(x, "l2", 1.0, scope="global"), 12.0)
    np.testing.assert_allclose(constraint_violation(x, "linf", 0.1), 0.2, rtol=1e-5)
    assert constraint_violation(x, "half_squared", 1.0) == 0
    top = kappa_function("top_k", k=2)
    np.testing.assert_allclose(constraint_violation(x, top, 0.2), 1.4, rtol=1e-5)


@pytest.mark.parametrize("name", ["log_cosh", "huber", "half_squared"])
def test_lyapunov_never_grows_along_the_flow(name: str) -> None:
    """Euler steps of the flow on a quadratic whose minimum lies outside the box."""
    alpha, gamma, epsilon, decay, h = 1.3, 0.8, 0.6, 0.7, 1e-3
    function = kappa_function(name, **ARGUMENTS.get(name, {}))
    with jax.enable_x64(True):
        scales = jnp.array([3.0, 1.0, 0.2])
        target = jnp.array([2.0, -0.5, 1.0])

        def loss(x):
            return jnp.sum(scales * jnp.square(x - target)) / 2

        def step(carry, _):
            x, m = carry
            gradient = jax.grad(loss)(x)
            ahead = m - epsilon * (alpha * gradient + gamma * m)
            (direction,) = function.subgradient([ahead])
            x, m = x + h * (direction - decay * x), m - h * (alpha * gradient + gamma * m)
            value = lion_k_lyapunov(
                x,
                m,
                loss(x),
                kappa=function,
                weight_decay=decay,
                alpha=alpha,
                gamma=gamma,
                epsilon=epsilon,
            )
            return (x, m), value

        start = (jnp.array([1.0, 0.5, -1.4]), jnp.array([0.5, 0.1, -1.0]))
        _, values = jax.lax.scan(step, start, None, length=8000)
    values = np.asarray(values)
    assert np.all(np.diff(values) <= 1e-9)
    assert values[0] - values[-1] > 0.1


def test_lyapunov_is_infinite_outside_the_box() -> None:
    settings = {"weight_decay": 0.5, "alpha": 1.0, "gamma": 1.0, "epsilon": 0.0}
    inside, outside = jnp.array([2.0]), jnp.array([2.1])
    m = jnp.zeros(1)
    assert lion_k_lyapunov(inside, m, 1.0, kappa="l1", **settings) == 1.0
    assert lion_k_lyapunov(outside, m, 1.0, kappa="l1", **settings) == jnp.inf


def test_lyapunov_checks_its_trees() -> None:
    settings = {"kappa": "l1", "weight_decay": 1.0, "alpha": 1.0, "gamma": 1.0, "epsilon": 0.0}
    with pytest.raises(ValueError, match="momentum leaf 'a' has shape"):
        lion_k_lyapunov(TREE, {**TREE, "a": jnp.ones(2)}, 0.0, **settings)
    with pytest.raises(ValueError, match="weight_decay must be > 0"):
        lion_k_lyapunov(TREE, TREE, 0.0, **{**settings, "weight_decay": 0.0})
