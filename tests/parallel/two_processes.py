"""One of two processes that train together; started twice by ``test_two_processes``.

``python -m tests.parallel.two_processes PORT RANK``: four simulated devices each, one mesh over all
eight. Prints the largest difference from what one device computes.
"""

from __future__ import annotations

import sys

import jax


def main(port: str, rank: int) -> None:
    import optimkit  # noqa: F401  # importing it first must leave this still possible

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)

    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import optimkit as ok

    mesh = jax.make_mesh((8,), ("x",))
    rng = np.random.default_rng(0)
    values = {"dense": {"kernel": rng.normal(size=(16, 8)), "bias": rng.normal(size=(8,))}}
    grads = {"dense": {"kernel": rng.normal(size=(16, 8)), "bias": rng.normal(size=(8,))}}
    specs = {"dense": {"kernel": P("x", None), "bias": P()}}

    def placed(tree: dict) -> dict:
        def one(x: np.ndarray, spec: P) -> jax.Array:
            x = x.astype(np.float32)
            return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

        return jax.tree.map(one, tree, specs)

    worst = 0.0
    for tx in (ok.lion(0.1), ok.adamp(0.1, weight_decay=0.1), ok.clip_by_tracked_max(0.9)):
        with jax.set_mesh(mesh):
            params = placed(values)
            state = jax.jit(tx.init)(params)
            updates, _ = jax.jit(tx.update)(placed(grads), state, params)
        local = jax.tree.map(lambda x: jax.numpy.asarray(x, np.float32), values)
        own_grads = jax.tree.map(lambda x: jax.numpy.asarray(x, np.float32), grads)
        expected, _ = tx.update(own_grads, tx.init(local), local)
        for got, want in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            for shard in got.addressable_shards:
                difference = np.abs(np.asarray(shard.data) - np.asarray(want)[shard.index])
                worst = max(worst, float(difference.max()))
    print(f"processes {jax.process_count()} devices {jax.device_count()} worst {worst:.2e}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
