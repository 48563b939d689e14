"""The shipped suites, with ``compile=True``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchimplicit import Anderson, FixedPointIteration
from torchimplicit.solution import Solution
from torchimplicit.solve import solve
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::torchimplicit.errors.CaptureWarning")]


class _Compiled(SolverSuite):
    def solve(self, function: Any, z0: Any, *args: Any, throw: bool = True, **options: Any) -> Solution:
        words = {key: options.pop(key) for key in ("rowwise", "batched") if key in options}
        solver = self.make(**{"rtol": 1e-8, "max_steps": 1000, **options})
        with torch.no_grad():
            return solve(self.problem(function, **words), z0, *args, solver=solver, throw=throw, compile=True)


class TestCompiledAnderson(_Compiled):
    def make(self, **options: Any) -> Solver:
        return Anderson(**options)


class TestCompiledIteration(_Compiled):
    def make(self, **options: Any) -> Solver:
        return FixedPointIteration(**options)
