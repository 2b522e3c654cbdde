"""SCALE's momentum: an average for the output layer, and none for the rest."""

from __future__ import annotations

from typing import Any

import jax
import optax

from optimkit.layout import HEAD_WORDS, has_word, named_leaves, select_leaves
from optimkit.leaves import check_structure
from optimkit.protocols import (
    GradientTransformation,
    LeafSelector,
    Method,
    PyTree,
    transformation,
)
from optimkit.transforms.momentum import ema_momentum


def last_layer_tree(params: PyTree, last_layer: LeafSelector) -> PyTree:
    """A tree of bools: which leaves belong to the output layer.

    Args:
      params: the tree to choose from.
      last_layer: a word, a list of paths or patterns, ``(path, leaf) -> bool``, or a tree of bools.
        A word matches a component of the path, or its end after an underscore: ``"head"`` is
        ``lm_head/kernel`` and not ``multi_head_attention/kernel``.

    Raises:
      ValueError: if a word that is not usual for such layers, or a pattern, matches nothing; or for
        bools of another structure.

    >>> last_layer_tree({"lm_head": {"kernel": 1.0}, "multi_head_attention": 1.0}, "head")
    {'lm_head': {'kernel': True}, 'multi_head_attention': False}
    """
    if not isinstance(last_layer, str):
        return select_leaves(last_layer, params, default=lambda *_: False, argument="last_layer")
    names = [name for name, _ in named_leaves(params)]
    if last_layer not in HEAD_WORDS and names and not any(has_word(n, [last_layer]) for n in names):
        raise ValueError(
            f"last_layer: no component of a path is {last_layer!r} in {names}; for whole paths, "
            "write a list"
        )
    return select_leaves(
        lambda name, _: has_word(name, [last_layer]), params, default=lambda *_: False
    )


def last_layer_momentum(decay: Any = 0.9, *, last_layer: LeafSelector) -> GradientTransformation:
    r"""Averages the gradients of the output layer, and hands on all others as they are.

    .. math:: m_t = b\, m_{t-1} + (1-b)\, g_t, \qquad m_0 = 0

    The variance of the gradient is largest in the output layer, and momentum there gives most of
    what momentum everywhere would. There is no bias correction: put a normalisation behind it.

    Args:
      decay: b, in [0, 1); 0.9 is the authors'.
      last_layer: which leaves: a word such as ``"head"``, which matches a component of a path or
        its end after an underscore; a list of paths or patterns; ``(path, leaf) -> bool``; or a
        tree of bools. None, and a usual word (``"head"``, ``"lm_head"``, ``"logits"``) in a tree
        without such a layer, choose nothing: tied embeddings have no layer of their own.

    Returns:
      A transformation that works anywhere in a chain; 4 bytes of state a f32 parameter of the
      chosen leaves, and ``optax.MaskedNode`` for the others.

    Raises:
      ValueError: if decay is out of range, a gradient has another shape, or a path, pattern or
        another word matches nothing.

    >>> import jax.numpy as jnp
    >>> tx = last_layer_momentum(0.5, last_layer="head")
    >>> grads = {"dense": jnp.ones(1), "head": jnp.ones(1)}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> updates["dense"].tolist(), updates["head"].tolist()
    ([1.0], [0.5])

    Reference: Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", 2025,
    arXiv 2506.16659.
    """
    inner = optax.masked(ema_momentum(decay), lambda tree: last_layer_tree(tree, last_layer))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        check_structure(
            _places(updates), _places(state.inner_state.mu), what="gradient", like="the state"
        )
        return inner.update(updates, state, params, **extra)

    return transformation(inner.init, update)


def _places(tree: PyTree) -> PyTree:
    """The tree with a leaf wherever it holds an array, or the place of a masked one."""
    return jax.tree.map(lambda _: 0, tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _any_kernel(name: str, leaf: Any) -> bool:
    """The choice of the suite, whose trees have no output layer in common."""
    del leaf
    return "kernel" in name


RECORD = Method(
    factory=last_layer_momentum,
    kind="piece",
    summary="momentum for the output layer alone",
    example={"last_layer": _any_kernel},
    traced=("decay",),
    static=("last_layer",),
    position="any",
    communication="none",
    response="proportional",
    state_bytes=4,
    moved_bytes=20,
    paper='Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", 2025, '
    "arXiv 2506.16659",
    reference="OptimAI-Lab/Minimalist_LLM_Pretraining@f5bd4e754eb9:"
    "mem_eff_pt/pt_scale/scale_optimizer.py:SCALE",
    licence="",
)
