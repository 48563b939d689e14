"""Eager and captured solves of the same layer, forward and backward, beside what their evaluations alone take.

Run ``python benchmarks/captured.py``. It records CPU time, one thread, the candidates interleaved: a solve with its
gradient in W, as it is and with ``compile=True``; one evaluation of the map; one product with its transposed Jacobian;
one product into W. The floor is what the captured solve's evaluations and products take by themselves.
"""

from __future__ import annotations

import layer  # isort: skip  (first: it sets the number of threads)

import os
import time

import record
import torch

import torchimplicit as ti

FLOOR = {"plain": (1.4, 1.15, 1.1), "Anderson": (1.9, 1.2, 1.1)}
"""The most that a captured solve should take, in times of its floor, for each of the sizes."""
SOLVERS = {"plain": ti.FixedPointIteration(rtol=1e-4), "Anderson": ti.Anderson(memory=5, rtol=1e-4)}


def measured(batch: int, dim: int, name: str) -> tuple[record.Row, float]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(dim, dim, generator=generator)
    W = (0.9 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
    x = 0.5 * torch.randn(batch, dim, generator=generator)
    z0, v = torch.zeros(batch, dim), torch.randn(batch, dim, generator=generator)
    solver = SOLVERS[name]
    eager = ti.Implicit(linear_solver=ti.Neumann(rtol=1e-4) if name == "plain" else ti.GMRES(rtol=1e-4))
    captured = ti.Implicit(linear_solver=ti.Neumann(rtol=1e-4)) if name == "plain" else ti.Implicit()

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ W.T + x)

    def step(compile: bool) -> ti.Solution:
        W.grad = None
        gradient = captured if compile else eager
        solution = ti.solve(ti.FixedPoint(f), z0, solver=solver, gradient=gradient, compile=compile)
        solution.value.square().sum().backward()
        return solution

    def without_grad() -> torch.Tensor:
        with torch.no_grad():
            return f(v)

    begin = time.perf_counter()
    found = step(True)
    compiling = time.perf_counter() - begin
    assert found.adjoint is not None
    assert W.grad is not None
    gradient = W.grad.clone()
    step(False)
    difference = float((gradient - W.grad).norm() / W.grad.norm())
    slope = torch.ones_like(v)
    calls = {
        "eager": lambda: step(False),
        "captured": lambda: step(True),
        "map": without_grad,
        "product": lambda: torch.ops.aten.tanh_backward(v, slope) @ W.detach(),
        "pull": lambda: torch.ops.aten.tanh_backward(v, slope).T @ v,
    }
    times: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(60 if batch * dim < 50_000 else 12):
        for key, call in calls.items():
            call()
            begin = time.process_time()
            call()
            times[key].append(1e3 * (time.process_time() - begin))
    ms = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    floor = found.evaluations * ms["map"] + found.adjoint.evaluations * ms["product"] + ms["pull"]
    row: record.Row = {
        "size": layer.label(batch, dim),
        "solver": name,
        "eager ms": round(ms["eager"], 2),
        "captured ms": round(ms["captured"], 2),
        "floor ms": round(floor, 2),
        "evaluations": found.evaluations,
        "products": found.adjoint.evaluations,
        "eager / captured": round(ms["eager"] / ms["captured"], 2),
        "captured / floor": round(ms["captured"] / floor, 2),
        "gradients differ by": f"{difference:.1g}",
        "compiling s": round(compiling, 1),
    }
    return row, ms["captured"] / floor


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0])
    load, rows, targets = os.getloadavg(), [], []
    for i, (batch, dim) in enumerate(layer.SIZES[:1] if options.quick else layer.SIZES):
        for name in SOLVERS:
            row, share = measured(batch, dim, name)
            rows.append(row)
            targets.append(record.Target(f"{row['size']} {name}: captured / floor", share, "<=", FLOOR[name][i]))
    record.record(
        "captured",
        options,
        load_before=load,
        settings={
            "layer": "z = tanh(W z + x), Gaussian W, |W|_2 = 0.9, x precomputed, from zero",
            "tolerance": "forward relative 1e-4; adjoint 1e-4, but the default 2.4e-5 for Anderson when captured",
            "eager adjoint": "Neumann for plain iteration, GMRES for Anderson",
        },
        rows={"Eager and captured": rows},
        columns={"Eager and captured": tuple(rows[0])},
        targets=targets,
        notes=["Times are medians of CPU time. The first captured solve compiles, here with a cold or a warm cache."],
    )


if __name__ == "__main__":
    main()
