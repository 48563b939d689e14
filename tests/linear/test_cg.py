from __future__ import annotations

from typing import Any

from torchimplicit.linear import CG, LinearSolver
from torchimplicit.testing.linear_suite import LinearSolverSuite


class TestCG(LinearSolverSuite):
    kind = "definite"

    def make(self, **options: Any) -> LinearSolver:
        return CG(**options)
