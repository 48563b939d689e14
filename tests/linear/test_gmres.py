from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchimplicit.linear import GMRES, LinearSolver
from torchimplicit.solution import Status
from torchimplicit.testing.linear_suite import LinearSolverSuite, matrix_operator, residuals


class TestGMRES(LinearSolverSuite):
    def make(self, **options: Any) -> LinearSolver:
        return GMRES(**options)


class TestGMRESWithRestarts(LinearSolverSuite):
    """As many cycles as it takes: a system of spread 0.8 needs some eight."""

    cycle = 12

    def make(self, **options: Any) -> LinearSolver:
        return GMRES(**{"restart": 12, "max_steps": 400, **options})


def least_residual(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """The least ``||b - A y||`` for y in the Krylov space of ``steps`` dimensions, of one system."""
    basis = [b / b.norm()]
    for _ in range(steps - 1):
        v = a @ basis[-1]
        for _ in range(2):
            v = v - sum((v @ q) * q for q in basis)
        basis.append(v / v.norm())
    space = torch.stack(basis, 1)
    t = torch.linalg.lstsq(a @ space, b[:, None]).solution
    return torch.linalg.vector_norm(b - (a @ space @ t)[:, 0])


def gaussian(batch: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 14])
@pytest.mark.parametrize("kind", ["gaussian", "contraction", "skew", "indefinite"])
def test_residual_is_the_least_of_the_krylov_space(kind: str, steps: int) -> None:
    noise, eye = gaussian(3, 20), torch.eye(20, dtype=torch.float64)
    a = {
        "gaussian": noise,
        "contraction": eye - 0.9 * torch.linalg.qr(noise).Q,
        "skew": noise - noise.mT + 0.01 * eye,
        "indefinite": noise + noise.mT,
    }[kind]
    b = gaussian(3, 20, seed=1)[:, 0]
    solution = GMRES(rtol=0.0, max_steps=steps).solve(matrix_operator(a), b)
    expected = torch.stack([least_residual(a[i], b[i], steps) for i in range(3)])
    torch.testing.assert_close(residuals(a, b, solution.value), expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(solution.report.residual, expected / b.norm(dim=-1), rtol=1e-7, atol=1e-10)


def test_no_breakdown_on_a_skew_symmetric_system() -> None:
    """The residual does not fall in any odd step, and the search directions have to be taken from the images."""
    noise = gaussian(4, 16)
    a, b = noise - noise.mT, gaussian(4, 16, seed=1)[:, 0]
    report = GMRES(rtol=1e-9).solve(matrix_operator(a), b).report
    assert report.converged.all()
    assert report.steps.max() <= 16


def test_full_stagnation() -> None:
    """The cyclic shift: no progress until the last of ``dim`` steps, and never with a shorter restart."""
    shift = torch.eye(8, dtype=torch.float64).roll(1, 0)[None]
    b = torch.eye(8, dtype=torch.float64)[:1]
    whole = GMRES(rtol=1e-12).solve(matrix_operator(shift), b)
    assert whole.report.converged.all()
    assert whole.report.steps.item() == 8
    short = GMRES(rtol=1e-12, restart=5).solve(matrix_operator(shift), b)
    assert short.report.status.item() == Status.BREAKDOWN
    assert short.report.residual.item() == pytest.approx(1.0)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_it_reports_is_true(condition: float, dtype: torch.dtype) -> None:
    u, v = torch.linalg.qr(gaussian(4, 40)).Q, torch.linalg.qr(gaussian(4, 40, seed=2)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 40, dtype=torch.float64)
    a, b = ((u * values) @ v).to(dtype), gaussian(4, 40, seed=1)[:, 0].to(dtype)
    report = (solution := GMRES(max_steps=400).solve(matrix_operator(a), b)).report
    true = (residuals(a, b, solution.value) / b.double().norm(dim=-1)).to(dtype)
    tolerance = torch.finfo(dtype).eps ** (2 / 3)
    rounding = torch.finfo(dtype).eps * (solution.value.norm(dim=-1) / b.norm(dim=-1)).max().item()
    assert (true[report.converged] <= 1.25 * tolerance + 4 * rounding).all()
    torch.testing.assert_close(report.residual, true, rtol=0.05, atol=0.25 * tolerance + 4 * rounding)
    if dtype == torch.float64:
        assert report.converged.all()


def test_singular_but_consistent() -> None:
    """The range is orthogonal to the kernel, which need not be known."""
    basis = torch.linalg.qr(gaussian(3, 12)).Q[:, :, :9]
    a = basis @ (torch.eye(9, dtype=torch.float64) - 0.5 * torch.linalg.qr(gaussian(3, 9)).Q) @ basis.mT
    b = (a @ gaussian(3, 12, seed=1)[:, :, :1]).squeeze(-1)
    solution = GMRES(rtol=1e-10).solve(matrix_operator(a), b)
    assert solution.report.converged.all()
    assert (residuals(a, b, solution.value) <= 1e-10 * b.norm(dim=-1)).all()


def test_singular_and_inconsistent_ends_at_once() -> None:
    a, b = 0.1 * gaussian(2, 12) + torch.eye(12, dtype=torch.float64), gaussian(2, 12, seed=1)[:, 0]
    a[:, :, 0] = 0
    solution = GMRES(rtol=1e-10, max_steps=1000).solve(matrix_operator(a), b)
    assert solution.report.status.eq(Status.BREAKDOWN).all()
    assert (solution.report.steps <= 30).all()
    # not the least residual: rounding grows from image to image, and the last one is taken for more than that
    assert (residuals(a, b, solution.value) <= torch.linalg.vector_norm(b, dim=1)).all()


def test_a_few_steps_cost_no_more() -> None:
    """With no tolerance to meet, the residual is known well enough without a product that confirms it."""
    a, b, tally = gaussian(3, 20) + 4 * torch.eye(20, dtype=torch.float64), gaussian(3, 20, seed=1)[:, 0], [0]
    report = GMRES(rtol=0.0, max_steps=4).solve(matrix_operator(a, tally), b).report
    assert tally[0] == 12
    assert report.status.eq(Status.MAX_STEPS).all()


def test_memory_is_made_as_it_is_needed() -> None:
    a, b = torch.eye(50).expand(2, 50, 50) * 2.0, torch.ones(2, 50)
    assert GMRES(restart=10**9, max_steps=10**9).solve(matrix_operator(a), b).report.converged.all()


def test_restart_is_validated() -> None:
    with pytest.raises(ValueError, match="restart"):
        GMRES(restart=0)
