"""Success against effort on classical systems of equations: ours beside SciPy's, jaxopt's and Optimistix's.

``python -m benchmarks.classical`` solves the systems of ``tests/classical/roots.py`` (those of fewer than 200 unknowns)
from their standard starts and from ten and a hundred times as far, and writes a record (JSON), a table and a figure
below ``benchmarks/results``. An evaluation is one call of the function; what ours take of products with the Jacobian
beside, by automatic differentiation, is not counted, nor are the Jacobians of jaxopt and Optimistix, while SciPy's, by
differences, are. jaxopt and Optimistix run in a process of their own (``classical_peers.py``), with the interpreter
that ``--peers`` names; where they are not installed, they are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.optimize
import torch

import torchimplicit as ti
from tests.classical.roots import LARGE, ROOTS

SOLVED, WRONG = 1e-6, 1e-4
TIMES = (1, 10, 100)
OURS: dict[str, Any] = {
    "default": None,
    "NewtonKrylov": ti.NewtonKrylov(),
    "TrustRegion": ti.TrustRegion(),
    "LevenbergMarquardt": ti.LevenbergMarquardt(),
    "PseudoTransient": ti.PseudoTransient(),
    "Broyden": ti.Broyden(max_steps=200),
    "Anderson": ti.Anderson(max_steps=200),
}
THEIRS = ("hybr", "lm", "df-sane", "krylov")


def ours(f: Any, start: torch.Tensor, solver: Any) -> tuple[float, bool, float]:
    """The residual's norm, whether it was called converged, and the evaluations."""
    solution = ti.solve(ti.Root(f, batched=False), start, solver=solver, throw=False)
    return float(f(solution.value).norm()), bool(solution.converged), float(solution.evaluations)


def theirs(f: Any, start: torch.Tensor, method: str) -> tuple[float, bool, float]:
    count = 0

    def g(z: Any) -> Any:
        nonlocal count
        count += 1
        return f(torch.from_numpy(np.asarray(z, dtype=float))).numpy()

    options = {"krylov": {"maxiter": 200}, "df-sane": {"maxfev": 5000}}.get(method, {})
    try:
        with np.errstate(all="ignore"):
            found = scipy.optimize.root(g, start.numpy(), method=method, options=options)
        return float(np.linalg.norm(g(found.x))), bool(found.success), count
    except (ValueError, ArithmeticError, np.linalg.LinAlgError):
        return float("nan"), False, count


def measure(seconds: float) -> dict[str, Any]:
    """The record; what has not been begun after so many seconds is left out of it."""
    begun, record = time.time(), {}
    for name in (*OURS, *THEIRS):
        for times in TIMES:
            if time.time() - begun > seconds:
                return record
            rows = {}
            for problem, (f, start) in ROOTS.items():
                if len(start) < LARGE and (times == 1 or bool(start.any())):
                    run = ours(f, times * start, OURS[name]) if name in OURS else theirs(f, times * start, name)
                    rows[problem] = run
            record[f"{name} x{times}"] = rows
            print(name, times, sum(r[0] <= SOLVED for r in rows.values()), len(rows), flush=True)
    return record


def peers(python: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The record of jaxopt and Optimistix, in the interpreter ``python``, and the versions; empty where it lacks
    them."""
    known = {k: (z.tolist(), f(z).tolist()) for k, (f, z) in ROOTS.items() if len(z) < LARGE}
    worker = Path(__file__).parent / "classical_peers.py"
    told = json.dumps({"times": TIMES, "problems": known})
    done = subprocess.run([python, str(worker)], input=told, capture_output=True, text=True, check=False)
    if done.returncode:
        print("without jaxopt and Optimistix:", done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return {}, {}
    first, *rows = map(json.loads, done.stdout.splitlines())
    return {f"{name} x{times}": found for name, times, found in rows}, first[2]


def solvers(record: dict[str, Any]) -> list[str]:
    """Ours, SciPy's, and what else the record has."""
    return list(dict.fromkeys((*OURS, *THEIRS, *(name.rsplit(" x", 1)[0] for name in record))))


def table(record: dict[str, Any]) -> str:
    """Markdown: solved of how many, median evaluations of the solved, claims that are false."""
    lines = [
        "| solver | standard start | ×10 | ×100 | median evaluations | false claims |",
        "|---|---|---|---|---|---|",
    ]
    for name in solvers(record):
        runs = [record.get(f"{name} x{times}") for times in TIMES]
        if any(run is None for run in runs):
            continue
        library, _, method = f"SciPy {name}".partition(" ") if name in THEIRS else name.partition(" ")
        label = f"{library} `{method}`" if method else f"`{name}`"
        label = "**`ti.solve`, no solver named**" if name == "default" else label
        cells = [f"{sum(r[0] <= SOLVED for r in run.values())} of {len(run)}" for run in runs]
        effort = [statistics.median([r[2] for r in run.values() if r[0] <= SOLVED] or [0]) for run in runs]
        false = sum(r[1] and not r[0] <= WRONG for run in runs for r in run.values())
        lines.append(f"| {label} | {' | '.join(cells)} | {' / '.join(f'{e:.0f}' for e in effort)} | {false} |")
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """The share of all runs that are solved within so many evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5.2))
    for name in solvers(record):
        runs = [r for times in TIMES for r in record.get(f"{name} x{times}", {}).values()]
        if not runs:
            continue
        effort = sorted(r[2] for r in runs if r[0] <= SOLVED)
        style = (
            {"linewidth": 2.5}
            if name == "default"
            else {"linestyle": "-" if name in OURS else "--" if name in THEIRS else ":"}
        )
        axes.step(effort, np.arange(1, len(effort) + 1) / len(runs), where="post", label=name, **style)
    axes.set(xscale="log", xlabel="evaluations of the function", ylabel="share of runs solved", ylim=(0, 1))
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--again", type=Path, help="a record, of which what is asked for here is made anew")
    parser.add_argument("--only", choices=("ours", "peers", "none"), help="of a record given by --again: made anew")
    parser.add_argument("--peers", default=sys.executable, help="the Python that has jaxopt and Optimistix")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    old = json.loads(settings.again.read_text()) if settings.again else {"runs": {}, "versions": {}}
    record, versions = old["runs"], old["versions"]
    if settings.only in (None, "ours"):
        record |= measure(settings.seconds)
        versions |= {"torch": torch.__version__, "scipy": scipy.__version__, "torchimplicit": ti.__version__}
    if settings.only in (None, "peers"):
        runs, theirs_versions = peers(settings.peers)
        record |= runs
        versions |= theirs_versions
    stem = settings.out / f"classical-{time.strftime('%Y-%m-%d')}"
    stem.with_suffix(".json").write_text(json.dumps({"versions": versions, "runs": record}))
    said = (
        "# Classical systems of equations\n\n"
        f"By `python -m benchmarks.classical`, {time.strftime('%Y-%m-%d')}, float64: "
        f"{len(record.get('default x1', {}))} systems, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f".\n\n## Table\n\n{table(record)}\n\n## Figure\n\n![figure]({stem.name}.png)\n"
    )
    stem.with_suffix(".md").write_text(said)
    draw(record, stem.with_suffix(".png"))
    print(table(record))


if __name__ == "__main__":
    main()
