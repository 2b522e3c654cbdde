"""Names, selectors and matrix readings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optimkit import layout
from optimkit.protocols import MatrixAxes

PARAMS = {
    "embed": {"embedding": np.zeros((5, 4))},
    "conv_0": {"kernel": np.zeros((2, 2, 3, 8))},
    "dense": {"kernel": np.zeros((4, 8)), "bias": np.zeros(8)},
    "lm_head": {"kernel": np.zeros((8, 5))},
}


def test_nnx_paths_lose_the_value_attribute() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    names = [name for name, _ in layout.named_leaves(nnx.state(model, nnx.Param))]
    assert sorted(names) == ["bias", "kernel"]


def test_a_dict_key_called_value_stays() -> None:
    assert [name for name, _ in layout.named_leaves({"a": {"value": 1.0}})] == ["a/value"]


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("decoder/lm_head/kernel", ["head"], True),
        ("multi_head_attention/kernel", ["head"], False),
        ("heads/kernel", ["head"], False),
        ("Conv_0/kernel", ["conv"], True),
        ("conv2/kernel", ["conv"], True),
        ("deconvolve/kernel", ["conv"], False),
    ],
)
def test_words_match_whole_components_or_suffixes(
    name: str, words: list[str], expected: bool
) -> None:
    assert layout.has_word(name, words) is expected


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("dense/kernel", (4, 8), MatrixAxes((), (0,), (1,))),
        ("embed/embedding", (5, 4), MatrixAxes((), (1,), (0,))),
        ("conv/kernel", (3, 3, 4, 8), MatrixAxes((), (0, 1, 2), (3,))),
        ("Conv_1/kernel", (3, 4, 8), MatrixAxes((), (0, 1), (2,))),
        ("attn/query/kernel", (8, 2, 4), MatrixAxes((), (0,), (1, 2))),
        ("attn/out/kernel", (2, 4, 8), MatrixAxes((), (0, 1), (2,))),
        ("dense/bias", (8,), None),
        ("scanned/norm/scale", (12, 8), None),
        ("temperature", (), None),
    ],
)
def test_default_reading(name: str, shape: tuple[int, ...], expected: MatrixAxes | None) -> None:
    assert layout.default_matrix_axes(name, shape) == expected


@pytest.mark.parametrize("shape", [(6, 4, 8), (2, 6, 4, 8)])
def test_an_ambiguous_leaf_is_refused_with_the_override(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"blocks/mlp/kernel.*matrix_axes=\{'blocks/mlp/kernel'"):
        layout.matrix_axes("blocks/mlp/kernel", np.zeros(shape))


def test_the_override_settles_it() -> None:
    stacked = MatrixAxes((0,), (1,), (2,))
    leaf = np.zeros((6, 4, 8))
    assert layout.matrix_axes("blocks/mlp/kernel", leaf, {"blocks/*": stacked}) == stacked
    assert layout.matrix_axes("blocks/mlp/kernel", leaf, lambda n, x: stacked) == stacked
    assert layout.matrix_axes("a/kernel", np.zeros((4, 8)), {"a/*": None}) is None
    with pytest.raises(ValueError, match="must name each axis"):
        layout.matrix_axes("a", leaf, {"a": MatrixAxes((), (0,), (1,))})


def test_selectors_of_every_form_agree() -> None:
    expected = {
        "embed": {"embedding": False},
        "conv_0": {"kernel": True},
        "dense": {"kernel": True, "bias": False},
        "lm_head": {"kernel": False},
    }
    select = lambda selector: layout.select_leaves(  # noqa: E731
        selector, PARAMS, default=layout.is_hidden_matrix, argument="matrix_leaves"
    )
    assert select(None) == expected
    assert select(expected) == expected
    assert select(["conv_*/kernel", "dense/kernel"]) == expected
    assert select(lambda path, leaf: path in ("conv_0/kernel", "dense/kernel")) == expected


def test_a_pattern_that_matches_nothing_raises() -> None:
    with pytest.raises(ValueError, match=r"matrix_leaves: 'dens/kernel' matches none"):
        layout.select_leaves(
            ["dens/kernel"], PARAMS, default=layout.is_hidden_matrix, argument="matrix_leaves"
        )


def test_a_tree_of_another_structure_raises() -> None:
    with pytest.raises(ValueError, match="another structure"):
        layout.select_leaves({"dense": True}, PARAMS, default=layout.is_hidden_matrix)


def test_describe_lists_every_leaf() -> None:
    table = layout.describe({**PARAMS, "blocks": {"kernel": np.zeros((6, 4, 8))}})
    assert "conv_0/kernel" in table
    assert "1 x (12 in, 8 out)" in table
    assert "ambiguous" in table
    assert "embedding" in table


def test_selectors_work_under_jit() -> None:
    @jax.jit
    def count(params: dict) -> jax.Array:
        chosen = layout.select_leaves(None, params, default=layout.is_hidden_matrix)
        return jnp.asarray(sum(jax.tree.leaves(chosen)))

    assert int(count(PARAMS)) == 2
