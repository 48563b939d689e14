"""The gradient of a physics loss, a loss on an equilibrium and its derivatives in time: what it costs.

    python benchmarks/second_order.py

The loss and the ways to its gradient are in ``second_order_methods.py``: our direct routines, the composition of our
autograd nodes, the unrolled iteration, xitorch, and Optimistix with Lineax. Each gradient is compared with a dense
reference. Memory is measured in processes of their own (``second_order_memory.py``).
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import record  # isort: skip  (first: it sets the number of threads)

import second_order_memory
from record import Bars, Candidate, Row, Target, attempt, interleave
from second_order_methods import (
    COMPOSED,
    DIRECT,
    FORWARD,
    OPTIMISTIX,
    POINTS,
    RIGHT,
    TOLERANCE,
    UNROLLED,
    XITORCH,
    Physics,
    counted,
    direct,
    methods,
    reference,
    steps_needed,
    with_optimistix,
)

warnings.filterwarnings("ignore")

CASES = (
    *((n, "gaussian", 0.9, 1) for n in POINTS),
    *((n, "orthogonal", 0.9, 1) for n in (10, 200, 1000)),
    (200, "orthogonal", 0.99, 1),
    *((n, "gaussian", 0.9, 2) for n in (10, 200)),
)
MEMORY = (DIRECT, COMPOSED[0], UNROLLED[0], UNROLLED[1], XITORCH[0], OPTIMISTIX[0])
NORMS = (0.5, 0.9, 0.99)
"""Of the orthogonal W for which memory is measured against the number of steps."""
TIMES, WORK, MEMORIES, STEPS, RATIOS = (
    "Time and error",
    "Linear solves and calls of f",
    "Peak memory by size",
    "Peak memory by contraction",
    "Ratios of time",
)


def label(p: Physics) -> str:
    """``n = 10, gaussian 0.9, first order``."""
    return f"n = {p.n}, {p.kind} {p.norm:g}, order {p.order}"


def fastest_forward(p: Physics) -> str:
    """Which solver of ours is quickest here; all others pay for theirs."""

    def seconds(name: str) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            direct(p, FORWARD[name])
            times.append(time.process_time() - start)
        return min(times)

    return min((name for name in FORWARD if p.n <= 200 or "dense" not in name), key=seconds)


def measure(p: Physics, options: Any) -> list[Row]:
    """A row for each way."""
    wanted = reference(p)
    steps, forward = steps_needed(p, wanted), fastest_forward(p)
    rows, timed = [], {}
    for name, plain in methods(p, forward, steps).items():
        call: Callable[[], Any] = plain
        row: Row = {"case": label(p), "n": p.n, "points": p.points, "kind": p.kind, "norm": p.norm, "order": p.order}
        row |= {"method": name, "forward": forward, "unrolled steps": steps}
        if name in OPTIMISTIX:
            start = time.process_time()
            made, failure = attempt(lambda name=name: with_optimistix(p, name == OPTIMISTIX[1]))
            if failure is None:
                call = made
                _, failure = attempt(call)
            row["compilation, s"] = time.process_time() - start
        with counted(p) as figures:
            gradient, failure = attempt(call)
        if failure:
            row["failure"] = failure
        else:
            row["error"] = p.error(gradient, wanted)
            timed[name] = Candidate(lambda _, call=call: call())
            if name not in OPTIMISTIX:
                row |= {"solves": figures["solves"] or None, "calls of f": figures["calls"]}
        rows.append(row)
    timings = interleave(timed, options.repeats, options.seconds, options.seed)
    for row in rows:
        if (timing := timings.get(row["method"])) is not None:
            row |= {"ms": timing.cpu_ms, "wall ms": timing.wall_ms, "quartiles": timing.cpu_quartiles_ms}
    return rows


def ratios(rows: list[Row]) -> list[Row]:
    """The times of the others over that of the direct route, the quickest right one of each kind."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = next(row for row in rows if row["case"] == case and row["method"] == DIRECT)

        def quickest(*beginnings: str, case: str = case) -> float | None:
            times = [
                row["ms"]
                for row in rows
                if row["case"] == case and row["method"].startswith(beginnings) and row.get("error", 1.0) <= 10 * RIGHT
            ]
            return min(times) if times else None

        others = {
            "composed, best": quickest("composed"),
            "composed, reverse over reverse": quickest(COMPOSED[1]),
            "unrolled, best": quickest("unrolled"),
            "xitorch, best": quickest("xitorch"),
            "Optimistix, best": quickest("Optimistix"),
        }
        figures = {name: None if ms is None else ms / mine["ms"] for name, ms in others.items()}
        found.append(
            {"case": case, "steps": mine["unrolled steps"], "forward": mine["forward"], "direct, ms": mine["ms"]}
            | figures
        )
    return found


def memory(options: Any) -> tuple[list[Row], list[Row]]:
    """Rows by size, and by contraction."""
    by_size, by_steps = [], []
    for n in (10,) if options.quick else (10, 200, 1000):
        p = Physics(n, POINTS[n], "gaussian", 0.9, 1)
        steps = steps_needed(p, reference(p))
        row: Row = {"n": n, "points": p.points, "steps": steps}
        by_size.append(row | {f"{name}, MiB": second_order_memory.measured(name, p, steps) for name in MEMORY})
    for norm in NORMS[:1] if options.quick else NORMS:
        p = Physics(200, POINTS[200], "orthogonal", norm, 1)
        steps = steps_needed(p, reference(p))
        row = {"norm": norm, "n": p.n, "points": p.points, "steps": steps}
        by_steps.append(row | {f"{name}, MiB": second_order_memory.measured(name, p, steps) for name in MEMORY})
    return by_size, by_steps


def targets(rows: list[Row], compared: list[Row], by_steps: list[Row]) -> list[Target]:
    """The aims, case by case."""
    found = []
    for row in compared:
        found.append(Target(f"{row['case']}: composed (best) / direct", row["composed, best"], ">=", 2))
        name = f"{row['case']}: composed (reverse over reverse) / direct"
        found.append(Target(name, row["composed, reverse over reverse"], ">=", 2))
        found.append(Target(f"{row['case']}: unrolled (best) / direct", row["unrolled, best"], ">=", 5))
        found.append(Target(f"{row['case']}: xitorch (best) / direct", row["xitorch, best"], ">=", 1))
    found += [
        Target(f"{row['case']}: error of the direct route", row.get("error"), "<=", RIGHT)
        for row in rows
        if row["method"] == DIRECT
    ]
    if len(by_steps) > 1:
        first, last = by_steps[0], by_steps[-1]
        grown = last[f"{DIRECT}, MiB"] / first[f"{DIRECT}, MiB"]
        found.append(Target(f"memory of direct, {last['steps']} steps over {first['steps']}", grown, "<=", 1.2))
    return found


def panels(rows: list[Row], by_steps: list[Row]) -> list[Bars]:
    """Times by case, and memory by the number of steps."""
    shown = (DIRECT, *COMPOSED, *UNROLLED, XITORCH[0], XITORCH[1], OPTIMISTIX[0], OPTIMISTIX[1])
    panels = []
    for kind, norm, order in dict.fromkeys((row["kind"], row["norm"], row["order"]) for row in rows):
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            same = (row["kind"], row["norm"], row["order"]) == (kind, norm, order)
            if same and row["method"] in shown and row.get("error", 1.0) <= 10 * RIGHT:
                groups.setdefault(f"n = {row['n']}", {})[row["method"]] = row["ms"]
        panels.append(Bars(f"{kind} W of norm {norm:g}, derivatives of order {order}: time", "ms", groups, log=True))
    memories = {
        f"{row['steps']} steps": {name: row[f"{name}, MiB"] for name in MEMORY if row[f"{name}, MiB"]}
        for row in by_steps
    }
    return [*panels, Bars("peak memory, n = 200, 32 points", "MiB", memories, log=True)]


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=7, seconds=5.0)
    load, rows = os.getloadavg(), []
    for n, kind, norm, order in CASES[:1] if options.quick else CASES:
        rows += measure(Physics(n, POINTS[n], kind, norm, order, options.seed), options)
        print(rows[-1]["case"], time.strftime("%H:%M:%S"), flush=True)
    compared = ratios(rows)
    by_size, by_steps = memory(options)
    memories = tuple(f"{name}, MiB" for name in MEMORY)
    comparisons = tuple(name for name in compared[0] if name not in ("case", "steps", "forward", "direct, ms"))
    record.record(
        "second_order",
        options,
        load_before=load,
        settings={
            "problem": "z = tanh(W z + U t + b), float64, from zero; u = C z with 2 outputs; mean square of "
            "u' + u/2 - sin t, or of u'' + u'/2 + u - sin t, at 4 to 32 points t; its gradient in W, U, b. W is "
            "Gaussian of spectral norm 0.9, or orthogonal times a factor, for which iterations are slow",
            "tolerance": f"{TOLERANCE:g} relative; unrolled: the fewest steps (within 5 %) whose gradient has a "
            f"relative error of {RIGHT:g}",
            "forward": "ours, direct and composed: the quickest of plain iteration, Anderson and Newton with dense "
            "Jacobians; the forward solve is part of every time",
        },
        rows={RATIOS: compared, TIMES: rows, WORK: rows, MEMORIES: by_size, STEPS: by_steps},
        columns={
            RATIOS: ("case", "steps", "forward", "direct, ms", *comparisons),
            MEMORIES: ("n", "points", "steps", *memories),
            STEPS: ("norm", "steps", *memories),
            TIMES: ("case", "method", "ms", "error", "compilation, s", "failure"),
            WORK: ("case", "method", "solves", "calls of f"),
        },
        targets=targets(rows, compared, by_steps),
        panels=panels(rows, by_steps),
        notes=[
            "Ratios are the time of the quickest way of each library whose gradient is right to 1e-7, over the time of "
            "the direct route.",
            "Peak memory is the resident set's, in a process of its own, above what was resident before the call.",
            "Solves: right-hand sides; xitorch takes all points as one system, and its dense solves are not counted.",
            "JAX is jitted, and its compilation is no part of its time.",
        ],
    )


if __name__ == "__main__":
    main()
