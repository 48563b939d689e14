from __future__ import annotations

from typing import Any

from torchimplicit import Anderson
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestAnderson(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return Anderson(**options)
