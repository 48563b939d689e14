"""What the default solvers cost where their first member solves the problem: beside that member alone.

    python benchmarks/fast_path.py

``ti.solve`` without a solver tries several in turn. Where the first one succeeds for every sample, the others must cost
next to nothing: the same evaluations and products, and hardly an operation or a read from the device more.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import record  # isort: skip  (first: it sets the number of threads)

import torch
from record import Candidate, Row, Target, interleave
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchimplicit as ti
from torchimplicit.defaults import FIXED_POINT, MINIMUM, ROOT
from torchimplicit.solvers import Polyalgorithm

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

ALLOWED = 1.03
"""The most time that a pass may take, in terms of the first member's alone."""
VIEWS = ("view", "expand", "slice", "select", "t", "transpose", "unsqueeze", "squeeze", "detach", "alias", "permute")
COLUMNS = ("problem", "evaluations", "alone", "operations", "alone ", "reads", "alone  ", "ms", "forward", "both")


class Counter(TorchDispatchMode):
    """Operations that are no views, and reads by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        self.reads += name in ("_local_scalar_dense", "nonzero", "is_nonzero")
        self.operations += name not in VIEWS
        return func(*args, **(kwargs or {}))


def problems(seed: int) -> dict[str, tuple[Any, Polyalgorithm, Tensor, Tensor]]:
    """Problems, their default solvers, starts and arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found: dict[str, tuple[Any, Polyalgorithm, Tensor, Tensor]] = {}
    for batch, dim in ((64, 128), (256, 512), (32, 2048)):
        weight = normal(dim, dim)
        weight = (0.9 * weight / torch.linalg.matrix_norm(weight, 2)).float()
        x = normal(batch, dim).float()
        problem = ti.FixedPoint(lambda z, x, weight=weight: torch.tanh(z @ weight.T + x))
        found[f"fixed point, {batch}×{dim}"] = (problem, FIXED_POINT, torch.zeros_like(x), x)
    for batch, dim in ((16, 20), (64, 100)):
        mix, x = 0.3 * normal(dim, dim) / dim**0.5, normal(batch, dim)
        root = ti.Root(lambda z, x, mix=mix: z + 0.5 * z**3 + torch.sin(z @ mix) - x)
        found[f"root, {batch}×{dim}"] = (root, ROOT, torch.zeros_like(x), x)
        minimum = ti.Minimum(lambda z, x, mix=mix: (z - x).square().sum(1) + (z @ mix).cosh().sum(1))
        found[f"minimum, {batch}×{dim}"] = (minimum, MINIMUM, torch.zeros_like(x), x)
    return found


def passes(problem: Any, solver: Any, z0: Tensor, x: Tensor) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    def forward(_: Any) -> ti.Solution:
        with torch.no_grad():
            return ti.solve(problem, z0, x, solver=solver)

    def both(_: Any) -> None:
        leaf = x.detach().requires_grad_()
        ti.solve(problem, z0, leaf, solver=solver).value.sin().sum().backward()

    return forward, both


def measure(name: str, given: tuple[Any, Polyalgorithm, Tensor, Tensor], repeats: int, seconds: float) -> Row:
    problem, default, z0, x = given
    ways = {"default": passes(problem, None, z0, x), "alone": passes(problem, default.members[0], z0, x)}
    counted = {}
    for way, (forward, both) in ways.items():
        forward(None), both(None)
        with Counter() as counter:
            found = forward(None)
            both(None)
        counted[way] = (found.evaluations, counter.operations, counter.reads, found.converged.all())
    timed = interleave(
        {f"{way} {i}": Candidate(run) for way, runs in ways.items() for i, run in enumerate(runs)}, repeats, seconds
    )
    # the lower quartile: what else runs on the machine makes samples longer, never shorter
    quick = {key: timing.cpu_quartiles_ms[0] for key, timing in timed.items()}
    ratios = [quick[f"default {i}"] / quick[f"alone {i}"] for i in range(2)]
    first, other = counted["default"], counted["alone"]
    row: Row = {"problem": name, "evaluations": first[0], "alone": other[0]}
    row |= {"operations": first[1], "alone ": other[1], "reads": first[2], "alone  ": other[2]}
    row |= {"ms": quick["default 0"], "forward": ratios[0], "both": ratios[1], "solved": bool(first[3])}
    return row


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=41, seconds=30.0)
    load, given = os.getloadavg(), problems(options.seed)
    chosen = dict(list(given.items())[:1]) if options.quick else given
    rows = [measure(name, one, options.repeats, options.seconds) for name, one in chosen.items()]
    more = max(row["evaluations"] - row["alone"] for row in rows)
    reads = max(row["reads"] - row["alone  "] for row in rows)
    operations = max(row["operations"] / row["alone "] for row in rows)
    targets = [Target("evaluations beyond those of the first member alone", float(more), "<=", 0.0)]
    targets += [Target("reads by the host beyond its own", float(reads), "<=", 0.0)]
    targets += [Target("operations, in terms of its own", operations, "<=", ALLOWED)]
    targets += [
        Target(f"{row['problem']}: {way}", row[way], "<=", ALLOWED) for row in rows for way in ("forward", "both")
    ]
    record.record(
        "fast_path",
        options,
        load_before=load,
        settings={"solvers": "none named, beside the default's first member alone", "gradient": "the default"},
        rows={"Table": rows},
        columns={"Table": COLUMNS},
        targets=targets,
        notes=[
            "'forward' and 'both' are ratios of lower quartiles of CPU time, the default's over its first member's; "
            "'ms' is the default's forward pass.",
            "operations (no views) and reads by the host are those of a forward pass, and of one with a backward pass.",
        ],
    )


if __name__ == "__main__":
    main()
