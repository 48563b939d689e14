"""Damping of the adjoint of minima: its sign, its limit, and its kin, equilibrium propagation with a curved nudge."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.linear import LinearOperator
from torchimplicit.testing import GradientSuite
from torchimplicit.testing.gradient_suite import relative_error

DIM, BATCH = 6, 3
SOLVER = ti.LBFGS(rtol=0.0, atol=1e-11)


class TestDampedImplicit(GradientSuite):
    kinds = ("minimum",)
    second_order = False

    def make(self) -> ti.DampedImplicit:
        return ti.DampedImplicit()


class Quadratic:
    """Energies with Hessians of given eigenvalues, stationary at a known point even where that is no minimum."""

    def __init__(self, least: float, constrained: bool = False):
        generator = torch.Generator().manual_seed(0)
        turns = torch.linalg.qr(torch.randn(BATCH, DIM, DIM, generator=generator, dtype=torch.float64)).Q
        values = torch.tensor([least, 1.0, 2.0, 3.0, 5.0, 8.0], dtype=torch.float64)
        self.hessian = turns @ torch.diag(values) @ turns.mT
        self.theta = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64).requires_grad_()
        self.weight = torch.linspace(0.5, 1.5, DIM, dtype=torch.float64)
        self.constraint = ti.LinearEquality(self.weight, 0.0) if constrained else None
        self.u = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)

    def energy(self, z: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * torch.einsum("bi,bij,bj->b", z, self.hessian, z) - (z * theta).sum(dim=1)

    def gradient(self, estimator: Any) -> tuple[Tensor, ti.Solution]:
        """In theta, from a start that is stationary already."""
        basis = torch.eye(DIM, dtype=torch.float64)
        if self.constraint is not None:
            basis = torch.linalg.svd(self.weight[None], full_matrices=True).Vh[1:].T
        reduced = basis.T @ self.hessian @ basis
        start = (basis @ torch.linalg.solve(reduced, (self.theta.detach() @ basis)[:, :, None]))[:, :, 0]
        problem = ti.Minimum(self.energy, self.constraint)
        solver = ti.LBFGS(rtol=0.0, atol=1e-9)
        solution = ti.solve(problem, start, self.theta, solver=solver, gradient=estimator)
        (found,) = torch.autograd.grad((solution.value * self.u).sum(), self.theta)
        return found, solution

    def damped(self, damping: float) -> Tensor:
        matrix = self.hessian + damping * torch.eye(DIM, dtype=torch.float64)
        basis = torch.eye(DIM, dtype=torch.float64)
        if self.constraint is not None:
            basis = torch.linalg.svd(self.weight[None], full_matrices=True).Vh[1:].T
        reduced = basis.T @ matrix @ basis
        return (basis @ torch.linalg.solve(reduced, (self.u @ basis)[:, :, None]))[:, :, 0]


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("linear_solver", [None, ti.MINRES(rtol=1e-11), ti.CG(rtol=1e-11)])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_against_the_dense_system(constrained: bool, linear_solver: Any, damping: float) -> None:
    case = Quadratic(0.5, constrained)
    found, solution = case.gradient(ti.DampedImplicit(damping=damping, linear_solver=linear_solver))
    assert relative_error(found, case.damped(damping)) < 1e-8
    assert solution.adjoint is not None
    assert bool(solution.adjoint.converged.all())


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("block", [False, True])
def test_dense_finds_a_saddle_that_the_solution_does_not_feel(constrained: bool, block: bool) -> None:
    """The right-hand side has no part along the direction of negative curvature, so that y.Hy > 0."""
    eigenvalues = torch.tensor([[-0.3, 1.0, 2.0, 3.0, 4.0], [0.3, 1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    matrix = basis @ torch.diag_embed(eigenvalues) @ basis.T
    weight = basis[:, 1]
    problem = ti.Minimum(
        lambda z, a: 0.5 * torch.einsum("bi,bij,bj->b", z, matrix, z) - (z * a).sum(dim=1),
        constraint=ti.LinearEquality(weight, torch.tensor(1.0).double()) if constrained else None,
    )
    # the stationary point itself, for no method of minimization goes to a saddle
    start = basis[:, 1].repeat(2, 1) if constrained else torch.zeros(2, 5, dtype=torch.float64)
    a = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    solver = ti.LBFGS(rtol=1e-10)
    cotangents = (basis[:, 2], basis[:, 3]) if block else (basis[:, 2],)
    _, pull = torch.func.vjp(lambda a: ti.solve(problem, start, a, solver=solver).value, a)
    with pytest.warns(ti.ConvergenceWarning, match="1 of 2 samples are not at a minimum.* of at most -0.3 there"):
        torch.func.vmap(pull)(torch.stack(cotangents)[:, None].expand(-1, 2, -1))
    if block:
        return
    solution = ti.solve(problem, start, a, solver=solver)
    with pytest.warns(ti.ConvergenceWarning):
        solution.value.backward(basis[:, 2].expand(2, -1))
    assert solution.adjoint is not None
    assert solution.adjoint.status.tolist() == [ti.Status.SADDLE, ti.Status.CONVERGED]
    assert solution.adjoint.curvature is not None
    torch.testing.assert_close(solution.adjoint.curvature[0], eigenvalues[0, 0])
    assert bool(solution.adjoint.curvature[1].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flat_direction_is_no_saddle(dtype: torch.dtype) -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    matrix = (basis[:, 1:] @ torch.diag(torch.arange(1.0, 6.0).double()) @ basis[:, 1:].T).to(dtype)
    operator = LinearOperator(
        product=lambda v: v @ matrix, batch=1, dim=6, dtype=dtype, device=torch.device("cpu"), symmetric=True
    )
    found = ti.Dense().solve(operator, (matrix @ torch.ones(6, dtype=dtype))[None])
    assert found.report.curvature is not None
    assert bool(found.report.curvature.isnan().all())


def test_exact_where_it_need_not_damp() -> None:
    case = Quadratic(0.5)
    assert relative_error(case.gradient(ti.DampedImplicit())[0], case.gradient(ti.Implicit())[0]) < 1e-10


@pytest.mark.parametrize("linear_solver", [ti.Dense(), ti.MINRES(rtol=1e-10)])
def test_a_saddle_is_named_and_damped(linear_solver: Any) -> None:
    case = Quadratic(-0.01)
    with pytest.warns(
        ti.ConvergenceWarning, match="not at a minimum: the Hessian has a negative eigenvalue of at most -0.0"
    ):
        wrong, solution = case.gradient(ti.Implicit(linear_solver=linear_solver))
    assert solution.adjoint is not None
    assert bool((solution.adjoint.status == ti.Status.SADDLE).all())
    assert solution.adjoint.curvature is not None
    assert bool((solution.adjoint.curvature >= -0.01 * (1 + 1e-9)).all())  # no less than the least eigenvalue
    assert bool((solution.adjoint.curvature < 0).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right, solution = case.gradient(ti.DampedImplicit(margin=0.01, linear_solver=linear_solver))
    assert solution.adjoint is not None
    assert bool(solution.adjoint.converged.all())
    assert float((right * case.u).sum()) > 0 > float((wrong * case.u).sum())
    assert float(right.norm()) < float(wrong.norm())


def test_bounded_as_the_least_eigenvalue_vanishes() -> None:
    sizes = [float(Quadratic(least).gradient(ti.DampedImplicit(damping=0.1))[0].norm()) for least in (1e-1, 1e-2, 1e-4)]
    exact = [float(Quadratic(least).gradient(ti.Implicit())[0].norm()) for least in (1e-1, 1e-2, 1e-4)]
    assert max(sizes) < 3 * min(sizes)
    assert exact[2] > 100 * exact[0]


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("least", [0.5, 1e-3, -0.05])
def test_one_sided_curved_propagation_is_damped_differentiation(constrained: bool, least: float) -> None:
    """For a quadratic energy the two are one: (PHP + beta I) y = Pu, beta being the nudge over the norm of u."""
    case = Quadratic(least, constrained)
    case.u = case.u / case.u.norm(dim=1, keepdim=True)
    propagation = ti.EquilibriumPropagation(nudge=0.2, symmetric=False, curved=True, solver=ti.LBFGS())
    assert relative_error(case.gradient(propagation)[0], case.damped(0.2)) < 1e-5


def test_a_nudge_of_its_own_choice() -> None:
    """Symmetric, from the least eigenvalue: near the exact gradient whether the Hessian is stiff or soft."""
    for scale in (1.0, 1e-2, 1e2):

        def energy(z: Tensor, theta: Tensor, scale: float = scale) -> Tensor:
            quartic = 0.25 * z.pow(4) + 0.5 * z.square() * (1 + 0.5 * torch.arange(DIM).double())
            return scale * (quartic - z * theta).sum(dim=1)

        theta = torch.linspace(-1, 1, BATCH * DIM, dtype=torch.float64).reshape(BATCH, DIM).requires_grad_()
        gradients = []
        for estimator in (ti.Implicit(), ti.EquilibriumPropagation(nudge=None)):
            solver = ti.LBFGS(rtol=0.0, atol=1e-11 * scale)
            start = torch.zeros(BATCH, DIM, dtype=torch.float64)
            value = ti.solve(ti.Minimum(energy), start, theta, solver=solver, gradient=estimator).value
            gradients.append(torch.autograd.grad(value.square().sum(), theta)[0])
        assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="damping"):
        ti.DampedImplicit(damping=-1.0)
    with pytest.raises(ValueError, match="margin"):
        ti.DampedImplicit(margin=0.0)
    with pytest.raises(ValueError, match="Minimum"):
        ti.solve(ti.FixedPoint(lambda z: 0.5 * z), torch.ones(1, 1), gradient=ti.DampedImplicit())
    with pytest.raises(ValueError, match="reach"):
        ti.EquilibriumPropagation(nudge=None, reach=0.0)


SADDLES = {
    "no curvature along the right-hand side": ([[2.0, 0.0], [0.0, -2.0]], [1.0, 1.0]),
    "none along an axis": ([[0.0, 1.0], [1.0, 0.0]], [1.0, 0.0]),
    "of three": ([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -1.5]], [1.0, 1.0, 2.0**0.5]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "linear_solver", [ti.MINRES(), ti.GMRES(), ti.LSMR(), ti.Dense()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("which", SADDLES)
def test_a_saddle_is_named_where_the_solution_has_no_curvature(which: str, linear_solver: Any, dtype: Any) -> None:
    matrix, cotangent = (torch.tensor(rows, dtype=dtype) for rows in SADDLES[which])
    x = torch.zeros(1, len(cotangent), dtype=dtype, requires_grad=True)
    problem = ti.Minimum(lambda z, x: 0.5 * ((z @ matrix) * z).sum(1) - (z * x).sum(1))
    gradient = ti.Implicit(linear_solver=linear_solver)
    solution = ti.solve(problem, torch.zeros_like(x), x, solver=ti.LBFGS(steps=0), gradient=gradient)
    with pytest.warns(ti.ConvergenceWarning, match="not at a minimum"):
        solution.value.backward(cotangent[None])
    assert solution.adjoint is not None
    assert solution.adjoint.status.tolist() == [ti.Status.SADDLE]
    assert solution.adjoint.curvature is not None
    assert float(torch.linalg.eigvalsh(matrix)[0]) * (1 + 1e-5) <= float(solution.adjoint.curvature[0]) < 0
    torch.testing.assert_close(x.grad, torch.linalg.solve(matrix, cotangent)[None])


def test_conjugate_gradients_name_a_saddle() -> None:
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    problem = ti.Minimum(lambda z, x: 0.5 * (matrix * z * z).sum(1) - (z * x).sum(1))
    gradient = ti.Implicit(linear_solver=ti.CG())
    for cotangent in ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0]):  # at once; after a step
        solution = ti.solve(problem, torch.zeros_like(x), x, solver=ti.LBFGS(steps=0), gradient=gradient)
        with pytest.warns(ti.ConvergenceWarning, match="not at a minimum"):
            solution.value.backward(torch.tensor([cotangent], dtype=torch.float64))
        assert solution.adjoint is not None
        assert solution.adjoint.curvature is not None
        assert -1 - 1e-9 <= float(solution.adjoint.curvature[0]) < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "linear_solver", [ti.MINRES(), ti.CG(), ti.GMRES(), ti.LSMR(), ti.Dense()], ids=lambda s: type(s).__name__
)
def test_singular_and_ill_conditioned_hessians_are_no_saddles(linear_solver: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(36):
        dim, spread = 2 + number % 12, number % 7
        basis = torch.linalg.qr(torch.randn(4, dim, dim, generator=generator, dtype=torch.float64)).Q
        values = 10 ** (torch.rand(4, dim, generator=generator, dtype=torch.float64) * spread)
        if number % 3 == 0:
            values[:, : 1 + dim // 3] = 0
        matrix = ((basis * values[:, None]) @ basis.mT).to(dtype)
        matrix = 0.5 * (matrix + matrix.mT)
        b = torch.randn(4, dim, generator=generator, dtype=torch.float64).to(dtype)
        if number % 2:
            b = (matrix @ b[:, :, None])[:, :, 0]
        x = torch.zeros(4, dim, dtype=dtype, requires_grad=True)
        problem = ti.Minimum(
            lambda z, x, matrix=matrix: 0.5 * ((z[:, None] @ matrix)[:, 0] * z).sum(1) - (z * x).sum(1)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gradient = ti.Implicit(linear_solver=linear_solver)
            solution = ti.solve(problem, torch.zeros_like(x), x, solver=ti.LBFGS(steps=0), gradient=gradient)
            solution.value.backward(b)
        assert solution.adjoint is not None
        assert not bool((solution.adjoint.status == ti.Status.SADDLE).any()), number


def test_a_coupled_minimum_is_no_saddle() -> None:
    # the Hessian of the batch is definite, though a row's part of y.Hy is negative
    couples = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    matrix = (couples * torch.tensor([1.0, 3.0, 10.0, 100.0])) @ couples.T
    x = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    problem = ti.Minimum(lambda z, x: 0.5 * (z * (matrix @ z)).sum(1) - (z * x).sum(1))
    cotangent = matrix @ couples @ torch.tensor([[1.0], [-1.0], [0.3], [-0.1]], dtype=torch.float64)
    for linear_solver in (ti.GMRES(), ti.MINRES(), ti.Dense()):
        gradient = ti.Implicit(linear_solver=linear_solver)
        x.grad = None
        solution = ti.solve(problem, torch.zeros_like(x), x, solver=ti.LBFGS(), gradient=gradient)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solution.value.backward(cotangent)
        assert solution.adjoint is not None
        assert bool(solution.adjoint.converged.all()), (linear_solver, solution.adjoint)
        torch.testing.assert_close(x.grad, torch.linalg.solve(matrix, cotangent), rtol=1e-7, atol=1e-9)
