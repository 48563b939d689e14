from __future__ import annotations

from typing import Any

import pytest
import torch

from torchimplicit.linear import LSMR, LinearOperator, LinearSolver
from torchimplicit.solution import Status
from torchimplicit.testing.linear_suite import LinearSolverSuite, matrix_operator


class TestLSMR(LinearSolverSuite):
    def make(self, **options: Any) -> LinearSolver:
        return LSMR(**options)


def low_rank(batch: int, dim: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, batch, dim, rank, generator=generator, dtype=torch.float64)
    return left @ right.mT / rank


def test_least_squares_of_least_norm() -> None:
    a, b = low_rank(3, 12, 7), torch.ones(3, 12, dtype=torch.float64)
    expected = (torch.linalg.pinv(a) @ b.unsqueeze(-1)).squeeze(-1)
    solution = LSMR(rtol=1e-10).solve(matrix_operator(a), b)
    assert solution.report.status.eq(Status.BREAKDOWN).all()
    torch.testing.assert_close(solution.value, expected, rtol=1e-6, atol=1e-8)


def test_singular_but_consistent() -> None:
    a = low_rank(3, 12, 7)
    b = a.sum(-1)
    expected = (torch.linalg.pinv(a) @ b.unsqueeze(-1)).squeeze(-1)
    solution = LSMR(rtol=1e-10).solve(matrix_operator(a), b)
    assert solution.report.converged.all()
    torch.testing.assert_close(solution.value, expected, rtol=1e-6, atol=1e-8)


def test_needs_the_transpose() -> None:
    operator = LinearOperator(product=lambda v: v, batch=1, dim=3, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="transposed_product"):
        LSMR().solve(operator, torch.ones(1, 3))
