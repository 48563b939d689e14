"""Remakes the records that docs/performance.md shows, one after another, and README's figures from them.

    python benchmarks/performance.py --peers PYTHON     # on a machine that does nothing else; about half an hour
    python benchmarks/performance.py --readme           # README's figures alone

A record that was made with the library as it is now (no file of it has changed since that commit) is kept, so that the
same command goes on where it was interrupted. ``--peers`` is an interpreter with jaxopt, for ``models.py``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- speed -->\n).*?(?=<!-- end of speed -->)", re.DOTALL)


class Run(NamedTuple):
    """A benchmark, its options, and the minutes that it takes on an idle core."""

    name: str
    options: tuple[str, ...]
    minutes: int


RUNS = (
    Run("captured", (), 6),
    Run("models", ("--budget", "780"), 16),
    Run("regression", ("--against", "afd92de"), 8),
)


def newest(name: str) -> dict[str, Any]:
    """The latest record of a benchmark; empty where there is none."""
    runs = sorted(RESULTS.glob(f"{name}-*.json"))
    return json.loads(runs[-1].read_text(encoding="utf-8")) if runs else {}


def current(name: str) -> bool:
    """Whether the latest record was made with the library as it is now."""
    made_with = newest(name).get("versions", {}).get("torchimplicit", "with changes")
    if "with changes" in made_with:
        return False
    command = ["git", "diff", "--quiet", made_with, "--", "torchimplicit", f"benchmarks/{name}.py"]
    return subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.DEVNULL).returncode == 0


def speed(captured: dict[str, Any], models: dict[str, Any]) -> str:
    """README's figures: a solve with its gradient beside TorchDEQ and jitted jaxopt."""
    dates = {name: record["date"][:10] for name, record in (("captured", captured), ("models", models))}
    lines = [
        f"How many times as fast as TorchDEQ ([record](benchmarks/results/captured-{dates['captured']}.md)):",
        "",
        "| | eager | compiled | compiled, over its evaluations alone |",
        "|---|---|---|---|",
    ]
    for row in captured["rows"]["Eager and captured"]:
        if "TorchDEQ ms" in row:
            eager, compiled = (row["TorchDEQ ms"] / row[f"{kind} ms"] for kind in ("eager", "captured"))
            lines.append(
                f"| {row['size']}, {row['solver']} | {eager:.1f} | {compiled:.1f} | {row['captured / floor']:.2f} |"
            )
    met = sum(target["passed"] for target in captured["targets"])
    lines += [
        "",
        f"This meets {met} of the {len(captured['targets'])} targets that were set beforehand.",
        "",
        "Milliseconds with Anderson, by batch, width and tolerance "
        f"([record](benchmarks/results/models-{dates['models']}.md)):",
        "",
        "| | TorchDEQ | eager | compiled | jitted jaxopt |",
        "|---|---|---|---|---|",
    ]
    for row in models["rows"]["Growth"]:
        cells = [row.get(f"{name} ms") for name in ("peer", "eager", "captured", "jaxopt")]
        shown = ["–" if ms is None else f"{ms:.3g}" for ms in cells]
        lines.append("| " + " | ".join([row["model"], *shown]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is not made yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="an interpreter with jaxopt")
    parser.add_argument("--readme", action="store_true", help="write README's figures alone")
    parser.add_argument("--quick", action="store_true", help="one short row of each, recorded nowhere")
    options = parser.parse_args()
    for run in () if options.readme else RUNS:
        if current(run.name) and not options.quick:
            print(f"{run.name}: kept, made with the library as it is", flush=True)
            continue
        command = [sys.executable, str(ROOT / "benchmarks" / f"{run.name}.py"), *run.options]
        command += ["--peers", options.peers] if run.name == "models" and options.peers else []
        command += ["--quick", "--no-record"] if options.quick else []
        print(f"{run.name}: about {run.minutes} minutes", flush=True)
        begin = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True)
        print(f"{run.name}: {(time.perf_counter() - begin) / 60:.1f} minutes", flush=True)
    if not options.quick:
        text = README.read_text(encoding="utf-8")
        block = speed(newest("captured"), newest("models"))
        README.write_text(BLOCK.sub(lambda _: block, text), encoding="utf-8")


if __name__ == "__main__":
    main()
