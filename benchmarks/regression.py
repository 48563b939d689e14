"""This tree beside another revision of it: forward and backward passes, interleaved, in processes of their own.

    python benchmarks/regression.py --against afd92de
    python benchmarks/regression.py --against HEAD       # of a clean tree: every ratio should be 1

Both trees run the same script of this one (``regression_worker.py``), on one core, in turn, one call after the other.
Where a process happens to have its memory moves all its times by some per cent, so that many pairs of processes are
made, and it is over these that the figures are.
"""

from __future__ import annotations

import os

import record  # isort: skip  (first: it sets the number of threads, and the core)

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from record import ROOT, Bars, Row, Target

ALLOWED = 1.08
"""The most time that a pass may take, in terms of the other revision's."""
VISIT_MS = 60.0
"""A visit to a case takes pairs of calls until they have taken this long: short calls vary most."""
COLUMNS = ("size", "solver", "passes", "this ms", "other ms", "ratio", "least", "largest", "calls")


class Worker:
    """A process that times one tree's library."""

    def __init__(self, tree: Path, cases: str, seed: int):
        command = [sys.executable, str(ROOT / "benchmarks" / "regression_worker.py"), cases, str(seed)]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._read()
        assert Path(hello["file"]).is_relative_to(tree), f"{hello['file']} is not of {tree}"
        self.cases: list[str] = hello["cases"]

    def cpu_ms(self, case: str) -> float:
        """One sample."""
        stream: IO[str] | None = self.process.stdin
        assert stream is not None
        stream.write(case + "\n")
        stream.flush()
        return float(self._read()[1])

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker has stopped: its message is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def checked_out(revision: str) -> Iterator[tuple[Path, str]]:
    """A temporary checkout of the revision, and its commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    commit = git("rev-parse", "--short", revision)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree, commit
        finally:
            git("worktree", "remove", "--force", str(tree))


def measure(other: Path, options: Any) -> dict[str, list[list[tuple[float, float]]]]:
    """Pairs of CPU milliseconds, of this tree and the other, by case and by pair of processes."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    generator, began = random.Random(options.seed), time.perf_counter()
    for launch in range(options.launches):
        if launch >= 2 and time.perf_counter() - began > options.seconds:
            break
        with ExitStack() as stack:
            workers = []
            # which of the two starts first may matter too
            for tree in (ROOT, other) if launch % 2 == 0 else (other, ROOT):
                workers.append(Worker(tree, "quick" if options.quick else "whole", options.seed))
                stack.callback(workers[-1].close)
            this, that = workers if launch % 2 == 0 else reversed(workers)
            cases = list(this.cases)
            for case in cases:
                found.setdefault(case, []).append([])
            for _ in range(options.repeats):
                generator.shuffle(cases)
                for case in cases:
                    found[case][-1] += _pairs(this, that, case, generator)
    return found


def _pairs(this: Worker, that: Worker, case: str, generator: random.Random) -> Iterator[tuple[float, float]]:
    spent = 0.0
    while spent < VISIT_MS:
        if generator.random() < 0.5:
            mine, theirs = this.cpu_ms(case), that.cpu_ms(case)
        else:
            theirs, mine = that.cpu_ms(case), this.cpu_ms(case)
        spent += mine + theirs
        yield mine, theirs


def rows_of(found: dict[str, list[list[tuple[float, float]]]]) -> list[Row]:
    """Medians over the pairs of processes of the medians within each."""
    rows = []
    for case in sorted(found, key=lambda case: (case.split("|")[0].rjust(30), case)):
        size, solver, passes = (part.strip() for part in case.split("|"))
        ratios = [statistics.median(mine / theirs for mine, theirs in pairs) for pairs in found[case]]
        every = [pair for pairs in found[case] for pair in pairs]
        rows.append(
            {
                "size": size,
                "solver": solver,
                "passes": passes,
                "this ms": statistics.median(mine for mine, _ in every),
                "other ms": statistics.median(theirs for _, theirs in every),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "largest": max(ratios),
                "ratios": ratios,
                "calls": len(every),
            }
        )
    return rows


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=2, seconds=360.0, against="HEAD", launches=5)
    load = os.getloadavg()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the checkout is taken away
    with checked_out(options.against) as (tree, commit):
        rows = rows_of(measure(tree, options))
    title = f"This tree, and {commit}"
    names = [f"{row['size']}, {row['solver']}, {row['passes']}" for row in rows]
    record.record(
        "regression",
        options,
        load_before=load,
        settings={
            "other": f"commit {commit}",
            "layer": "z = tanh(W z + x), Gaussian W, |W|_2 = 0.9, from zero, float32, relative tolerance 1e-4",
            "MDEQ-small": "a training step without the optimizer; Broyden, relative 1e-3, at most 22 and 24 steps",
        },
        rows={title: rows},
        columns={title: COLUMNS},
        targets=[Target(name, row["ratio"], "<=", ALLOWED) for name, row in zip(names, rows, strict=True)],
        panels=[
            Bars(
                "CPU time of a pass, relative to the other revision",
                "ratio",
                {
                    size: {f"{r['solver']}, {r['passes']}": r["ratio"] for r in rows if r["size"] == size}
                    for size in dict.fromkeys(row["size"] for row in rows)
                },
                line=1.0,
            )
        ],
        notes=[
            "ratio: of the CPU times of two calls, one of each tree right after the other; the median over the calls "
            "of a pair of processes, and of these the median (least, largest) over the pairs of processes.",
            f"At most {options.launches} pairs of processes (fewer where the time was over), all on one core.",
        ],
    )


if __name__ == "__main__":
    main()
