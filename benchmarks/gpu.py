"""Eager and captured solves with their gradients on a GPU, and steps of models (``models.py``): wall-clock time, in
eight minutes at most.

Run ``python benchmarks/gpu.py``; ``--device cpu --quick`` shows on any machine that it runs. Cases that the budget does
not reach are left out, and named.
"""

from __future__ import annotations

import layer  # isort: skip  (first: it sets the number of threads)

import os
import time
from collections.abc import Callable

import models
import record
import torch

import torchimplicit as ti

SIZES = ((64, 128), (256, 512), (4096, 512), (32, 2048))
SOLVERS = {
    "plain": ti.FixedPointIteration(rtol=1e-4),
    "Anderson": ti.Anderson(memory=5, rtol=1e-4),
    "Broyden": ti.Broyden(rtol=1e-4),
}


def timed(call: Callable[[], object], device: str, repeats: int) -> float:
    """The median of a call, in milliseconds, the device's work included."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[len(times) // 2]


def measured(batch: int, dim: int, name: str, device: str, repeats: int) -> record.Row:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(dim, dim, generator=generator)
    W = (0.9 * W / torch.linalg.matrix_norm(W, 2)).to(device).requires_grad_()
    x = (0.5 * torch.randn(batch, dim, generator=generator)).to(device)
    z0 = torch.zeros_like(x)

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ W.T + x)

    def step(compile: bool) -> torch.Tensor:
        solution = ti.solve(ti.FixedPoint(f), z0, solver=SOLVERS[name], compile=compile)
        (gradient,) = torch.autograd.grad(solution.value.square().sum(), W)
        return gradient

    begin = time.perf_counter()
    one = step(True)
    compiling = time.perf_counter() - begin
    other = step(False)
    peaks = {}
    for compile in (False, True):
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            step(compile)
            peaks[compile] = torch.cuda.max_memory_allocated() / 2**20
    eager, captured = (timed(lambda c=c: step(c), device, repeats) for c in (False, True))  # type: ignore[misc]
    return {
        "size": layer.label(batch, dim),
        "solver": name,
        "eager ms": round(eager, 2),
        "captured ms": round(captured, 2),
        "eager / captured": round(eager / captured, 2),
        "eager MiB": round(peaks[False], 1) if peaks else None,
        "captured MiB": round(peaks[True], 1) if peaks else None,
        "gradients differ by": f"{float((one - other).norm() / other.norm()):.1g}",
        "compiling s": round(compiling, 1),
    }


def main() -> None:
    """Measure for as long as the budget lasts, and record."""
    options = record.arguments(__doc__.splitlines()[0], device="cuda", budget=420.0)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: --device cpu --quick shows that the script runs")
    begin, load, left = time.perf_counter(), os.getloadavg(), []
    tables: dict[str, list[record.Row]] = {"Eager and captured": [], "Models": [], "Growth": []}
    layers = [(size, name) for size in SIZES for name in SOLVERS]
    growth = [models.layer(*setting) for setting in models.SETTINGS]
    device, repeats = options.device, options.repeats
    cases: list[tuple[str, str, Callable[[], record.Row]]] = [
        (
            "Eager and captured",
            f"{layer.label(batch, dim)} {name}",
            lambda batch=batch, dim=dim, name=name: measured(batch, dim, name, device, repeats),  # type: ignore[misc]
        )
        for (batch, dim), name in (layers[:1] if options.quick else layers)
    ]
    for title, group in (("Models", models.models(options.quick)), ("Growth", growth[:0] if options.quick else growth)):
        for case in group:
            cases.append((title, case.name, lambda case=case: models.measured(case, device, repeats)))  # type: ignore[misc]
    for title, name, run in cases:
        if time.perf_counter() - begin > options.budget:
            left.append(name)
            continue
        tables[title].append(run())
        print(tables[title][-1], flush=True)
    record.record(
        "gpu",
        options,
        load_before=load,
        settings={"layer": "z = tanh(W z + x), |W|_2 = 0.9", "tolerance": "forward relative 1e-4, adjoint the default"},
        rows=tables,
        columns={
            "Eager and captured": tuple(tables["Eager and captured"][0]),
            "Models": models.COLUMNS,
            "Growth": models.COLUMNS,
        },
        targets=[],
        notes=[f"Not measured within the budget: {', '.join(left)}." if left else "All cases were measured."],
    )


if __name__ == "__main__":
    main()
