"""Forward and implicit backward of one tanh layer, ours beside TorchDEQ, float32 on one CPU thread.

    python benchmarks/versus_torchdeq.py

Both libraries solve z = tanh(W z + x) from zero to the same relative tolerance per sample (1e-4, in both passes) and
return the gradients in x and in W. Targets: ours at least 3, 2 and 1.2 times as fast at the three sizes, whichever
solver, forward and backward together, against TorchDEQ with the same solver in both passes and a cap of 50.
"""

from __future__ import annotations

import os

import record  # isort: skip  (first: it sets the number of threads)

from candidates import MAX_STEPS, SOLVERS, TOLERANCE, Variant, inference, our_variant, torchdeq_variant
from layer import SIZES, Layer, count, label
from record import Bars, Candidate, Row, Target, interleave

TARGETS = {"64×128": 3.0, "256×512": 2.0, "32×2048": 1.2}
BASELINE = "TorchDEQ, adjoint {solver}, cap 50"
HEADLINE = "ours, adjoint GMRES"
COLUMNS = (
    "weight",
    "size",
    "solver",
    "variant",
    "forward ms",
    "forward + backward ms",
    "evaluations",
    "products",
    "residual",
    "gradient error",
    "speed-up",
    "speed-up over converged",
)


def variants(layer: Layer, solver: str) -> list[Variant]:
    """What is compared for one solver of the forward pass."""
    theirs = [
        torchdeq_variant(layer, solver, cap, adjoint)
        for cap in (50, 200)
        for adjoint in dict.fromkeys((solver, "fixed point"))
    ]
    ours = [
        our_variant(layer, solver, adjoint, rowwise) for adjoint in ("GMRES", "Neumann") for rowwise in (False, True)
    ]
    return theirs + ours


def accuracy(layer: Layer, variant: Variant) -> Row:
    """What one run of ``variant`` reached, and the work that it took."""
    z = variant.train()
    gradients = layer.gradients(z)
    forward = count(lambda: inference(variant), layer.z0.numel())
    graph = variant.train()
    backward = count(lambda: layer.gradients(graph), layer.z0.numel())
    return {
        "evaluations": forward.evaluations,
        "products": backward.products,
        "residual": layer.residual(z),
        "gradient error": layer.error(gradients),
    }


def measure(layer: Layer, solver: str, repeats: int, seconds: float) -> list[Row]:
    """One row for each variant, the speed-ups over TorchDEQ included."""
    rows, timed = [], {}
    for variant in variants(layer, solver):
        figures, error = record.attempt(lambda variant=variant: accuracy(layer, variant))
        row = {"weight": layer.kind, "size": label(layer.batch, layer.dim), "solver": solver, "variant": variant.name}
        rows.append(row | (figures or {"error": error}))
        if figures:
            timed[variant.name, "forward ms"] = Candidate(lambda _, v=variant: inference(v))
            timed[variant.name, "forward + backward ms"] = Candidate(lambda _, v=variant: layer.gradients(v.train()))
    timings = interleave(timed, repeats, seconds, seed=layer.seed)
    for row in rows:
        for what in ("forward ms", "forward + backward ms"):
            if (timing := timings.get((row["variant"], what))) is not None:
                row |= {
                    what: timing.cpu_ms,
                    f"{what}, quartiles": timing.cpu_quartiles_ms,
                    f"{what}, wall": timing.wall_ms,
                }
    _compare(rows, solver)
    return rows


def _compare(rows: list[Row], solver: str) -> None:
    """Add the speed-ups: over the baseline, and over the fastest TorchDEQ variant whose gradient is as good."""
    what = "forward + backward ms"
    baseline = next(row.get(what) for row in rows if row["variant"] == BASELINE.format(solver=solver))
    for row in rows:
        if what not in row:
            continue
        rivals = [
            other[what]
            for other in rows
            if other["variant"].startswith("TorchDEQ")
            and what in other
            and other["gradient error"] <= max(TOLERANCE * 3, 2 * row["gradient error"])
        ]
        row["speed-up"] = baseline / row[what]
        row["speed-up, wall"] = (
            next(r[f"{what}, wall"] for r in rows if r["variant"] == BASELINE.format(solver=solver))
            / row[f"{what}, wall"]
        )
        row["speed-up over converged"] = min(rivals) / row[what] if rivals else None


def targets(rows: list[Row]) -> list[Target]:
    """The speed-ups wanted of our headline variant."""
    return [
        Target(
            f"{row['weight']} W, {row['size']}, {row['solver']}: speed-up over TorchDEQ",
            row.get("speed-up"),
            ">=",
            TARGETS[row["size"]],
        )
        for row in rows
        if row["variant"] == HEADLINE
    ]


def panels(rows: list[Row]) -> list[Bars]:
    """Speed-ups of our variants over the baseline, a panel for each kind of weight."""
    out = []
    for kind in dict.fromkeys(row["weight"] for row in rows):
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["weight"] == kind and row["variant"].startswith("ours") and "speed-up" in row:
                groups.setdefault(f"{row['size']}\n{row['solver']}", {})[row["variant"]] = row["speed-up"]
        out.append(Bars(f"{kind} W", "times as fast as TorchDEQ, cap 50", groups, line=1.0))
    return out


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=15, seconds=40.0)
    load, rows = os.getloadavg(), []
    for kind in ("gaussian", "orthogonal"):
        for batch, dim in SIZES[:1] if options.quick else SIZES:
            layer = Layer(batch, dim, kind, options.seed)
            for solver in SOLVERS:
                rows += measure(layer, solver, options.repeats, options.seconds)
    record.record(
        "versus_torchdeq",
        options,
        load_before=load,
        settings={
            "layer": "z = tanh(W z + x), |W|_2 = 0.9, x ~ N(0, 1) precomputed, z0 = 0, loss <u, z> with u ~ N(0, 1)",
            "tolerance": f"relative {TOLERANCE:g}, forward and adjoint, both libraries",
            "caps": f"TorchDEQ 50 and 200 evaluations; ours max_steps {MAX_STEPS}",
            "target": f"'{HEADLINE}' (no rowwise promise) over '{BASELINE}', forward + backward",
        },
        rows={"Ours beside TorchDEQ": rows},
        columns={"Ours beside TorchDEQ": COLUMNS},
        targets=targets(rows),
        panels=panels(rows),
        notes=[
            "Times are medians of CPU time; quartiles and wall times are in the JSON. 'forward' is inference, no_grad.",
            "evaluations and products count f and its vector-Jacobian products in whole-batch equivalents; products "
            "include the last one, in the parameters.",
            "residual: largest relative residual of a sample, in float64. gradient error: the larger of the relative "
            "errors in x and W against a float64 reference.",
            "TorchDEQ returns f of the last z that it tested (one evaluation more in training), ours the z tested: at "
            "the same tolerance and number of evaluations its residual is one or two contractions smaller.",
            "speed-up: over TorchDEQ with the same solver in both passes and cap 50, converged or not. speed-up over "
            "converged: over the fastest TorchDEQ variant of that forward solver whose gradient error is at most "
            "3e-4, or at most twice that of the row.",
        ],
    )


if __name__ == "__main__":
    main()
