from __future__ import annotations

from typing import Any

from torchimplicit import LBFGS
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestLBFGS(SolverSuite):
    kind = "energy"
    unrolled = False
    reads = 2.5
    row_cost = 1.5

    def make(self, **options: Any) -> Solver:
        return LBFGS(**options)
