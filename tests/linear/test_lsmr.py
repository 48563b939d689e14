from __future__ import annotations

from typing import Any

from torchimplicit.linear import LSMR, LinearSolver
from torchimplicit.testing.linear_suite import LinearSolverSuite


class TestLSMR(LinearSolverSuite):
    kind = "general"

    def make(self, **options: Any) -> LinearSolver:
        return LSMR(**options)
