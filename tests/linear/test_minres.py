from __future__ import annotations

from typing import Any

from torchimplicit.linear import MINRES, LinearSolver
from torchimplicit.testing.linear_suite import LinearSolverSuite


class TestMINRES(LinearSolverSuite):
    kind = "symmetric"

    def make(self, **options: Any) -> LinearSolver:
        return MINRES(**options)
