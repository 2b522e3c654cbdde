"""Trees with a leading task axis: checks, norms, inner products and sums over the tasks.

A *stacked* tree has the structure of the parameters, and every leaf has one more axis in front, of
one entry a task. The methods of this package read it through these functions. Nothing here flattens
a leaf, so leaves may be sharded on any of the parameters' axes; the task axis stays whole.
"""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimkit.layout import named_leaves
from optimkit.leaves import check_match, check_real
from optimkit.numerics import compute_dtype, safe_div, safe_norm, saturate, sums_together
from optimkit.protocols import Array, PyTree

# ---------------------------------------------------------------------------------------------
# Checks and shapes
# ---------------------------------------------------------------------------------------------


def check_tasks(
    task_grads: PyTree, num_tasks: int | None = None, params: PyTree | None = None
) -> int:
    """Raises unless every leaf is real and has one leading axis of one entry a task.

    Args:
      task_grads: the stacked tree.
      num_tasks: how many tasks there must be; default what most leaves say.
      params: where given, every leaf must be shaped ``(num_tasks, *parameter.shape)``.

    Returns:
      The number of tasks; 1 for a tree without leaves when ``num_tasks`` is not given.

    Raises:
      TypeError: for a complex or integer leaf.
      ValueError: naming the leaf whose task axis is missing or of the wrong length.

    >>> check_tasks({"w": np.zeros((2, 5)), "b": np.zeros((2,))})
    2
    >>> check_tasks({"w": np.zeros((2, 5)), "b": np.zeros((3,))}, 2)
    Traceback (most recent call last):
    ...
    ValueError: task gradient leaf 'b' has shape (3,), but its leading axis must number the 2 tasks
    """
    check_real(task_grads, "task gradient")
    leaves = named_leaves(task_grads)
    counted = collections.Counter(np.shape(leaf)[0] for _, leaf in leaves if np.ndim(leaf))
    most = max(counted, key=lambda size: counted[size], default=1)
    tasks: int = most if num_tasks is None else num_tasks
    for name, leaf in leaves:
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != tasks:
            raise ValueError(
                f"task gradient leaf {name!r} has shape {np.shape(leaf)}, but its leading axis "
                f"must number the {tasks} tasks"
            )
    if params is not None:
        stacked = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct((tasks, *np.shape(p)), jnp.result_type(p)), params
        )
        check_match(task_grads, stacked, what="task gradient", like="the stacked parameter")
    return tasks


def zeros_per_task(params: PyTree, num_tasks: int) -> PyTree:
    """Zeros of shape ``(num_tasks, *parameter.shape)`` for every parameter, f32 at least.

    They are broadcast from the parameter, so that they are sharded as it is.
    """
    return jax.tree.map(
        lambda p: jnp.broadcast_to(
            jnp.expand_dims(jnp.zeros_like(p, dtype=compute_dtype(p)), 0),
            (num_tasks, *np.shape(p)),
        ),
        params,
    )


def per_task(values: Array, leaf: Array) -> Array:
    """One value a task, shaped so that it multiplies a stacked leaf: ``(K,) -> (K, 1, ..., 1)``."""
    return jnp.expand_dims(values, tuple(range(1, np.ndim(leaf))))


def _widen(leaf: Any) -> Array:
    return jnp.asarray(leaf, compute_dtype(leaf))


# ---------------------------------------------------------------------------------------------
# Reductions over the parameters
# ---------------------------------------------------------------------------------------------


def task_norms(task_grads: PyTree) -> Array:
    """The l2 norm of every task's gradient over the whole tree, shape ``(K,)``.

    f32 at least; it neither overflows nor underflows where the norm itself does not. A subnormal
    norm counts as 0, and a tree without leaves as one task of norm 0.

    >>> task_norms({"w": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.array([4.0, 0.0])}).tolist()
    [5.0, 1.0]
    """
    norms = []
    for leaf in jax.tree.leaves(task_grads):
        x = _widen(leaf)
        axes = tuple(range(1, x.ndim))
        norms.append(safe_norm(x, axis=axes) if axes else _flush(jnp.abs(x)))
    return _flush(safe_norm(jnp.stack(norms), axis=0)) if norms else jnp.zeros((1,), jnp.float32)


def _flush(x: Array) -> Array:
    # Hardware that reads subnormals as zero does not always compare them as zero: 0/0 could follow.
    return jnp.where(x < jnp.finfo(x.dtype).tiny, 0, x)


def _replicated(leaf: Array) -> Any:
    """The output sharding of a full contraction; needed only where a mesh has explicit axes."""
    sharding = jax.typeof(leaf).sharding
    if jax.sharding.AxisType.Explicit not in getattr(sharding.mesh, "axis_types", ()):
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, None))


PAIRED_TASKS = 6
"""Up to so many tasks every inner product of a Gram matrix is a sum of its own, all in one pass;
the CPU's matrix product of a few very long rows takes longer."""


def _products(x: Array, y: Array) -> Array:
    axes = tuple(range(1, x.ndim))
    return jax.lax.dot_general(
        x,
        y,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=_replicated(x),
    )


def _gram(x: Array) -> Array:
    tasks, axes = x.shape[0], tuple(range(x.ndim - 1))
    if tasks > PAIRED_TASKS or not axes or x.size == 0:
        gram = _products(x, x)
        return (gram + gram.T) / 2  # a matrix product need not round both halves alike
    pairs = [(i, j) for i in range(tasks) for j in range(i, tasks)]
    sums = sums_together([x[i] * x[j] for i, j in pairs], axes)
    found = {pair: jnp.reshape(one, ()) for pair, one in zip(pairs, sums, strict=True)}
    rows = [[found[min(i, j), max(i, j)] for j in range(tasks)] for i in range(tasks)]
    return jnp.stack([jnp.stack(row) for row in rows])


def task_products(task_grads: PyTree, others: PyTree, num_tasks: int = 1) -> Array:
    """Inner products of every task's gradient in one stacked tree with every one in another.

    Shape ``(K, J)``; zeros ``(num_tasks, num_tasks)`` for trees without leaves. Otherwise as
    ``task_gram``.

    >>> a, b = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[1.0, 1.0]])
    >>> task_products(a, b).tolist()
    [[7.0], [1.0]]
    """
    products = []
    for leaf, other in zip(jax.tree.leaves(task_grads), jax.tree.leaves(others), strict=True):
        x, y = saturate(_widen(leaf)), saturate(_widen(other))
        dtype = jnp.promote_types(x.dtype, y.dtype)
        products.append(_products(x.astype(dtype), y.astype(dtype)))
    if not products:
        return jnp.zeros((num_tasks, num_tasks), jnp.float32)
    return sum(products[1:], start=products[0])


def task_gram(task_grads: PyTree, num_tasks: int = 1) -> Array:
    """All inner products of the tasks' gradients over the whole tree, shape ``(K, K)``.

    f32 at least and in full precision; entries above 1e15 (f32) count as 1e15, so that no product
    overflows. Gradients below about 1e-19 (f32) have squares that underflow to 0. A tree without
    leaves gives zeros for ``num_tasks`` tasks.

    >>> task_gram({"w": jnp.array([[3.0, 4.0], [1.0, 0.0]])}).tolist()
    [[25.0, 3.0], [3.0, 1.0]]
    """
    grams = [_gram(saturate(_widen(leaf))) for leaf in jax.tree.leaves(task_grads)]
    if not grams:
        return jnp.zeros((num_tasks, num_tasks), jnp.float32)
    return sum(grams[1:], start=grams[0])


def cosines_of(gram: Array) -> Array:
    """Cosines from inner products, shape ``(K, K)``; 0 beside a task without gradient."""
    norms = jnp.sqrt(jnp.diagonal(gram))
    products = jnp.expand_dims(norms, 1) * jnp.expand_dims(norms, 0)
    return jnp.clip(safe_div(gram, products), -1, 1)


def task_cosines(task_grads: PyTree) -> Array:
    """The cosine between every two tasks' gradients over the whole tree, shape ``(K, K)``.

    Negative entries are conflicts. A task without gradient has cosine 0 with all.

    >>> task_cosines({"w": jnp.array([[2.0, 0.0], [-3.0, 0.0], [0.0, 1.0]])}).tolist()
    [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return cosines_of(task_gram(task_grads))


def conflict_metrics(cosines: Array, dtype: Any) -> dict[str, Array]:
    """``min_cosine`` and ``conflict_fraction`` of a ``(K, K)`` array of cosines."""
    _, least = over_pairs(cosines)
    conflicts, _ = over_pairs((cosines < 0).astype(dtype))
    if np.shape(cosines)[-1] < 2:
        conflicts = jnp.zeros(())
    return {"conflict_fraction": conflicts.astype(dtype), "min_cosine": least.astype(dtype)}


# ---------------------------------------------------------------------------------------------
# Combinations of the tasks
# ---------------------------------------------------------------------------------------------


UNROLLED_TASKS = 16
"""Up to so many tasks are added one by one, which fuses with what made them; a reduction over the
leading axis does not on the CPU, and takes four times as long."""


def _add_over_tasks(x: Array) -> Array:
    tasks = x.shape[0]
    if not 0 < tasks <= UNROLLED_TASKS:
        return jnp.sum(x, axis=0)
    return functools.reduce(
        jnp.add, [jax.lax.index_in_dim(x, task, keepdims=False) for task in range(tasks)]
    )


def sum_tasks(task_grads: PyTree) -> PyTree:
    """The sum over the task axis, in f32 at least."""
    return jax.tree.map(lambda g: _add_over_tasks(_widen(g)), task_grads)


def mix_tasks(task_grads: PyTree, weights: Array) -> PyTree:
    """Weighted sums over the task axis, in f32 at least.

    Args:
      task_grads: the stacked tree.
      weights: shape ``(K,)`` for one gradient ``sum_k weights[k] g_k``, or ``(J, K)`` for a stacked
        tree of J such gradients.

    >>> g = {"w": jnp.array([[1.0, 2.0], [10.0, 20.0]])}
    >>> mix_tasks(g, jnp.array([1.0, 0.5]))["w"].tolist()
    [6.0, 12.0]
    """
    weights = jnp.asarray(weights)

    def one(leaf: Any) -> Array:
        g = _widen(leaf)
        if weights.ndim == 1:
            return _add_over_tasks(per_task(weights.astype(g.dtype), g) * g)
        return jnp.tensordot(
            weights.astype(g.dtype), g, axes=1, precision=jax.lax.Precision.HIGHEST
        )

    return jax.tree.map(one, task_grads)


# ---------------------------------------------------------------------------------------------
# Similarity of the magnitudes
# ---------------------------------------------------------------------------------------------


def pair_similarities(norms: Array) -> Array:
    """``2 n_i n_j / (n_i^2 + n_j^2)`` for every pair of tasks, shape ``(K, K)``.

    Computed from the ratio of the smaller to the larger norm, so it neither overflows nor loses
    digits. Two zero norms have similarity 1, a zero and another norm 0.
    """
    n, m = jnp.expand_dims(norms, 1), jnp.expand_dims(norms, 0)
    ratio = safe_div(jnp.minimum(n, m), jnp.maximum(n, m), otherwise=1.0)
    return 2 * ratio / (1 + jnp.square(ratio))


def over_pairs(matrix: Array) -> tuple[Array, Array]:
    """Mean and minimum of the entries above the diagonal; ones where there is only one task."""
    tasks = np.shape(matrix)[-1]
    pairs = np.triu(np.ones((tasks, tasks), bool), k=1)
    mean = jnp.sum(jnp.where(pairs, matrix, 0)) / pairs.sum() if tasks > 1 else jnp.ones(())
    return mean.astype(matrix.dtype), jnp.min(jnp.where(pairs, matrix, 1))


def magnitude_similarity(task_grads: PyTree) -> Array:
    r"""How alike the tasks' gradient norms are: the mean over pairs, a scalar in [0, 1].

    .. math:: s_{ij} = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2}

    1 means equal norms; norms in the ratio 1 to 10 have similarity 0.2. One task alone gives 1.

    >>> round(float(magnitude_similarity({"w": jnp.array([[1.0, 0.0], [0.0, 3.0]])})), 4)
    0.6
    """
    mean, _ = over_pairs(pair_similarities(task_norms(task_grads)))
    return mean
