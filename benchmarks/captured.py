"""Eager and captured solves of the same layer, forward and backward, beside what their evaluations alone take.

Run ``python benchmarks/captured.py``. It records CPU time, one thread, the candidates interleaved: a solve with its
gradient in W, as it is, with ``compile=True``, and by TorchDEQ where it is installed; one evaluation of the map; one
product with its transposed Jacobian; one product into W. The floor is what the captured solve's evaluations and
products take by themselves.
"""

from __future__ import annotations

import layer  # isort: skip  (first: it sets the number of threads)

import os
import time
from collections.abc import Callable
from typing import Any

import record
import torch

import torchimplicit as ti

FLOOR = {"plain": (1.4, 1.15, 1.1), "Anderson": (1.9, 1.2, 1.1), "Broyden": (2.2, 1.3, 1.1)}
"""The most that a captured solve should take, in times of its floor, for each of the sizes."""
AHEAD = {"plain": (2.2, 1.3, 1.1), "Anderson": (4.0, 1.6, 1.2), "Broyden": (5.0, 3.0, 1.5)}
"""How many times as fast as TorchDEQ it should be."""
EAGER = {"plain": (1.4, 1.1, 1.05), "Anderson": (2.0, 1.4, 1.1), "Broyden": (2.5, 2.5, 1.5)}
"""How many times as fast as TorchDEQ the eager solve should be."""
SOLVERS = {
    "plain": ti.FixedPointIteration(rtol=1e-4),
    "Anderson": ti.Anderson(memory=5, rtol=1e-4),
    "Broyden": ti.Broyden(rtol=1e-4),
}
PEER = {"plain": "fixed_point_iter", "Anderson": "anderson", "Broyden": "broyden"}


def torchdeq_step(name: str, evaluations: int, f: Callable[[torch.Tensor], torch.Tensor], z0: torch.Tensor) -> Any:
    """A solve and its gradient by TorchDEQ, with the same tolerance; ``None`` where it is not installed."""
    try:
        import torchdeq
    except ImportError:
        return None
    model = torchdeq.get_deq(
        f_solver=PEER[name],
        b_solver=PEER[name],
        ift=True,
        f_max_iter=evaluations + 20,
        b_max_iter=evaluations + 20,
        f_tol=1e-4,
        b_tol=1e-4,
        f_stop_mode="rel",
        b_stop_mode="rel",
    )
    model.train()

    def step() -> None:
        z, _ = model(f, z0)
        z[-1].square().sum().backward()

    return step


def measured(batch: int, dim: int, name: str) -> record.Row:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(dim, dim, generator=generator)
    W = (0.9 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
    x = 0.5 * torch.randn(batch, dim, generator=generator)
    z0, v = torch.zeros(batch, dim), torch.randn(batch, dim, generator=generator)
    solver = SOLVERS[name]
    eager = ti.Implicit(linear_solver=ti.Neumann(rtol=1e-4) if name == "plain" else ti.GMRES(rtol=1e-4))
    captured = ti.Implicit(linear_solver=ti.Neumann(rtol=1e-4) if name == "plain" else ti.GMRES(rtol=1e-4))

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
    peer = torchdeq_step(name, int(found.evaluations), f, z0)
    if peer is not None:
        calls["TorchDEQ"] = peer
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
        **({"TorchDEQ ms": round(ms["TorchDEQ"], 2)} if peer is not None else {}),
        "eager / captured": round(ms["eager"] / ms["captured"], 2),
        "captured / floor": round(ms["captured"] / floor, 2),
        "gradients differ by": f"{difference:.1g}",
        "compiling s": round(compiling, 1),
    }
    if peer is not None:
        row["TorchDEQ / eager"] = round(ms["TorchDEQ"] / ms["eager"], 2)
        row["TorchDEQ / captured"] = round(ms["TorchDEQ"] / ms["captured"], 2)
    return row


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0])
    load, rows, targets = os.getloadavg(), [], []
    for i, (batch, dim) in enumerate(layer.SIZES[:1] if options.quick else layer.SIZES):
        for name in SOLVERS:
            row = measured(batch, dim, name)
            rows.append(row)
            print(row, flush=True)
            for ratio, relation, bound in (
                ("captured / floor", "<=", FLOOR[name][i]),
                ("TorchDEQ / captured", ">=", AHEAD[name][i]),
                ("TorchDEQ / eager", ">=", EAGER[name][i]),
            ):
                if ratio in row:
                    targets.append(record.Target(f"{row['size']} {name}: {ratio}", row[ratio], relation, bound))
    record.record(
        "captured",
        options,
        load_before=load,
        settings={
            "layer": "z = tanh(W z + x), Gaussian W, |W|_2 = 0.9, x precomputed, from zero",
            "tolerance": "relative 1e-4 in both passes",
            "eager adjoint": "Neumann for plain iteration, GMRES for Anderson and Broyden",
        },
        rows={"Eager and captured": rows},
        columns={"Eager and captured": tuple(rows[0])},
        targets=targets,
        notes=["Times are medians of CPU time. The first captured solve compiles, here with a cold or a warm cache."],
    )


if __name__ == "__main__":
    main()
