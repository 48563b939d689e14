from __future__ import annotations

from typing import Any

from torchimplicit import GradientDescent
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestGradientDescent(SolverSuite):
    kind = "energy"

    def make(self, **options: Any) -> Solver:
        return GradientDescent(**{"step_size": 1.0, "momentum": 0.0, **options})
