from __future__ import annotations

from typing import Any

from torchimplicit import FixedPointIteration
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestFixedPointIteration(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return FixedPointIteration(**options)
