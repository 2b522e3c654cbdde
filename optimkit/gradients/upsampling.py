"""Repeats the examples that are learnt late, to spread learning over features more evenly."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from optimkit.numerics import check_count
from optimkit.protocols import Array

ROUNDS = 100
"""Of k-means, at most."""


def upsample_hard_cluster(
    outputs: Any, losses: Any, labels: Any, *, key: Array, num_clusters: int = 2
) -> np.ndarray:
    """How often each example should appear: twice in the hardest cluster of its class, else once.

    After a short training (5 to 10 % of the epochs), each class's examples are divided by k-means
    on the network's outputs; the cluster with the highest mean loss is repeated, and training
    starts anew.

    Args:
      outputs: (n, features) of the network, such as logits.
      losses: (n,).
      labels: (n,) classes.
      key: a random key, for the first centres.
      num_clusters: a class, >= 1.

    Returns:
      (n,) integers, 1 or 2; ``np.repeat(np.arange(n), found)`` are the indices of the examples. A
      class that does not fall into two clusters is not repeated. Runs on the host.

    Raises:
      ValueError: if shapes do not fit, or a value is not finite.

    Provisional: which features are clustered is read from the paper's abstract and reviews.

    >>> outputs = np.array([[0.0], [0.1], [5.0], [9.0]])
    >>> losses, labels = np.array([0.1, 0.1, 2.0, 3.0]), np.array([0, 0, 0, 1])
    >>> upsample_hard_cluster(outputs, losses, labels, key=jax.random.key(0)).tolist()
    [1, 1, 2, 1]

    Reference: Nguyen et al., "Changing the Training Data Distribution to Reduce Simplicity Bias
    Improves In-distribution Generalization", NeurIPS 2024, arXiv 2404.17768.
    """
    check_count(num_clusters=num_clusters, least=1)
    points, hard, classes = np.asarray(outputs, np.float64), np.asarray(losses), np.asarray(labels)
    if points.ndim != 2 or hard.shape != points.shape[:1] or classes.shape != hard.shape:
        raise ValueError(
            "outputs must be (n, features), losses and labels (n,), got "
            f"{points.shape}, {hard.shape} and {classes.shape}"
        )
    if not (np.isfinite(points).all() and np.isfinite(hard).all()):
        raise ValueError("outputs and losses must be finite")
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    rng, times = np.random.default_rng(seed), np.ones(len(points), np.int64)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        cluster = _k_means(points[members], num_clusters, rng)
        found = np.unique(cluster)
        if found.size > 1:
            means = [np.mean(hard[members][cluster == c]) for c in found]
            times[members[cluster == found[int(np.argmax(means))]]] = 2
    return times


def _k_means(points: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """The cluster of every point; first centres are drawn by squared distance."""
    centres = points[rng.integers(len(points))][None]
    while len(centres) < min(number, len(points)):
        distance = np.min(_squared(points, centres), axis=1)
        if distance.sum() == 0:
            break
        chosen = rng.choice(len(points), p=distance / distance.sum())
        centres = np.concatenate([centres, points[chosen][None]])
    cluster = np.argmin(_squared(points, centres), axis=1)
    for _ in range(ROUNDS):
        centres = np.stack(
            [
                points[cluster == c].mean(axis=0) if np.any(cluster == c) else centres[c]
                for c in range(len(centres))
            ]
        )
        new = np.argmin(_squared(points, centres), axis=1)
        if np.array_equal(new, cluster):
            break
        cluster = new
    return cluster


def _squared(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.stack([np.sum(np.square(points - c[None]), axis=1) for c in centres], axis=1)
