"""The extreme eigenvalues of constrained and free Hessians."""

from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit.diagnostics import curvature
from torchimplicit.linear import ReferenceHessian


def spectra(dim: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.linspace(-0.5, 3.0, dim, dtype=torch.float64) + torch.arange(batch, dtype=torch.float64)[:, None]
    turns = torch.linalg.qr(torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64)).Q
    return turns @ torch.diag_embed(values) @ turns.mT, torch.rand(dim, generator=generator, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 30, 60])
def test_extremes(dim: int, constrained: bool) -> None:
    if constrained and dim == 1:
        pytest.skip("nothing is left on a point")
    hessian, weight = spectra(dim)

    def energy(z: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.einsum("bi,bij,bj->b", z, hessian, z) + 0.05 * z.pow(4).sum(dim=1)

    z = 0.1 * torch.ones(2, dim, dtype=torch.float64)
    problem = ti.Minimum(energy, constraint=ti.LinearEquality(weight, 1.0) if constrained else None)
    matrix = hessian + torch.diag_embed(0.6 * z.square())
    if constrained:
        basis = torch.linalg.svd(weight[None], full_matrices=True).Vh[1:].T
        matrix = basis.T @ matrix @ basis
    values = torch.linalg.eigvalsh(matrix)
    found = curvature(problem, z, subspace=40)  # dense up to 40
    torch.testing.assert_close(found.least, values[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.largest, values[:, -1], rtol=1e-3, atol=1e-3)
    assert bool(torch.isinf(found.condition[0])) == bool(values[0, 0] <= 0)


def test_lanczos_on_an_exhausted_space() -> None:
    """Two distinct eigenvalues: the Krylov space ends after two steps."""
    scale = torch.where(torch.arange(50) < 20, 2.0, 5.0).double()
    problem = ti.Minimum(lambda z: 0.5 * (scale * z.square()).sum(dim=1))
    found = curvature(problem, torch.ones(3, 50, dtype=torch.float64), subspace=10)
    torch.testing.assert_close(found.least, torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(found.largest, torch.full((3,), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("distinct", [3, 35, 100])
def test_lanczos_stays_on_the_constraint(distinct: int) -> None:
    """Where the Krylov space ends early, rounding must not bring in the null vector, with its eigenvalue zero."""
    dim = 100
    scale = torch.linspace(1.0, 50.0, distinct, dtype=torch.float64).repeat(dim)[:dim]
    weight = torch.linspace(0.1, 3.0, dim, dtype=torch.float64)
    problem = ti.Minimum(lambda z: 0.5 * (scale * z.square()).sum(dim=1), ti.LinearEquality(weight, 1.0))
    found = curvature(problem, torch.ones(1, dim, dtype=torch.float64), subspace=90)
    basis = torch.linalg.svd(weight[None], full_matrices=True).Vh[1:].T
    values = torch.linalg.eigvalsh(basis.T @ (scale[:, None] * basis))
    assert float(found.least) == pytest.approx(float(values[0]), rel=1e-3)
    assert float(found.largest) == pytest.approx(float(values[-1]), rel=1e-3)


def test_one_system_and_other_problems() -> None:
    problem = ti.Minimum(lambda z: z.square().sum(), batched=False)
    found = curvature(problem, torch.ones(3))
    assert found.least.ndim == 0
    assert float(found.least) == pytest.approx(2.0)
    with pytest.raises(TypeError, match="Minimum"):
        curvature(ti.FixedPoint(lambda z: z), torch.ones(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [False, True])
def test_with_a_preconditioner(function: bool) -> None:
    """As a solver has it, or as a function."""
    scale = torch.logspace(-1, 2, 60, dtype=torch.float64)
    weight = torch.linspace(0.5, 1.5, 60, dtype=torch.float64)

    def energy(z: torch.Tensor) -> torch.Tensor:
        return (0.5 * scale * z.square() + z.pow(4)).sum(dim=1)

    problem = ti.Minimum(energy, ti.LinearEquality(weight, 1.0))
    solver = ti.LBFGS(preconditioner=lambda v: v / scale) if function else ti.LBFGS(preconditioner=ReferenceHessian())
    z = ti.solve(problem, torch.ones(1, 60, dtype=torch.float64) / 60, solver=solver).value
    exact = curvature(problem, z)
    found = curvature(problem, z, preconditioner=solver.preconditioner)
    torch.testing.assert_close(found.least, exact.least, rtol=1e-2, atol=0.0)
    torch.testing.assert_close(found.largest, exact.largest, rtol=0.1, atol=0.0)
