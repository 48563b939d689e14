from __future__ import annotations

from typing import Any

from torchimplicit import Broyden
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestBroyden(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return Broyden(**options)
