from __future__ import annotations

from typing import Any

from torchimplicit.linear import Neumann, LinearSolver
from torchimplicit.testing.linear_suite import LinearSolverSuite


class TestNeumann(LinearSolverSuite):
    kind = "contraction"

    def make(self, **options: Any) -> LinearSolver:
        return Neumann(**options)
