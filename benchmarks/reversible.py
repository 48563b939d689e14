"""Backpropagation along the way back beside backpropagation through kept steps: value, gradient, time and memory.

    python benchmarks/reversible.py

Both take the same steps of ``ReversibleIteration`` on the same block, whose activations are several states. Memory is
the most bytes that tensors hold at once beyond what there was before, each storage counted once.
"""

from __future__ import annotations

import os
import warnings
import weakref
from typing import Any

import record  # isort: skip  (first: it sets the number of threads)

import torch
from record import Bars, Candidate, Row, Target, interleave
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torchimplicit as ti

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

BATCH, WIDTH = 256, 128
COLUMNS = ("damping", "steps", "gradient, float64", "gradient, float32", "drift, float32", "ms", "unrolled ms", "times")
COLUMNS += ("MiB", "unrolled MiB")


class Block(nn.Module):
    """A residual block of two layers, about as contracting as trained ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(0.5 * z + self.outer(torch.nn.functional.gelu(self.inner(z))) + x)


class Living(TorchDispatchMode):
    """The most bytes that the results of operations have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._results += [weakref.ref(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        living = [t for result in self._results if (t := result()) is not None]
        self._results = [weakref.ref(t) for t in living]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living}
        self.peak = max(self.peak, sum(storages.values()))
        return out


def step(block: Block, x: Tensor, solver: ti.ReversibleIteration, gradient: ti.Gradient) -> tuple[Any, list[Tensor]]:
    """A solve, and the gradients of a loss in the input and the parameters."""
    solution = ti.solve(ti.FixedPoint(block), torch.zeros_like(x), x, solver=solver, gradient=gradient)
    return solution, list(torch.autograd.grad(solution.value.sin().sum(), (x, *block.parameters())))


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    flat = [torch.cat([g.double().flatten() for g in grads]) for grads in (one, other)]
    return float(torch.linalg.vector_norm(flat[0] - flat[1]) / torch.linalg.vector_norm(flat[1]))


def measure(damping: float, steps: int, options: Any) -> Row:
    torch.manual_seed(options.seed)
    block, x = Block(), torch.randn(BATCH, WIDTH)
    solver = ti.ReversibleIteration(damping=damping, steps=steps)
    row: Row = {"damping": damping, "steps": steps}
    for dtype, name in ((torch.float64, "float64"), (torch.float32, "float32")):
        block, leaf = block.to(dtype), x.to(dtype).requires_grad_()
        (ours, got), (theirs, expected) = (step(block, leaf, solver, g) for g in (ti.Reversible(), ti.Unrolled()))
        assert torch.equal(ours.value, theirs.value)
        row[f"gradient, {name}"], row[f"drift, {name}"] = gap(got, expected), float(ours.adjoint.residual.max())
    ways = {"": ti.Reversible(), "unrolled ": ti.Unrolled()}
    for name, gradient in ways.items():
        with Living() as living:
            step(block, leaf, solver, gradient)
        row[f"{name}MiB"] = living.peak / 2**20
    timed = interleave(
        {name: Candidate(lambda _, g=gradient: step(block, leaf, solver, g)) for name, gradient in ways.items()},
        options.repeats,
        options.seconds,
    )
    row |= {f"{name}ms": timing.cpu_quartiles_ms[0] for name, timing in timed.items()}
    return row | {"times": row["ms"] / row["unrolled ms"]}


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=15, seconds=10.0)
    load = os.getloadavg()
    chosen = [(0.5, 4)] if options.quick else [(b, n) for b in (0.5, 0.8) for n in (4, 8, 16, 32)]
    rows = [measure(b, n, options) for b, n in chosen]
    few = [row for row in rows if row["steps"] <= 4]
    targets = [
        Target("gradient beside unrolling, float64", max(row["gradient, float64"] for row in rows), "<=", 1e-10),
        Target("gradient beside unrolling, float32", max(row["gradient, float32"] for row in rows), "<=", 1e-4),
        Target("drift, float32", max(row["drift, float32"] for row in rows), "<=", 3e-4),
        Target("time beside unrolling", max(row["times"] for row in rows), "<=", 1.6),
    ]
    if not options.quick:
        last, first = rows[3], few[0]
        growth = last["MiB"] - first["MiB"]
        targets.append(
            Target("MiB from 4 to 32 steps, β = .5, of unrolling's", growth / last["unrolled MiB"], "<=", 0.1)
        )
    record.record(
        "reversible",
        options,
        load_before=load,
        settings={"block": f"residual, {BATCH}×{WIDTH}, hidden {2 * WIDTH}", "solver": "ReversibleIteration(steps=n)"},
        rows={"Table": rows},
        columns={"Table": COLUMNS},
        targets=targets,
        notes=[
            "'gradient' is the relative distance from Unrolled's; the values are equal bit for bit.",
            "'ms' is the lower quartile of CPU time of a forward and a backward pass, 'times' its ratio to Unrolled's.",
            "'MiB' counts the most bytes that tensors hold at once in both passes.",
        ],
        panels=[
            Bars(
                "peak memory",
                "MiB",
                {
                    f"β = {row['damping']}, {row['steps']} steps": {
                        "Reversible": row["MiB"],
                        "Unrolled": row["unrolled MiB"],
                    }
                    for row in rows
                },
            )
        ],
    )


if __name__ == "__main__":
    main()
