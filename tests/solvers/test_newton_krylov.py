from __future__ import annotations

from typing import Any

from torchimplicit import NewtonKrylov
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestNewtonKrylov(SolverSuite):
    unrolled = False
    half = False
    reads = 6.0
    row_cost = 2.6

    def make(self, **options: Any) -> Solver:
        return NewtonKrylov(**options)
