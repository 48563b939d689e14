from __future__ import annotations

from typing import Any

from torchimplicit.linear import GMRES, LinearSolver
from torchimplicit.testing.linear_suite import LinearSolverSuite


class TestGMRES(LinearSolverSuite):
    def make(self, **options: Any) -> LinearSolver:
        return GMRES(**options)
