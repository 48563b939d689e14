from __future__ import annotations

from typing import Any

import pytest
import torch

from torchimplicit.linear import CG, Diagonal, LinearSolver
from torchimplicit.solution import Status
from torchimplicit.testing.linear_suite import LinearSolverSuite, matrix_operator, residuals


class TestCG(LinearSolverSuite):
    kind = "definite"

    def make(self, **options: Any) -> LinearSolver:
        return CG(**options)


@pytest.mark.parametrize("restricted", [False, True])
def test_negative_curvature_is_a_breakdown(restricted: bool) -> None:
    a = torch.diag_embed(torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0], [0.0, 1.0, 2.0], [2.0, 2.0, 2.0]]))
    operator = matrix_operator(a, symmetric=True, **({} if restricted else {"restrict": None}))
    solution = CG().solve(operator, torch.ones(4, 3))
    expected = [Status.CONVERGED, Status.BREAKDOWN, Status.BREAKDOWN, Status.CONVERGED]
    assert solution.report.status.tolist() == expected
    assert solution.value.isfinite().all()
    true = residuals(a, torch.ones(4, 3), solution.value) / 3**0.5
    torch.testing.assert_close(solution.report.residual, true.float(), rtol=1e-4, atol=1e-6)


def test_an_ill_conditioned_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, 60, dtype=torch.float64)
    noise = torch.randn(2, 60, 60, generator=generator, dtype=torch.float64) / 60**0.5
    core = torch.eye(60, dtype=torch.float64) + 0.15 * (noise + noise.mT)
    a, b = scale.sqrt()[:, None] * core * scale.sqrt(), torch.randn(2, 60, generator=generator, dtype=torch.float64)
    operator = matrix_operator(a, symmetric=True)
    solution = CG(rtol=1e-9, preconditioner=Diagonal(scale)).solve(operator, b)
    assert solution.report.converged.all()
    assert (residuals(a, b, solution.value) <= 1e-9 * b.norm(dim=-1)).all()
    assert solution.report.steps.max() <= 20
    plain = CG(rtol=1e-9, max_steps=100).solve(operator, b)
    assert plain.report.status.eq(Status.MAX_STEPS).all()


def test_the_recurrence_is_not_believed() -> None:
    """In float32 the recurrence's residual goes on falling below what the iterate reaches."""
    scale = torch.logspace(0, 5, 50)
    turn = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(0))).Q
    a = ((turn * scale) @ turn.T)[None]
    a, b = (a + a.mT) / 2, torch.ones(1, 50)
    solution = CG(rtol=1e-7, max_steps=2000).solve(matrix_operator(a, symmetric=True), b)
    true = residuals(a, b, solution.value) / 50**0.5
    torch.testing.assert_close(solution.report.residual.double(), true, rtol=0.5, atol=1e-7)
    assert solution.report.converged.equal(solution.report.residual <= 1e-7)
