"""The memory of one way to the gradient of the physics loss, in a process of its own; started by ``second_order.py``.

    python benchmarks/second_order_memory.py METHOD N POINTS KIND NORM STEPS

Prints the peak of the resident memory during one call above what was resident before it, in MiB. The same way has run
before on a state of five, so that libraries are loaded; a jitted one is compiled. Needs Linux.
"""

from __future__ import annotations

import record  # noqa: F401  # isort: skip  (first: it sets the number of threads)

import ctypes
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from second_order_methods import OPTIMISTIX, Physics, methods, with_optimistix


def _resident(key: str) -> int:
    """KiB, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak(call: Callable[[], Any]) -> float:
    """MiB that the call takes beyond what there is now, at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free and still resident would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS:")
    call()
    return (_resident("VmHWM:") - before) / 1024


def measured(name: str, p: Physics, steps: int) -> float | None:
    """The same in a fresh process; ``None`` where that fails."""
    arguments = (name, p.n, p.points, p.kind, p.norm, steps)
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )
    lines = done.stdout.splitlines()
    return None if done.returncode or not lines else float(json.loads(lines[-1]))


def main() -> None:
    """Print one figure."""
    warnings.filterwarnings("ignore")
    name, n, points, kind, norm, steps = sys.argv[1:]

    def made(p: Physics) -> Callable[[], Any]:
        if name in OPTIMISTIX:
            return with_optimistix(p, name == OPTIMISTIX[1])
        return methods(p, "plain iteration", int(steps))[name]

    made(Physics(5, 2, "gaussian", 0.5, 1))()
    call = made(Physics(int(n), int(points), kind, float(norm), 1))
    if name in OPTIMISTIX:
        call()
    print(json.dumps(peak(call)))


if __name__ == "__main__":
    main()
