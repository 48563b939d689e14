from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit.linear import Dense, LinearSolver
from torchimplicit.solution import Status
from torchimplicit.testing.linear_suite import LinearSolverSuite, matrix_operator, residuals


class TestDense(LinearSolverSuite):
    iterative = False

    def make(self, **options: Any) -> LinearSolver:
        return Dense(**options)


def gaussian(batch: int, dim: int) -> torch.Tensor:
    return torch.randn(batch, dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_has_its_own_status(dtype: torch.dtype) -> None:
    a, b = gaussian(6, 9).to(dtype), torch.ones(6, 9, dtype=dtype)
    a[1] = 0
    a[2, :, 3] = 0  # singular, exactly
    a[3, 0] = a[3, 1] + a[3, 2]  # singular, up to rounding
    a[4, 0, 0] = torch.nan
    b[5, 0] = torch.inf
    solution = Dense().solve(matrix_operator(a), b)
    expected = [Status.CONVERGED] + 3 * [Status.BREAKDOWN] + 2 * [Status.NONFINITE]
    assert solution.report.status.tolist() == expected
    assert solution.value[:5].isfinite().all()
    assert solution.value[5].isnan().all()
    good = slice(0, 4)
    true = (residuals(a, b, solution.value)[good] / 3).to(dtype)
    torch.testing.assert_close(solution.report.residual[good], true, rtol=1e-3, atol=1e-5)
    assert (true <= 1.001).all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_bordered_system(size: float) -> None:
    """Exact to rounding at condition 1e6, whatever the scale of the matrix is."""
    scale = size * torch.logspace(-3, 3, 40, dtype=torch.float64)
    noise = gaussian(2, 40)
    h = scale.sqrt()[:, None] * (torch.eye(40, dtype=torch.float64) + 0.02 * (noise + noise.mT)) * scale.sqrt()
    w = torch.nn.functional.normalize(1 + torch.rand(2, 40, dtype=torch.float64), dim=-1)
    p = torch.eye(40, dtype=torch.float64) - w[:, :, None] * w[:, None]
    b = (p @ noise[:, :, :1]).squeeze(-1)
    solutions = [
        Dense().solve(matrix_operator(p @ h @ p, symmetric=True, null=w), b),
        Dense().solve(matrix_operator(p @ h @ p, null=w, unprojected=matrix_operator(h)), b),
    ]
    for solution in solutions:
        assert solution.report.converged.all()
        assert (residuals(p @ h @ p, b, solution.value) <= 1e-9 * b.norm(dim=-1)).all()
        assert (solution.value * w).sum(-1).abs().max() <= 1e-9 * solution.value.abs().max()


def test_counts_its_products() -> None:
    tally = [0]
    report = Dense().solve(matrix_operator(gaussian(2, 7), tally), torch.ones(2, 7, dtype=torch.float64)).report
    assert tally[0] == 14
    assert report.evaluations == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_a_consistent_singular_system_the_solution_of_least_norm(dtype: torch.dtype) -> None:
    low = gaussian(4, 9)[:, :, :5].to(dtype)
    a = low @ low.mT
    a[1] = a[1] + torch.eye(9, dtype=dtype)  # a regular one
    scale = torch.logspace(-6, 6, 9, dtype=dtype)
    a[2] = scale[:, None] * (a[1] + a[1].T)  # a regular one, badly scaled
    b = (a @ torch.ones(9, 1, dtype=dtype))[:, :, 0]
    b[3] = 1  # not consistent
    found = Dense().solve(matrix_operator(a), b)
    assert found.report.status.tolist() == [Status.CONVERGED] * 3 + [Status.BREAKDOWN]
    assert found.report.condition is not None
    assert found.report.condition.isinf().tolist() == [True, False, False, True]
    eps = torch.finfo(dtype).eps
    least = (torch.linalg.pinv(a[0].double(), rtol=9 * eps) @ b[0].double()).to(dtype)
    torch.testing.assert_close(found.value[0], least, rtol=1e3 * eps, atol=1e3 * eps)
    torch.testing.assert_close(found.value[1], torch.ones(9, dtype=dtype), rtol=1e5 * eps, atol=1e5 * eps)


@pytest.mark.parametrize("dim", [50, 200])
def test_a_system_is_solved_to_the_rounding_of_its_product(dim: int) -> None:
    """With a condition of 1e8 no residual is smaller; the gradient of such a minimum is right, and said to be."""
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    hessian = basis @ torch.diag(torch.logspace(-8, 0, dim, dtype=torch.float64)) @ basis.T
    b, u = torch.randn(2, 1, dim, dtype=torch.float64)
    b.requires_grad_()
    problem = ti.Minimum(lambda z, b: (0.5 * z * (z @ hessian) - b * z).sum(dim=1))
    solution = ti.solve(problem, torch.zeros(1, dim, dtype=torch.float64), b)
    (gradient,) = torch.autograd.grad(solution.value, b, u)
    assert solution.adjoint is not None
    assert solution.adjoint.converged.all()
    expected = torch.linalg.solve(hessian, u.T).T
    assert (gradient - expected).norm() < 1e-7 * expected.norm()
