"""The layers of ``models.py`` by jitted jaxopt, in a process of its own: settings as JSON in, milliseconds out."""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})  # XLA's pool ignores the flag

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxopt  # noqa: E402


def milliseconds(batch: int, dim: int, rtol: float, repeats: int) -> float:
    """The better of plain and Anderson iteration: a median of CPU time, forward and backward."""
    w = jax.random.normal(jax.random.PRNGKey(0), (dim, dim))
    w = 0.9 * w / jnp.linalg.norm(w, 2)
    x = 0.5 * jax.random.normal(jax.random.PRNGKey(1), (batch, dim))

    def f(z: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(z @ w.T + x)

    # its tolerance is of the whole residual's norm
    size = float(jnp.linalg.norm(x))
    best = float("inf")
    for kind in ("plain", "Anderson"):
        if kind == "plain":
            solver = jaxopt.FixedPointIteration(f, maxiter=200, tol=rtol * size, implicit_diff=True)
        else:
            solver = jaxopt.AndersonAcceleration(f, history_size=5, maxiter=200, tol=rtol * size, implicit_diff=True)
        step = jax.jit(jax.grad(lambda w, solver=solver: jnp.sum(solver.run(jnp.zeros_like(x), w, x).params ** 2)))
        step(w).block_until_ready()
        times = []
        for _ in range(repeats):
            begin = time.process_time()
            step(w).block_until_ready()
            times.append(1e3 * (time.process_time() - begin))
        best = min(best, sorted(times)[len(times) // 2])
    return best


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps([(*s, milliseconds(*s, given["repeats"])) for s in given["settings"]]))
