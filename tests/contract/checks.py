"""The ten rules as functions ``check(record, dtype)`` that raise AssertionError when broken.

Each function runs one rule for one record and one parameter dtype. The same functions judge the
broken probes, which shows that they can fail.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optimkit as ok
from optimkit import protocols
from optimkit.layout import named_leaves
from optimkit.leaves import map_param_state
from optimkit.protocols import Method
from tests.contract import trees


@contextlib.contextmanager
def dtype_mode(dtype: str) -> Iterator[None]:
    """64-bit types for float64, JAX's usual 32 otherwise."""
    with jax.enable_x64(dtype == "float64"):
        yield


def call(record: Method, tx: Any, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """One update, with the extra arguments that the record says it needs."""
    extras = record.extras(params, grads) if record.extras else {}
    return tx.update(grads, state, params, **extras)


def signature_of(tree: Any) -> list[tuple[str, tuple[int, ...], Any, bool]]:
    """Names, shapes, dtypes and weak types of all leaves."""
    return [
        (name, np.shape(leaf), jnp.result_type(leaf), bool(getattr(leaf, "weak_type", False)))
        for name, leaf in named_leaves(tree)
    ]


def assert_same_type(a: Any, b: Any, what: str) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b), f"{what}: structure changed"
    assert signature_of(a) == signature_of(b), (
        f"{what}: {sorted(set(map(str, signature_of(a))) ^ set(map(str, signature_of(b))))}"
    )


def assert_trees_equal(a: Any, b: Any, what: str, rtol: float = 0.0, atol: float = 0.0) -> None:
    for (name, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float64),
            np.asarray(y, np.float64),
            rtol=rtol,
            atol=atol,
            err_msg=f"{what}: leaf {name}",
        )


def all_finite(tree: Any) -> jax.Array:
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if _floating(x)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)


def _floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def raises(call_it: Any, kinds: tuple[type[Exception], ...], *words: str) -> None:
    """Asserts that a call raises one of ``kinds`` with every word in its message."""
    message = None
    try:
        call_it()
    except kinds as error:
        message = str(error)
    assert message is not None, f"nothing was raised; expected {[k.__name__ for k in kinds]}"
    missing = [word for word in words if word not in message]
    assert not missing, f"message {message!r} lacks {missing}"


# -- state ------------------------------------------------------------------------------------


def state_classes(state: Any) -> Iterator[type]:
    """Every NamedTuple class inside a state."""
    if isinstance(state, tuple):
        if hasattr(state, "_fields"):
            yield type(state)
        for child in state:
            yield from state_classes(child)
    elif isinstance(state, dict):
        for child in state.values():
            yield from state_classes(child)


def check_state(record: Method, dtype: str) -> None:
    params = trees.random_like_shapes(0, dtype)
    grads = trees.random_like_shapes(1, dtype)
    tx = record.build()
    abstract = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert_same_type(abstract, state, "init under eval_shape")
    after = jax.eval_shape(lambda g, s, p: call(record, tx, g, s, p)[1], grads, state, params)
    assert_same_type(state, after, "state after update")
    for leaf in jax.tree.leaves(state):
        assert hasattr(leaf, "dtype"), f"state holds {leaf!r}, which is no array"
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), "typed key in the state"
    for cls in state_classes(state):
        assert getattr(sys.modules[cls.__module__], cls.__name__, None) is cls, (
            f"{cls.__name__} is not defined at module level"
        )
        if cls.__module__.startswith("optimkit"):
            unknown = set(cls._fields) - set(protocols.STATE_FIELDS)
            assert not unknown, f"{cls.__name__}: fields {unknown} are not in STATE_FIELDS"
    names = {name for name, _ in named_leaves(params)}
    marks = map_param_state(
        tx.init,
        lambda name, leaf: "param" if name in names else "stray",
        lambda leaf: "other",
        state,
    )
    for mark, (name, leaf) in zip(jax.tree.leaves(marks), named_leaves(state), strict=True):
        assert mark != "stray", f"state leaf {name} stands under no parameter"
        assert mark == "param" or np.ndim(leaf) == 0, (
            f"state leaf {name} of shape {leaf.shape} is in no parameter's place"
        )
    found = optax.tree_map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)
    assert jax.tree.leaves(found) == [m == "param" for m in jax.tree.leaves(marks)]
    if dtype == "float32":
        check_state_bytes(record)


def check_state_bytes(record: Method) -> None:
    """The bytes a parameter that the record states are the bytes there are."""
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32)}}
    state = jax.eval_shape(record.build().init, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    measured = held / (256 * 256)
    assert abs(measured - record.state_bytes) < 0.1, (
        f"state is {measured:.2f} B per parameter, the record says {record.state_bytes}"
    )


# -- finite -----------------------------------------------------------------------------------


def check_finite(record: Method, dtype: str) -> None:
    params = trees.random_like_shapes(0, dtype)
    tx = record.build()

    @jax.jit
    def run(params: Any, sequence: Any) -> tuple[Any, Any, Any]:
        def step(carry: Any, grads: Any) -> Any:
            params, state = carry
            updates, state = call(record, tx, grads, state, params)
            fine = all_finite((updates, state))
            moved = jnp.stack([jnp.any(u != 0) for u in jax.tree.leaves(updates)])
            # Parameters stay where they are: this rule judges updates, not where they lead.
            return (params, state), (fine, moved)

        _, (fine, moved) = jax.lax.scan(step, (params, tx.init(params)), sequence)
        return fine, moved, [u.size for u in jax.tree.leaves(params)]

    sizes = trees.sizes(dtype, record.response)
    cases = {**sizes, "mixed": list(sizes.values())}
    for seed, (name, size) in enumerate(cases.items()):
        fine, moved, counts = run(params, trees.gradient_sequence(seed, dtype, size))
        assert np.all(fine), f"gradient size {name}: not finite at steps {np.flatnonzero(~fine)}"
        recovered = np.asarray(moved)[-trees.RECOVERY :].any(axis=0)
        alive = recovered | (np.asarray(counts) == 0)
        leaves = [leaf for leaf, _ in named_leaves(params)]
        dead = [leaf for leaf, ok_ in zip(leaves, alive, strict=True) if not ok_]
        # Float16 cannot show a step that is honestly tiny after a huge second moment.
        if dtype != "float16":
            assert not dead, f"gradient size {name}: {dead} never move again"


# -- dtype ------------------------------------------------------------------------------------


def check_dtype(record: Method, dtype: str) -> None:
    params = trees.random_like_shapes(0, dtype)
    grads = trees.random_like_shapes(1, dtype)
    wide = "float64" if dtype == "float64" else "float32"
    tx = record.build()
    for name, leaf in named_leaves(jax.eval_shape(tx.init, params)):
        if _floating(leaf):
            assert jnp.finfo(leaf.dtype).bits >= 32, f"state leaf {name} is {leaf.dtype}"

    @functools.partial(jax.jit, static_argnums=0)
    def two_steps(kind: str, params: Any, grads: Any) -> Any:
        del kind  # one compilation a dtype
        state = tx.init(params)
        _, state = call(record, tx, grads, state, params)
        return call(record, tx, grads, state, params)[0]

    updates = two_steps("given", params, grads)
    for (name, u), (_, p) in zip(named_leaves(updates), named_leaves(params), strict=True):
        assert u.dtype == p.dtype, f"update leaf {name} is {u.dtype}, the parameter {p.dtype}"
    if dtype in ("float16", "bfloat16"):

        def widen(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.astype(wide), tree)

        exact = two_steps("wide", widen(params), widen(grads))
        rounding = float(jnp.finfo(dtype).eps)
        assert_trees_equal(
            updates,
            exact,
            "computed in less than f32",
            rtol=2 * rounding,
            atol=float(jnp.finfo(dtype).smallest_normal),
        )
    injected = ok.inject_hyperparams(record.factory, static_args=_untouched(record))
    kept = jax.eval_shape(injected(**_arguments(record)).init, params)
    for name, value in kept.hyperparams.items():
        if _floating(value):
            assert jnp.finfo(value.dtype).bits >= 32, f"hyperparameter {name} is {value.dtype}"


def _arguments(record: Method) -> dict[str, Any]:
    made = {name: make() for name, make in record.example_made.items()}
    return {**record.example, **made}


def _untouched(record: Method) -> tuple[str, ...]:
    """Arguments for a factory without a record of its own (a probe): nothing but the traced."""
    parameters = inspect.signature(record.factory).parameters
    return tuple(name for name in parameters if name not in record.traced)


# -- compile ----------------------------------------------------------------------------------


def numeric_arguments(record: Method) -> dict[str, float]:
    """The traced arguments that have a number as default or example."""
    parameters = inspect.signature(record.factory).parameters
    values = {}
    for name in record.traced:
        value = record.example.get(name, parameters[name].default)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            values[name] = float(value)
    return values


def check_compile(record: Method, dtype: str) -> None:
    params = trees.random_like_shapes(0, dtype)
    grads = trees.random_like_shapes(1, dtype)
    values = numeric_arguments(record)
    parameters = inspect.signature(record.factory).parameters
    unlisted = set(parameters) - set(record.traced) - set(record.static)
    assert not unlisted, f"arguments {sorted(unlisted)} are neither traced nor static"
    traces = 0

    @jax.jit
    def step(values: Any, grads: Any, state: Any, params: Any) -> Any:
        nonlocal traces
        traces += 1
        tx = record.build(**values)
        return call(record, tx, grads, state, params)

    # Eager inits, which compile each operation, are the state rule's matter.
    first = jax.jit(record.build().init)(params)
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    updates, state = step(arrays, grads, first, params)
    nudged = {name: value * (1 - 2.0**-10) for name, value in arrays.items()}
    _, state = step(nudged, grads, state, params)
    assert traces == 1, f"a second step, with other values of {sorted(values)}, compiled again"

    @jax.jit
    def with_numbers(grads: Any, state: Any, params: Any) -> Any:
        return call(record, record.build(), grads, state, params)[0]

    concrete = with_numbers(grads, first, params)
    rounding = float(jnp.finfo(dtype).eps)
    assert_trees_equal(
        updates, concrete, "traced against concrete arguments", rtol=1e-3, atol=10 * rounding
    )


# -- compose ----------------------------------------------------------------------------------


def check_compose(record: Method, dtype: str) -> None:
    params = {"dense": {"kernel": jnp.full((4, 3), 0.5, dtype), "bias": jnp.ones((3,), dtype)}}
    rng = np.random.default_rng(2)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), params)
    tx = record.build()
    assert isinstance(tx, optax.GradientTransformationExtraArgs), "not ExtraArgs"

    def one_leaf_masked() -> Any:
        return optax.masked(record.build(), {"dense": {"kernel": True, "bias": False}})

    def partitioned() -> Any:
        labels = {"dense": {"kernel": "a", "bias": "b"}}
        return optax.partition({"a": record.build(), "b": optax.sgd(0.1)}, labels)

    several = optax.MultiSteps(record.build(), 1)
    wrapped = {
        "alone": record.build(),
        "chain": optax.chain(optax.identity(), record.build(), optax.identity()),
        "masked": one_leaf_masked(),
        "partition": partitioned(),
        # Its own gradient_transformation() drops extra arguments.
        "MultiSteps": optax.GradientTransformationExtraArgs(several.init, several.update),
        "apply_if_finite": optax.apply_if_finite(record.build(), 2),
    }

    def one_leaf(tree: Any) -> Any:
        return {"dense": {"kernel": tree["dense"]["kernel"]}}

    def scanned(transformation: Any, params: Any, grads: Any) -> Any:
        transformation = optax.with_extra_args_support(transformation)

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            extras = record.extras(params, grads) if record.extras else {}
            updates, state = transformation.update(grads, state, params, unknown=1, **extras)
            return (params, state), updates

        _, updates = jax.lax.scan(step, (params, transformation.init(params)), None, length=2)
        return jax.tree.map(lambda u: u[-1], updates)

    @jax.jit
    def everything(params: Any, grads: Any) -> Any:
        results = {name: scanned(inner, params, grads) for name, inner in wrapped.items()}
        results["one leaf"] = scanned(record.build(), one_leaf(params), one_leaf(grads))
        batch = jax.tree.map(lambda g: jnp.stack([g, -g]), grads)
        results["vmap"] = jax.vmap(lambda g: scanned(tx, params, g))(batch)
        return results

    results = everything(params, grads)
    alone = results["alone"]
    tolerance = record.tolerance.get("compose", 1e-5)
    rounding = 4 * float(jnp.finfo(dtype).eps)
    close = {"rtol": tolerance, "atol": rounding * tolerance / 1e-5}
    for name in ("chain", "MultiSteps", "apply_if_finite"):
        assert_trees_equal(results[name], alone, name, **close)
    for name in ("masked", "partition"):
        got = results[name]["dense"]["kernel"]
        assert_trees_equal(got, results["one leaf"]["dense"]["kernel"], name, **close)
    first = jax.tree.map(lambda u: u[0], results["vmap"])
    assert_trees_equal(first, alone, "vmap", **close)

    state = tx.init(params)
    eager, state = call(record, tx, grads, state, params)
    eager, _ = call(record, tx, grads, state, params)
    assert_trees_equal(eager, alone, "eager against jit", **close)
    if dtype == "float32":
        check_donation(record, params, grads)


def check_donation(record: Method, params: Any, grads: Any) -> None:
    tx = record.build()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = call(record, tx, grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    mine = jax.tree.map(jnp.copy, params)
    state = jax.tree.map(jnp.copy, tx.init(mine))
    mine, state, first = step(mine, state, grads)
    assert_trees_equal(
        mine, optax.apply_updates(params, first), "donated step", rtol=1e-6, atol=1e-7
    )


# -- trees ------------------------------------------------------------------------------------


def check_trees(record: Method, dtype: str) -> None:
    for kind, params in trees.other_trees(dtype).items():
        tx = record.build()
        grads = jax.tree.map(lambda p: p * 0 + 1, params)

        def one(params: Any, grads: Any, tx: Any = tx) -> Any:
            return call(record, tx, grads, tx.init(params), params)

        updates, _ = jax.eval_shape(one, params, grads)
        assert jax.tree.structure(updates) == jax.tree.structure(params), kind
        assert signature_of(updates) == signature_of(jax.eval_shape(lambda p: p, params)), kind
    for bad, words in (
        (jnp.ones((4, 3), jnp.complex64), "complex"),
        (jnp.ones((4, 3), int), "int"),
    ):
        params = {"layer": {"kernel": bad}}
        tx = record.build()

        def refused(params: Any = params, tx: Any = tx) -> Any:
            return call(record, tx, params, tx.init(params), params)

        raises(refused, (TypeError,), "layer/kernel", words)


# -- bad input --------------------------------------------------------------------------------


def check_bad_input(record: Method, dtype: str) -> None:
    params = {"layer": {"kernel": jnp.ones((2, 3), dtype)}}
    tx = record.build()
    state = tx.init(params)

    def update(grads: Any, params: Any = params) -> Any:
        return call(record, tx, grads, state, params)

    held = "params" in record.needs or any(np.ndim(x) for x in jax.tree.leaves(state))
    if "params" in record.needs:
        raises(
            lambda: tx.update(
                params, state, **(record.extras(params, params) if record.extras else {})
            ),
            (ValueError,),
            "params",
        )
    if held:
        for shape in ((1, 3), (3, 2), (3,), ()):
            raises(
                lambda shape=shape: update({"layer": {"kernel": jnp.ones(shape, dtype)}}),
                (ValueError,),
                "layer/kernel",
                str(shape),
            )
    raises(
        lambda: update(
            {"layer": {"kernel": params["layer"]["kernel"], "bias": jnp.ones(3, dtype)}}
        ),
        (ValueError,),
        "layer/bias" if held else "",
    )
    for name in numeric_arguments(record):
        raises(lambda name=name: record.build(**{name: float("nan")}), (ValueError,), name, "nan")


# -- restart ----------------------------------------------------------------------------------


def check_restart(record: Method, dtype: str) -> None:
    params = trees.random_like_shapes(0, dtype)
    tx = record.build()

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = call(record, tx, grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(params: Any, state: Any, seeds: range) -> Any:
        for seed in seeds:
            params, state = step(params, state, trees.random_like_shapes(seed, dtype))
        return params, state

    init = jax.jit(tx.init)
    straight = train(params, init(params), range(1, 7))
    half = train(params, init(params), range(1, 4))
    # What a checkpoint holds: plain arrays by position; the rest is built anew.
    stored = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(half)]
    shell = jax.eval_shape(lambda p: (p, record.build().init(p)), params)
    restored = jax.tree.unflatten(
        jax.tree.structure(shell),
        [
            jnp.asarray(np.frombuffer(raw, leaf.dtype).reshape(leaf.shape))
            for raw, leaf in zip(stored, jax.tree.leaves(shell), strict=True)
        ],
    )
    resumed = train(*restored, range(4, 7))
    for (name, a), (_, b) in zip(named_leaves(straight), named_leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{name} differs after a restart"


CHECKS = {
    "state": check_state,
    "finite": check_finite,
    "dtype": check_dtype,
    "compile": check_compile,
    "compose": check_compose,
    "trees": check_trees,
    "bad_input": check_bad_input,
    "restart": check_restart,
}
"""The rules that run on one device; ``tests/parallel`` and ``tests/goldens`` run the other two."""


def run_check(record: Method, rule: str, dtype: str) -> None:
    """Runs one rule for one record and dtype."""
    with dtype_mode(dtype):
        CHECKS[rule](record, dtype)
