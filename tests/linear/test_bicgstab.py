from __future__ import annotations

from typing import Any

import pytest
import torch

from torchimplicit.linear import BiCGStab, LinearSolver
from torchimplicit.solution import Status
from torchimplicit.testing.linear_suite import LinearSolverSuite, matrix_operator, residuals


class TestBiCGStab(LinearSolverSuite):
    def make(self, **options: Any) -> LinearSolver:
        return BiCGStab(**options)


@pytest.mark.parametrize("restricted", [False, True])
def test_skew_symmetric_systems_break_down(restricted: bool) -> None:
    noise = torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = noise - noise.mT
    a[1] = torch.eye(10, dtype=torch.float64) + 0.1 * noise[1]
    b = torch.ones(3, 10, dtype=torch.float64)
    fields = {} if restricted else {"restrict": None}
    solution = BiCGStab(rtol=1e-8).solve(matrix_operator(a, **fields), b)
    assert solution.report.status.tolist() == [Status.BREAKDOWN, Status.CONVERGED, Status.BREAKDOWN]
    assert solution.value.isfinite().all()
    torch.testing.assert_close(solution.report.residual, residuals(a, b, solution.value) / 10**0.5)


def test_counts_two_products_a_step() -> None:
    a = torch.eye(12, dtype=torch.float64).expand(1, 12, 12) + 0.05
    tally = [0]
    report = BiCGStab().solve(matrix_operator(a, tally), torch.arange(12.0, dtype=torch.float64)[None]).report
    assert tally[0] == 2 * report.steps.item() + 1  # and the one that confirms it
