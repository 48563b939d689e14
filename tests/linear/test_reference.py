"""The kept Hessian as L-BFGS's model and as a preconditioner of adjoint systems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.linear import MINRES, Diagonal, LinearOperator, ReferenceHessian

DIM, BATCH = 40, 3


def stiff(theta: Tensor, constraint: bool = True) -> tuple[ti.Minimum, Tensor]:
    """Convex energies of condition 1e4, on a plane, not far from quadratic."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(BATCH, DIM, DIM, generator=generator, dtype=torch.float64)).Q
    hessian = turns @ torch.diag(torch.logspace(-2, 2, DIM, dtype=torch.float64)) @ turns.mT
    slope = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
    weight = torch.rand(DIM, generator=generator, dtype=torch.float64) + 0.5

    def energy(z: Tensor, theta: Tensor) -> Tensor:
        quadratic = 0.5 * torch.einsum("bi,bij,bj->b", z, hessian, z)
        return quadratic - (z * slope).sum(dim=1) + theta * torch.sqrt(1 + z.square()).sum(dim=1)

    set_ = ti.LinearEquality(weight, 1.0) if constraint else None
    return ti.Minimum(energy, constraint=set_), torch.zeros(BATCH, DIM, dtype=torch.float64)


@pytest.mark.parametrize("constraint", [False, True])
def test_fewer_steps(constraint: bool) -> None:
    theta = torch.tensor(0.1, dtype=torch.float64)
    problem, z0 = stiff(theta, constraint)
    plain = ti.solve(problem, z0, theta, solver=ti.LBFGS(rtol=1e-11, max_steps=2000))
    reference = ReferenceHessian().init()
    solver = ti.LBFGS(rtol=1e-9, preconditioner=reference)
    first = ti.solve(problem, z0, theta, solver=solver)
    torch.testing.assert_close(first.value, plain.value, rtol=1e-5, atol=1e-6)
    assert int(first.steps.max()) * 4 < int(plain.steps.max())
    assert first.evaluations > DIM  # making it is counted
    again = ti.solve(problem, z0, theta * 1.1, solver=solver)  # another energy, the same reference
    assert bool(again.converged.all())
    assert again.evaluations < DIM
    if constraint:
        weight = problem.constraint.weight  # type: ignore[union-attr]
        torch.testing.assert_close(again.value @ weight, torch.ones(BATCH, dtype=torch.float64))


def test_made_anew_where_it_is_stale() -> None:
    theta = torch.tensor(0.1, dtype=torch.float64)
    problem, z0 = stiff(theta)
    reference = ReferenceHessian(refresh_after=8).init()
    other = ti.Minimum(lambda z: 0.5 * (torch.arange(1, DIM + 1) * z.square()).sum(dim=1))
    ti.solve(other, z0 + 1, solver=ti.LBFGS(preconditioner=reference))
    stale = ti.solve(problem, z0, theta, solver=ti.LBFGS(rtol=1e-9, preconditioner=reference))
    assert bool(stale.converged.all())
    assert int(stale.steps.max()) < 40
    fresh = ti.solve(problem, z0, theta, solver=ti.LBFGS(rtol=1e-9, preconditioner=reference))
    assert int(fresh.steps.max()) < int(stale.steps.max())
    reference.refresh()
    assert ti.solve(problem, z0, theta, solver=ti.LBFGS(rtol=1e-9, preconditioner=reference)).evaluations > DIM


def test_adjoint_with_the_same_reference() -> None:
    theta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    problem, z0 = stiff(theta)
    reference = ReferenceHessian().init()
    solver = ti.LBFGS(rtol=1e-9, preconditioner=reference)
    gradients, products = [], []
    for linear_solver in (ti.MINRES(rtol=1e-10), ti.MINRES(rtol=1e-10, preconditioner=reference)):
        solution = ti.solve(problem, z0, theta, solver=solver, gradient=ti.Implicit(linear_solver=linear_solver))
        (gradient,) = torch.autograd.grad(solution.value.square().sum(), theta)
        gradients.append(gradient)
        assert solution.adjoint is not None
        products.append(solution.adjoint.evaluations)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=0)
    assert products[1] * 3 < products[0]


@pytest.mark.parametrize("linear_solver", [ti.MINRES, ti.CG])
def test_a_slow_adjoint_has_the_reference_made_anew(linear_solver: type[ti.MINRES] | type[ti.CG]) -> None:
    theta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    problem, z0 = stiff(theta)
    reference = ReferenceHessian(refresh_after=10).init()
    reference.keep(torch.diag(torch.arange(1.0, DIM + 1).double()).expand(BATCH, -1, -1))  # of some other problem
    gradient = ti.Implicit(linear_solver=linear_solver(rtol=1e-10, preconditioner=reference))
    steps, gradients = [], []
    for _ in range(2):
        solution = ti.solve(problem, z0, theta, solver=ti.LBFGS(rtol=1e-9, max_steps=2000), gradient=gradient)
        gradients.append(torch.autograd.grad(solution.value.square().sum(), theta)[0])
        assert solution.adjoint is not None
        assert bool(solution.adjoint.converged.all())
        steps.append(int(solution.adjoint.steps.max()))
    assert steps[0] > 10 >= 2 * steps[1]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=0)


def test_indefinite_reference_is_made_definite() -> None:
    reference = ReferenceHessian().init()
    well = ti.Minimum(lambda z: (z.square() - 1).square().sum(dim=1))  # at 0 a maximum
    z0 = torch.full((2, 4), 0.1, dtype=torch.float64)
    solution = ti.solve(well, z0, solver=ti.LBFGS(preconditioner=reference))
    torch.testing.assert_close(solution.value, torch.ones_like(z0), rtol=1e-6, atol=0)


def test_rowwise_and_other_preconditioners() -> None:
    theta = torch.tensor(0.1, dtype=torch.float64)
    scale = torch.logspace(0, 4, DIM, dtype=torch.float64)

    def energy(z: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (scale * (z - target).square()).sum(dim=1) + theta * torch.cosh(z - target).sum(dim=1)

    target = torch.arange(BATCH, dtype=torch.float64)[:, None] * torch.ones(BATCH, DIM, dtype=torch.float64)
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    for preconditioner in (ReferenceHessian(), Diagonal(scale), lambda v: v / scale):
        problem = ti.Minimum(energy, rowwise=True)
        solution = ti.solve(problem, z0, target, solver=ti.LBFGS(preconditioner=preconditioner))
        torch.testing.assert_close(solution.value, target, rtol=1e-6, atol=1e-8)
        assert int(solution.steps.max()) <= 12


def test_a_solve_does_not_depend_on_those_before_it() -> None:
    solver = ti.LBFGS(preconditioner=ReferenceHessian())
    assert solver == ti.LBFGS(preconditioner=ReferenceHessian())
    b = torch.linspace(-1, 1, 2 * DIM, dtype=torch.float64).reshape(2, DIM)

    def solved(scale: float) -> ti.Solution:
        stiffness = scale * torch.linspace(1, 100, DIM, dtype=torch.float64)
        problem = ti.Minimum(lambda z, b: (0.5 * stiffness * z.square() + 0.01 * z.pow(4) - z * b).sum(dim=1))
        return ti.solve(problem, torch.zeros_like(b), b, solver=solver)

    fresh = solved(1e-3)
    solved(1.0)
    again = solved(1e-3)
    assert again.evaluations == fresh.evaluations
    torch.testing.assert_close(again.value, fresh.value, rtol=0, atol=0)


def test_a_linear_solver_with_a_memory_makes_its_preconditioner_once() -> None:
    theta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    problem, z0 = stiff(theta)
    solution = ti.solve(problem, z0, theta, solver=ti.LBFGS(rtol=1e-11, max_steps=2000))
    at = ti.derivatives.Derivatives(solution, linear_solver=ti.MINRES(preconditioner=ReferenceHessian()))
    costs = []
    for _ in range(2):
        at.tangent((torch.ones_like(theta),))
        assert at.report is not None
        costs.append(at.report.evaluations)
    assert costs[0] >= DIM > costs[1]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="refresh_after"):
        ReferenceHessian(refresh_after=0)
    with pytest.raises(ValueError, match="floor"):
        ReferenceHessian(floor=0.0)
    with pytest.raises(TypeError, match="preconditioner"):
        ti.LBFGS(preconditioner=3)  # type: ignore[arg-type]
    kink = ti.Minimum(lambda z: z.abs().pow(1.5).sum(dim=1))
    with pytest.raises(ValueError, match="not finite"):
        ti.solve(kink, torch.tensor([[0.0, 1.0]]), solver=ti.LBFGS(preconditioner=ReferenceHessian()))


def test_an_empty_batch_leaves_the_memory_as_it_is() -> None:
    operator = LinearOperator(
        product=lambda v: 2 * v, batch=0, dim=3, dtype=torch.float64, device=torch.device("cpu"), symmetric=True
    )
    memory = ReferenceHessian().init()
    assert MINRES(preconditioner=memory).solve(operator, torch.zeros(0, 3, dtype=torch.float64)).value.shape == (0, 3)
