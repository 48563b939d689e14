from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchimplicit.linear import MINRES, Diagonal, Factorized, Jacobi, LinearOperator, LinearSolver
from torchimplicit.solution import Status
from torchimplicit.testing.linear_suite import LinearSolverSuite, matrix_operator, residuals


class TestMINRES(LinearSolverSuite):
    kind = "symmetric"

    def make(self, **options: Any) -> LinearSolver:
        return MINRES(**options)


class TestMINRESOnDefiniteSystems(LinearSolverSuite):
    kind = "definite"

    def make(self, **options: Any) -> LinearSolver:
        return MINRES(**options)


def constrained(condition: float, indefinite: bool, dim: int = 300) -> tuple[Tensor, LinearOperator]:
    """H and the operator of PHP, two samples; the eigenvalues of H spread by ``condition`` through its diagonal."""
    generator = torch.Generator().manual_seed(0)
    half = torch.log10(torch.tensor(condition)).item() / 2
    scale = torch.logspace(-half, half, dim, dtype=torch.float64).sqrt()
    noise = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64)
    core = torch.eye(dim, dtype=torch.float64) + 0.25 * (noise + noise.mT) / (2 * (2 * dim) ** 0.5)
    if indefinite:
        sign = torch.where(torch.rand(dim, generator=generator) < 0.2, -1.0, 1.0).double()
        core = core + torch.diag(sign - 1)
    h = scale[:, None] * core * scale
    w = 0.5 + torch.rand(2, dim, generator=generator, dtype=torch.float64)
    w = w / w.norm(dim=-1, keepdim=True)

    def project(v: Tensor) -> Tensor:
        return v - (v * w).sum(-1, keepdim=True) * w

    def php(v: Tensor) -> Tensor:
        return project((h @ project(v).unsqueeze(-1)).squeeze(-1))

    operator = LinearOperator(
        product=php, batch=2, dim=dim, dtype=h.dtype, device=h.device, symmetric=True, null=w,
        unprojected=matrix_operator(h, symmetric=True),
    )  # fmt: skip
    return h, operator


def true_residual(operator: LinearOperator, b: Tensor, y: Tensor) -> Tensor:
    b = operator.project(b)
    return (b - operator.product(y)).norm(dim=-1) / b.norm(dim=-1)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize(("indefinite", "steps"), [(False, 21), (True, 29)])
def test_singular_ill_conditioned_system(condition: float, indefinite: bool, steps: int) -> None:
    """The adjoint of a minimum under a linear constraint, for which other libraries have no solver that works.

    The step counts are those of the prototype in REFERENCES.md at condition 1e6.
    """
    h, operator = constrained(condition, indefinite)
    b = torch.randn(2, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for preconditioner in (Jacobi(), Diagonal(h.diagonal(dim1=1, dim2=2))):
        solution = MINRES(rtol=1e-8, preconditioner=preconditioner).solve(operator, b)
        assert solution.report.converged.all()
        assert (true_residual(operator, b, solution.value) <= 1e-8).all()
        assert solution.report.steps.max() <= steps
        assert (solution.value * operator.null).sum(-1).abs().max() < 1e-12 * solution.value.abs().max() * 300


def test_without_a_preconditioner_it_says_that_it_failed() -> None:
    _, operator = constrained(1e6, True)
    b = torch.randn(2, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = MINRES(rtol=1e-8, max_steps=300).solve(operator, b)
    assert solution.report.status.eq(Status.MAX_STEPS).all()
    torch.testing.assert_close(solution.report.residual, true_residual(operator, b, solution.value), rtol=1e-6, atol=0)


def test_a_reference_hessian_is_the_best_preconditioner() -> None:
    h, operator = constrained(1e6, False)
    b = torch.randn(2, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = MINRES(rtol=1e-8, preconditioner=Factorized(h)).solve(operator, b)
    assert solution.report.converged.all()
    assert solution.report.steps.max() <= 3


def test_starts_again_until_the_true_residual_is_small() -> None:
    """At condition 1e10 the recurrence claims convergence well before the iterate has it."""
    scale = torch.logspace(0, -7, 40, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    a = ((turn * scale) @ turn.T)[None]
    a = (a + a.mT) / 2
    b = torch.ones(1, 40, dtype=torch.float64)
    solution = MINRES(rtol=1e-10, max_steps=5000).solve(matrix_operator(a, symmetric=True), b)
    true = residuals(a, b, solution.value) / 40**0.5
    torch.testing.assert_close(solution.report.residual, true, rtol=0.2, atol=1e-12)
    assert solution.report.converged.equal(solution.report.residual <= 1e-10)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("least", [-5.0, -1e-2, 0.0, 1e-2])
def test_negative_curvature_is_met(least: float, preconditioned: bool) -> None:
    """Wherever there is any, and nowhere else; the same for a block, of which one right-hand side feels nothing."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 40, 40, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.linspace(0.5, 50, 40, dtype=torch.float64).repeat(3, 1)
    eigenvalues[:2, 0] = least
    operator = matrix_operator(basis @ torch.diag_embed(eigenvalues) @ basis.mT, symmetric=True)
    b = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    other = b - (b * basis[:, :, 0]).sum(1, keepdim=True) * basis[:, :, 0]
    if least == 0:
        b = other
    diagonal = Diagonal(torch.linspace(1, 3, 40, dtype=torch.float64))
    solver = MINRES(rtol=1e-9, preconditioner=diagonal if preconditioned else None)
    for found in (solver.solve(operator, b), solver.solve_block(operator, torch.stack((other, b)))):
        met = found.report.curvature
        assert met is not None
        assert bool(found.report.converged.all())
        assert (met < 0).tolist() == [least < 0, least < 0, False]
        assert bool(met[2].isnan())
        assert preconditioned or not bool((met < least * (1 + 1e-9)).any())


def test_the_curvature_is_the_least_of_the_residuals() -> None:
    _, operator = constrained(1e2, True)
    b = operator.project(torch.ones(2, 300, dtype=torch.float64))
    least = torch.full((2,), torch.inf, dtype=torch.float64)
    for steps in range(1, 26):
        x = MINRES(rtol=0.0, max_steps=steps).solve(operator, b).value
        r = b - operator.product(x) if steps < 25 else b
        least = least.minimum((r * operator.product(r)).sum(1) / r.square().sum(1))
    met = MINRES(rtol=0.0, max_steps=25).solve(operator, b).report.curvature
    torch.testing.assert_close(met, least, rtol=1e-6, atol=0)
