from __future__ import annotations

from typing import Any

from torchimplicit.linear import Dense, LinearSolver
from torchimplicit.testing.linear_suite import LinearSolverSuite


class TestDense(LinearSolverSuite):
    kind = "general"
    iterative = False

    def make(self, **options: Any) -> LinearSolver:
        return Dense(**options)
