"""Run many random cases, and print a line for each that came out wrong, which reproduces it."""

from __future__ import annotations

import argparse
import collections
import sys
import time

import torch

from tests.truth.case import draw
from tests.truth.judge import Outcome, judged
from tests.truth.known import known


def main() -> int:
    """The command line; the exit status says whether a case came out wrong that is not known to."""
    parser = argparse.ArgumentParser(prog="python -m tests.truth", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--all", action="store_true", help="print every case, not only those that came out wrong")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally: collections.Counter[str] = collections.Counter()
    began, bad = time.perf_counter(), 0
    for number in range(options.first, options.first + options.cases):
        case = draw(number, options.seed)
        verdict, expected = judged(case), known(case)
        wrong = verdict.outcome is Outcome.WRONG
        tally[verdict.outcome.value + (" (known)" if wrong and expected else "")] += 1
        bad += wrong and not expected
        if options.all or (wrong and not expected):
            print(f"python -m tests.truth --seed {options.seed} --first {number} --cases 1 --all")
            print(f"    {case}\n    {verdict.outcome.value}: {verdict.why}", flush=True)
    print(f"{options.cases} cases in {time.perf_counter() - began:.0f} s:", dict(tally))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
