"""What a solver costs beyond the evaluations of f, ours beside TorchDEQ, float32 on one CPU thread.

    python benchmarks/overhead.py

The overhead of a pass is its time over (evaluations × the time of one evaluation of f under no_grad), or, backward,
over (products × the time of one vector-Jacobian product). Beside it: how many tensor operations and host reads one
iteration makes; each host read is a synchronisation on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import record  # isort: skip  (first: it sets the number of threads)

import torch
from candidates import SOLVERS, TOLERANCE, Variant, inference, our_variant, torchdeq_variant
from layer import SIZES, Layer, Work, count, label
from record import Bars, Candidate, Row, Target, Timing, interleave

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


def targets(rows: list[Row]) -> list[Target]:
    """The overheads wanted of ours, forward, without the rowwise promise."""
    return [
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
    options = record.arguments(__doc__.splitlines()[0], repeats=21, seconds=45.0)
    load, rows = os.getloadavg(), []
    for batch, dim in SIZES[:1] if options.quick else SIZES:
        rows += measure(Layer(batch, dim, "gaussian", options.seed), options.repeats, options.seconds)
    work = counts(Layer(64, 128, "orthogonal", options.seed))
    titles = "Overhead", "Operations and host reads of one iteration"
    record.record(
        "overhead",
        options,
        load_before=load,
        settings={
            "layer": "z = tanh(W z + x), Gaussian W, |W|_2 = 0.9, x precomputed, from zero",
            "tolerance": f"relative {TOLERANCE:g}, forward and adjoint",
            "TorchDEQ": "cap 50, the same solver in both passes",
            "counts": f"64×128, orthogonal W, difference of runs of {MANY} and {FEW} evaluations that cannot converge",
        },
        rows={titles[0]: rows, titles[1]: work},
        columns={titles[0]: (*COLUMNS, "setting"), titles[1]: COUNTS},
        targets=targets(rows),
        panels=panels(rows),
        notes=[
            "Times are medians of CPU time. 'forward ×' is inference, no_grad; 'forward with graph ×' is training's.",
            "An overhead below 1 means that the solver's calls were cheaper than the unit call measured beside them "
            "(fewer rows, warmer caches).",
            "kernels: dispatched operations that are no views, f's own two included; operations: views too.",
            "The backward pass also evaluates f once or twice with a graph and takes the product in the parameters, so "
            "its overhead holds work that is not the solver's.",
        ],
    )


if __name__ == "__main__":
    main()
