"""What a solver costs beyond the evaluations of f, ours beside TorchDEQ, float32 on one CPU thread.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --against REVISION     # fixed costs beside another revision's

The overhead of a pass is its time over (evaluations × the time of one evaluation of f under no_grad), or, backward,
over (products × the time of one vector-Jacobian product). Beside it: how many tensor operations and host reads one
iteration makes; each host read is a synchronisation on a GPU.
"""

from __future__ import annotations

import os
import random
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import record  # isort: skip  (first: it sets the number of threads)

import torch
from candidates import SOLVERS, TOLERANCE, Variant, inference, our_variant, torchdeq_variant
from layer import SIZES, Layer, Work, count, label
from record import ROOT, Bars, Candidate, Row, Target, Timing, interleave
from regression import Worker, checked_out

TARGETS = {
    "fixed point": {"64×128": 3.0, "256×512": 1.3, "32×2048": 1.05},
    "Anderson": {"64×128": 6.0, "256×512": 2.0, "32×2048": 1.1},
}
COLUMNS = (
    "size",
    "library",
    "solver",
    "evaluations",
    "forward ms",
    "forward ×",
    "forward with graph ×",
    "products",
    "backward ms",
    "backward ×",
)
COUNTS = (
    "library",
    "solver",
    "operations / iteration",
    "kernels / iteration",
    "host reads / iteration",
    "kernels in all, forward",
    "host reads, forward",
    "backward kernels / product",
    "backward host reads / product",
)
FEW, MANY = 10, 20
FIXED = ("size", "cost", "this µs", "other µs", "ratio")
FIXED_TARGET = 0.5
"""The most that set-up and recording may cost, in terms of the revision at which this was asked for."""


@dataclass(frozen=True)
class Unit:
    """The calls that overheads are measured in: one evaluation of f, and one product with its transposed Jacobian."""

    evaluation: Candidate
    product: Candidate


def unit(layer: Layer) -> Unit:
    """The unit calls of a layer."""
    z, x = layer.reference["z"].float().requires_grad_(), layer.x.detach()
    out = layer.f(z, x)

    def evaluate(_: object) -> torch.Tensor:
        with torch.no_grad():
            return layer.f(z, x)

    return Unit(
        Candidate(evaluate), Candidate(lambda _: torch.autograd.grad(out, z, layer.cotangent, retain_graph=True))
    )


def compared(layer: Layer) -> list[Variant]:
    """The variants whose overhead is measured."""
    theirs = [torchdeq_variant(layer, solver, 50) for solver in SOLVERS]
    ours = [our_variant(layer, solver, "GMRES") for solver in SOLVERS]
    return (
        theirs
        + ours
        + [our_variant(layer, "fixed point", "Neumann"), our_variant(layer, "Anderson", "GMRES", rowwise=True)]
    )


def measure(layer: Layer, repeats: int, seconds: float) -> list[Row]:
    """Times and overheads of all variants on one layer."""
    units, chosen = unit(layer), compared(layer)
    timed = {("unit", "evaluation"): units.evaluation, ("unit", "product"): units.product}
    for variant in chosen:
        key = f"{variant.solver}, {variant.name}"
        timed |= {
            (key, "forward"): Candidate(lambda _, v=variant: inference(v)),
            (key, "graph"): Candidate(lambda _, v=variant: v.train()),
            (key, "backward"): Candidate(layer.gradients, variant.train),
        }
    timings = interleave(timed, repeats, seconds, seed=layer.seed)
    return [_row(layer, variant, timings) for variant in chosen]


def _row(layer: Layer, variant: Variant, timings: dict[tuple[str, str], Timing]) -> Row:
    key, numel = f"{variant.solver}, {variant.name}", layer.z0.numel()
    evaluations = count(lambda: inference(variant), numel).evaluations
    with_graph = count(variant.train, numel).evaluations
    graph = variant.train()
    products = count(lambda: layer.gradients(graph), numel).products
    one, product = timings["unit", "evaluation"].cpu_ms, timings["unit", "product"].cpu_ms
    forward, graph_ms, backward = (timings[key, what].cpu_ms for what in ("forward", "graph", "backward"))
    return {
        "size": label(layer.batch, layer.dim),
        "library": variant.library,
        "solver": variant.solver,
        "setting": variant.setting,
        "evaluations": evaluations,
        "products": products,
        "forward ms": forward,
        "forward quartiles": timings[key, "forward"].cpu_quartiles_ms,
        "forward ×": forward / (evaluations * one),
        "forward with graph ms": graph_ms,
        "forward with graph ×": graph_ms / (with_graph * one),
        "backward ms": backward,
        "backward ×": backward / (products * product),
        "f ms": one,
        "product ms": product,
    }


def counts(layer: Layer) -> list[Row]:
    """Operations and host reads of one iteration: the difference of runs of ``MANY`` and of ``FEW`` steps."""
    rows = []
    for library, make in (
        ("TorchDEQ", lambda s, n: torchdeq_variant(layer, s, n, tolerance=0.0)),
        ("ours", lambda s, n: our_variant(layer, s, tolerance=1e-30, max_steps=n)),
    ):
        for solver in SOLVERS:
            few, many = (_forward_work(layer, make(solver, steps)) for steps in (FEW, MANY))
            usual = torchdeq_variant(layer, solver, 50) if library == "TorchDEQ" else our_variant(layer, solver)
            whole, graph = _forward_work(layer, usual), usual.train()
            back = count(lambda graph=graph: layer.gradients(graph), layer.z0.numel())
            steps = many.evaluations - few.evaluations
            rows.append(
                {
                    "library": library,
                    "solver": solver,
                    "operations / iteration": (many.operations - few.operations) / steps,
                    "kernels / iteration": (many.kernels - few.kernels) / steps,
                    "host reads / iteration": (many.host_reads - few.host_reads) / steps,
                    "kernels in all, forward": whole.kernels,
                    "host reads, forward": whole.host_reads,
                    "backward kernels / product": back.kernels / back.products,
                    "backward host reads / product": back.host_reads / back.products,
                }
            )
    return rows


def _forward_work(layer: Layer, variant: Variant) -> Work:
    return count(lambda: inference(variant), layer.z0.numel())


def fixed_costs(options: Any) -> list[Row]:
    """What a solve costs that takes no step, less the evaluation that it makes: without gradients (set-up), and what is
    added where autograd records (recording). Of this tree and of another, in processes of their own, in turn."""
    found: dict[str, list[list[float]]] = {}
    with ExitStack() as stack:
        tree, _ = stack.enter_context(checked_out(options.against))
        workers = [Worker(each, "fixed", options.seed) for each in (ROOT, tree)]
        for worker in workers:
            stack.callback(worker.close)
        cases, generator = list(workers[0].cases), random.Random(options.seed)
        for _ in range(10 * options.repeats):
            generator.shuffle(cases)
            for case in cases:
                order = [0, 1] if generator.random() < 0.5 else [1, 0]
                for i in order:
                    found.setdefault(case, [[], []])[i].append(1e3 * workers[i].cpu_ms(case))
    # lower quartiles: what else runs on the machine makes samples longer, never shorter
    quick = {case: [statistics.quantiles(of)[0] for of in both] for case, both in found.items()}
    rows: list[Row] = []
    for size in dict.fromkeys(case.split(" | ")[0] for case in sorted(quick)):
        plain, recorded, solve, whole = (
            quick[f"{size} | {what}"] for what in ("evaluation", "recorded evaluation", "solve", "recorded solve")
        )
        set_up = [s - e for s, e in zip(solve, plain, strict=True)]
        # a recorded solve evaluates twice: at the start, and for the backward pass
        recording = [w - 2 * r - s for w, r, s in zip(whole, recorded, set_up, strict=True)]
        for cost, (this, other) in (("set-up", set_up), ("recording", recording)):
            rows.append({"size": size, "cost": cost, "this µs": this, "other µs": other, "ratio": this / other})
    return rows


def targets(rows: list[Row], fixed: list[Row]) -> list[Target]:
    """The overheads wanted of ours, forward, without the rowwise promise; and the fixed costs."""
    wanted = [
        Target(f"{row['size']}: {row['cost']}, in terms of the other revision's", row["ratio"], "<=", FIXED_TARGET)
        for row in fixed
    ]
    return wanted + [
        Target(
            f"{row['size']}, {row['solver']}: forward overhead",
            row["forward ×"],
            "<=",
            TARGETS[row["solver"]][row["size"]],
        )
        for row in rows
        if row["library"] == "ours" and row["solver"] in TARGETS and row["setting"] == "adjoint GMRES"
    ]


def panels(rows: list[Row]) -> list[Bars]:
    """Forward and backward overheads by size and solver."""
    out = []
    for what in ("forward ×", "backward ×"):
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            groups.setdefault(f"{row['size']}\n{row['solver']}", {})[f"{row['library']}, {row['setting']}"] = row[what]
        out.append(Bars(what[:-2] + " overhead", "time / (calls × time of one call)", groups, log=True, line=1.0))
    return out


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=21, seconds=45.0, against="afd92de")
    load, rows = os.getloadavg(), []
    for batch, dim in SIZES[:1] if options.quick else SIZES:
        rows += measure(Layer(batch, dim, "gaussian", options.seed), options.repeats, options.seconds)
    work = counts(Layer(64, 128, "orthogonal", options.seed))
    fixed = fixed_costs(options)
    titles = "Overhead", "Operations and host reads of one iteration", "Fixed costs of a solve"
    record.record(
        "overhead",
        options,
        load_before=load,
        settings={
            "layer": "z = tanh(W z + x), Gaussian W, |W|_2 = 0.9, x precomputed, from zero",
            "tolerance": f"relative {TOLERANCE:g}, forward and adjoint",
            "TorchDEQ": "cap 50, the same solver in both passes",
            "fixed costs": f"a solve from its solution, which takes no step; the other revision is {options.against}",
            "counts": f"64×128, orthogonal W, difference of runs of {MANY} and {FEW} evaluations that cannot converge",
        },
        rows={titles[0]: rows, titles[1]: work, titles[2]: fixed},
        columns={titles[0]: (*COLUMNS, "setting"), titles[1]: COUNTS, titles[2]: FIXED},
        targets=targets(rows, fixed),
        panels=panels(rows),
        notes=[
            "Times are medians of CPU time. 'forward ×' is inference, no_grad; 'forward with graph ×' is training's.",
            "An overhead below 1 means that the solver's calls were cheaper than the unit call measured beside them "
            "(fewer rows, warmer caches).",
            "kernels: dispatched operations that are no views, f's own two included; operations: views too.",
            "set-up: a solve without a step, less one evaluation, no_grad; recording: what more it costs where "
            "autograd records it, less two recorded evaluations for the one. Lower quartiles of CPU time.",
            "The backward pass also evaluates f once or twice with a graph and takes the product in the parameters, so "
            "its overhead holds work that is not the solver's.",
        ],
    )


if __name__ == "__main__":
    main()
