from __future__ import annotations

from typing import Any

from torchimplicit.linear import BiCGStab, LinearSolver
from torchimplicit.testing.linear_suite import LinearSolverSuite


class TestBiCGStab(LinearSolverSuite):
    kind = "general"

    def make(self, **options: Any) -> LinearSolver:
        return BiCGStab(**options)
