"""The first pieces, wrappers and recipes on numbers that a reader can check by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

import optimkit as ok
from optimkit.wrappers.momentum_reset import reset_warmup_factor


def run(tx, params, gradients):
    """Updates after each gradient, at the same parameters."""
    tx = optax.with_extra_args_support(tx)
    state, out = tx.init(params), []
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        out.append(updates)
    return out, state


class UpdateMathTest(chex.TestCase):
    """Each method's update and state with and without jit, on device and under pmap."""

    @chex.all_variants
    def test_lion(self):
        tx = ok.lion(0.1, b1=0.5, b2=0.9, weight_decay=0.5)
        params = {"w": jnp.array([2.0, -1.0, 0.0])}
        grads = {"w": jnp.array([1.0, -3.0, 0.0])}
        updates, state = self.variant(tx.update)(grads, self.variant(tx.init)(params), params)
        # sign(0.5 * 0 + 0.5 g) + 0.5 w, times -0.1
        np.testing.assert_allclose(updates["w"], [-0.2, 0.15, 0.0], atol=1e-7)
        chex.assert_trees_all_equal_shapes(state[0].mu, params)
        np.testing.assert_allclose(state[0].mu["w"], [0.1, -0.3, 0.0], rtol=1e-6)

    @chex.all_variants
    def test_adam_direction(self):
        tx = ok.scale_by_adam(0.9, 0.99, 1e-8)
        params = jnp.array([0.0, 0.0])
        state = self.variant(tx.init)(params)
        updates, state = self.variant(tx.update)(jnp.array([2.0, -0.5]), state)
        np.testing.assert_allclose(updates, [1.0, -1.0], rtol=1e-5)
        chex.assert_shape([state.mu, state.nu], (2,))
        np.testing.assert_allclose(state.nu, [0.04, 0.0025], rtol=1e-5)
        assert int(state.count) == 1

    @chex.all_variants
    def test_clip_by_tracked_max(self):
        tx = ok.clip_by_tracked_max(0.5)
        state = self.variant(tx.init)(jnp.zeros(2))
        first, state = self.variant(tx.update)(jnp.array([1.0, 0.5]), state)
        second, state = self.variant(tx.update)(jnp.array([8.0, 0.5]), state)
        np.testing.assert_allclose(first, [1.0, 0.5], rtol=1e-6)
        # T = 0.5 * 0.5 + 0.5 * 8 = 4.25 over 1 - 0.5^2
        np.testing.assert_allclose(second, [4.25 / 0.75, 0.5], rtol=1e-6)
        chex.assert_shape(state.tracked_max, ())

    @chex.all_variants
    def test_adamp_projects_a_tangential_gradient(self):
        tx = ok.adamp(0.1)
        params = {"kernel": jnp.array([[1.0], [0.0]])}
        grads = {"kernel": jnp.array([[0.001], [1.0]])}
        updates, _ = self.variant(tx.update)(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["kernel"], [[0.0], [-0.1]], atol=1e-6)

    @chex.all_variants
    def test_momentum_reset(self):
        tx = ok.momentum_reset(optax.trace(0.5), interval=2)
        state = self.variant(tx.init)(jnp.zeros(1))
        out = []
        for _ in range(3):
            updates, state = self.variant(tx.update)(jnp.ones(1), state)
            out.append(float(updates[0]))
        # The second step forgets the first; the third remembers the second.
        assert out == [1.0, 1.0, 1.5]


class AgainstOptaxTest(parameterized.TestCase):
    """Where optax has the same method, the numbers are the same."""

    @parameterized.parameters(0.0, 0.1)
    def test_lion(self, weight_decay):
        params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
        grads = [{"w": jnp.sin(params["w"] * k)} for k in range(1, 6)]
        ours, _ = run(ok.lion(1e-2, weight_decay=weight_decay), params, grads)
        theirs, _ = run(optax.lion(1e-2, weight_decay=weight_decay), params, grads)
        chex.assert_trees_all_close(ours, theirs, rtol=1e-6)

    def test_adam(self):
        params = jnp.linspace(-1.0, 1.0, 5)
        grads = [jnp.cos(params * k) for k in range(1, 8)]
        ours, _ = run(ok.scale_by_adam(0.9, 0.99, 1e-6), params, grads)
        theirs, _ = run(optax.scale_by_adam(0.9, 0.99, 1e-6), params, grads)
        chex.assert_trees_all_close(ours, theirs, rtol=2e-5)


def test_adam_survives_a_zero_float16_gradient_where_optax_does_not() -> None:
    params = jnp.ones(2, jnp.float16)
    zero = jnp.zeros(2, jnp.float16)
    (ours,), _ = run(ok.scale_by_adam(), params, [zero])
    (theirs,), _ = run(optax.scale_by_adam(), params, [zero])
    assert np.all(np.isfinite(ours))
    assert np.all(np.isnan(theirs))


def test_adam_takes_a_schedule_for_b1_and_prefers_the_global_count() -> None:
    tx = ok.scale_by_adam(b1=lambda count: jnp.where(count < 1, 0.0, 0.5))
    state = tx.init(jnp.zeros(1))
    _, state = tx.update(jnp.ones(1), state)
    np.testing.assert_allclose(state.mu, [1.0])
    _, state = tx.update(jnp.zeros(1), state)
    np.testing.assert_allclose(state.mu, [0.5])
    _, again = tx.update(jnp.zeros(1), state, global_count=jnp.int32(0))
    np.testing.assert_allclose(again.mu, [0.0])


def test_lion_stores_its_momentum_in_the_dtype_asked_for() -> None:
    state = ok.lion(0.1, mu_dtype=jnp.bfloat16).init(jnp.ones(4))
    assert state[0].mu.dtype == jnp.bfloat16


def test_lion_bounds_the_weights() -> None:
    tx = ok.lion(0.1, weight_decay=2.0)
    params = jnp.array([3.0, -3.0])
    state = tx.init(params)
    for _ in range(100):
        updates, state = tx.update(jnp.array([-1.0, 1.0]), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(jnp.abs(params), [0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("moments", "counts", "expected"),
    [
        # Adam core, constant gradient, D = 2: |update| at steps 1..4 from the closed form.
        ("before", "before", [1.0, 1.0, 1.0, 1.0]),
        ("before", "never", [1.0, None, None, None]),
        ("after", "after", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_momentum_reset_of_adam(moments: str, counts: str, expected: list) -> None:
    tx = ok.momentum_reset(
        ok.scale_by_adam(0.9, 0.99, 0.0), interval=2, moments=moments, counts=counts
    )
    out, _ = run(tx, jnp.zeros(1), [jnp.ones(1)] * 4)
    for got, wanted in zip(out, expected, strict=True):
        if wanted is not None:
            assert float(got[0]) == pytest.approx(wanted, rel=1e-5)
    if counts == "never":
        # At step 2 the moments are one step old but corrected for two.
        wanted = (0.1 / (1 - 0.9**2)) / np.sqrt(0.01 / (1 - 0.99**2))
        assert float(out[1][0]) == pytest.approx(wanted, rel=1e-5)


def test_momentum_reset_leaves_rates_seeds_and_statistics_alone() -> None:
    inner = optax.chain(
        ok.clip_by_tracked_max(0.9),
        ok.inject_hyperparams(ok.scale_by_adam)(b1=lambda count: 0.9 + 0.01 * count),
    )
    tx = ok.momentum_reset(inner, interval=2, moments="after", counts="after")
    params = {"w": jnp.zeros(3)}
    # What is reset after step 2 is reset on entry to step 3, which then makes its own step.
    _, state = run(tx, params, [{"w": jnp.ones(3)}] * 3)
    tracked, injected = state.inner_state
    assert float(tracked.tracked_max["w"]) == pytest.approx(1 - 0.9**3)
    assert int(tracked.count) == 1
    assert int(injected.count) == 3
    assert float(injected.hyperparams["b1"]) == pytest.approx(0.92)
    np.testing.assert_allclose(injected.inner_state.mu["w"], 0.08, rtol=1e-5)
    assert int(injected.inner_state.count) == 1


def test_momentum_reset_leaves_copies_of_parameters_alone() -> None:
    params, grads = {"w": jnp.array([4.0])}, [{"w": jnp.ones(1)}] * 2
    inner = ok.schedule_free_sgd(0.5)
    _, plain = run(inner, params, grads)
    _, state = run(ok.momentum_reset(inner, 2, counts="never"), params, grads)
    np.testing.assert_array_equal(optax.tree.get(state, "z")["w"], optax.tree.get(plain, "z")["w"])


def test_momentum_reset_inside_masked_and_around_it() -> None:
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    mask = {"a": True, "b": False}
    grads = [jax.tree.map(jnp.ones_like, params)] * 3
    around, _ = run(ok.momentum_reset(optax.masked(optax.trace(0.5), mask), 3), params, grads)
    inside, _ = run(optax.masked(ok.momentum_reset(optax.trace(0.5), 3), mask), params, grads)
    chex.assert_trees_all_close(around, inside)
    np.testing.assert_allclose(around[2]["a"], [1.0, 1.0])
    np.testing.assert_allclose(around[1]["a"], [1.5, 1.5])


def test_momentum_reset_off() -> None:
    out, _ = run(ok.momentum_reset(optax.trace(1.0), 0), jnp.zeros(1), [jnp.ones(1)] * 3)
    assert [float(u[0]) for u in out] == [1.0, 2.0, 3.0]


def test_reset_warmup_factor() -> None:
    factors = [float(reset_warmup_factor(jnp.int32(t), 10, 4)) for t in range(1, 16)]
    assert factors[:9] == [1.0] * 9
    assert factors[9] == pytest.approx(0.01)
    assert factors[11] == pytest.approx(1 - 0.99 * (1 + np.cos(2 * np.pi / 5)) / 2)
    assert factors[13:] == [1.0, 1.0]


def test_adamp_leaves_a_radial_gradient_alone() -> None:
    params = {"kernel": jnp.array([[1.0], [1.0]])}
    (update,), _ = run(ok.adamp(1.0), params, [params])
    np.testing.assert_allclose(update["kernel"], [[-1.0], [-1.0]], rtol=1e-5)


def test_adamp_decays_projected_weights_less() -> None:
    params = {"kernel": jnp.array([[1.0], [0.0]])}
    tangential = {"kernel": jnp.array([[0.0], [1.0]])}
    (update,), _ = run(ok.adamp(1.0, weight_decay=0.5, wd_ratio=0.1), params, [tangential])
    np.testing.assert_allclose(update["kernel"], [[-0.05], [-1.0]], atol=1e-6)
    masked = ok.adamp(1.0, weight_decay=0.5, mask={"kernel": False})
    (update,), _ = run(masked, params, [tangential])
    np.testing.assert_allclose(update["kernel"], [[0.0], [-1.0]], atol=1e-6)


def test_adamp_channel_axis_may_name_several_axes() -> None:
    params = {"blocks": {"kernel": jnp.ones((2, 3, 4))}}
    with pytest.raises(ValueError, match="can be read in several ways"):
        ok.adamp(0.1).init(params)
    tx = ok.adamp(0.1, channel_axis=lambda path, leaf: (1, 2))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["blocks"]["kernel"].shape == (2, 3, 4)


def test_injected_hyperparameters_stay_wide_beside_bfloat16() -> None:
    params = jnp.ones(2, jnp.bfloat16)
    ours = ok.inject_hyperparams(ok.adamp)(1e-3).init(params)
    theirs = optax.inject_hyperparams(optax.adamw)(1e-3).init(params)
    assert float(ours.hyperparams["b2"]) == pytest.approx(0.999)
    assert float(theirs.hyperparams["b2"]) == 1.0  # what ours avoids
    assert "channel_axis" not in ours.hyperparams


def test_a_new_rate_compiles_nothing() -> None:
    tx = ok.inject_hyperparams(ok.lion)(learning_rate=1)
    params = jnp.ones(2)
    state, traces = tx.init(params), []

    @jax.jit
    def step(state, params):
        traces.append(1)
        return tx.update(jnp.ones(2), state, params)

    first, state = step(state, params)
    state.hyperparams["learning_rate"] = jnp.float32(0.5)
    second, state = step(state, params)
    np.testing.assert_allclose(first, [-1.0, -1.0])
    np.testing.assert_allclose(second, [-0.5, -0.5])
    assert len(traces) == 1


if __name__ == "__main__":
    absltest.main()
