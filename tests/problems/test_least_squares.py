"""Least squares: the solution against closed forms, and its derivatives, exact and Gauss-Newton's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, vmap

import torchimplicit as ti
from torchimplicit.gradients import Gradient
from torchimplicit.testing import GradientSuite
from torchimplicit.testing.gradient_suite import Kind, SuiteCase, contraction

F64 = torch.float64
TIMES = torch.linspace(0, 2, 12, dtype=F64)


def decay(z: Tensor, observed: Tensor) -> Tensor:
    """Residuals of ``z[0] exp(-z[1] t)``; ``observed``: ``[..., 12]``."""
    return z[..., :1] * torch.exp(-z[..., 1:] * TIMES.to(z)) - observed


def observations(batch: int, noise: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size, rate = (1 + torch.rand(batch, 1, dtype=F64, generator=generator) for _ in range(2))
    return size * torch.exp(-rate * TIMES) + noise * torch.randn(batch, 12, dtype=F64, generator=generator)


class OfLeastSquares(GradientSuite):
    """The suite on a sum of squares; ``"minimum"`` is the only kind."""

    kinds = ("minimum",)
    rest: float

    def of_kind(self, kind: Kind) -> SuiteCase:
        case = super().of_kind("root")

        def residual(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
            return torch.cat((z - contraction(z, x, w), self.rest * (torch.sin(z) + x.square() - 1)), dim=-1)

        solver = ti.LevenbergMarquardt(rtol=0.0, atol=1e-13)
        return SuiteCase(ti.LeastSquares, residual, solver, case.z0, case.x, case.w)


class TestImplicit(OfLeastSquares):
    rest = 0.5

    def make(self) -> Gradient:
        return ti.Implicit()


class TestGaussNewtonWithoutResidual(OfLeastSquares):
    rest = 0.0
    second_order = False

    def make(self) -> Gradient:
        return ti.GaussNewton()


class TestGaussNewtonByProducts(OfLeastSquares):
    rest = 0.0
    second_order = False

    def make(self) -> Gradient:
        return ti.GaussNewton(linear_solver=ti.LSMR(rtol=1e-13))


def fitted(observed: Tensor, **options) -> Tensor:
    problem = ti.LeastSquares(decay, **options)
    return ti.solve(problem, torch.ones(*observed.shape[:-1], 2, dtype=F64), observed).value


@pytest.mark.parametrize("rowwise", [False, True])
def test_a_fit_and_its_derivatives(rowwise):
    observed = observations(3).requires_grad_()
    value = fitted(observed, rowwise=rowwise)
    slope = torch.func.jacrev(lambda z: decay(z, observed).square().sum())(value.detach())
    assert slope.abs().max() < 1e-8
    assert gradcheck(lambda y: fitted(y, rowwise=rowwise), observed, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(lambda y: fitted(y, rowwise=rowwise), observed, fast_mode=True)


def test_linear_residuals_have_the_solution_of_linear_solve():
    generator = torch.Generator().manual_seed(1)
    design = torch.randn(8, 3, dtype=F64, generator=generator).requires_grad_()
    observed = torch.randn(2, 8, dtype=F64, generator=generator)
    problem = ti.LeastSquares(lambda z: z @ design.T - observed)
    expected = ti.linear_solve(design, observed).value
    (of_design,) = torch.autograd.grad(expected.sin().sum(), design)
    for gradient in (ti.Implicit(), ti.GaussNewton()):  # the residuals have no second derivatives in z
        found = ti.solve(problem, torch.zeros(2, 3, dtype=F64), gradient=gradient)
        torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=1e-9)
        (got,) = torch.autograd.grad(found.value.sin().sum(), design)
        torch.testing.assert_close(got, of_design, rtol=1e-8, atol=1e-8)


def test_gauss_newton_leaves_out_the_second_derivatives():
    observed = observations(2).requires_grad_()
    problem = ti.LeastSquares(decay)
    found = ti.solve(problem, torch.ones(2, 2, dtype=F64), observed, gradient=ti.GaussNewton())
    (got,) = torch.autograd.grad(found.value.sum(), observed)
    z = found.value.detach()
    jacobian = torch.stack([torch.func.jacrev(decay)(a, y) for a, y in zip(z, observed.detach(), strict=True)])
    g = torch.linalg.solve(jacobian.mT @ jacobian, torch.ones(2, 2, 1, dtype=F64))
    torch.testing.assert_close(got, (jacobian @ g)[:, :, 0], rtol=1e-8, atol=1e-8)
    exact = torch.autograd.grad(fitted(observed).sum(), observed)[0]
    assert 1e-3 < (got - exact).norm() / exact.norm() < 0.5


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.GaussNewton()])
def test_transforms(gradient):
    observed = observations(3, noise=0.0 if isinstance(gradient, ti.GaussNewton) else 0.1)

    def loss(y):
        problem = ti.LeastSquares(decay, batched=False)
        return ti.solve(problem, torch.ones(2, dtype=F64), y, gradient=gradient).value.square().sum()

    apart = torch.stack([grad(loss)(y) for y in observed])
    torch.testing.assert_close(vmap(grad(loss))(observed), apart, rtol=1e-8, atol=1e-8)
    if isinstance(gradient, ti.Implicit):
        one = observed[:1].requires_grad_()

        def plain(y):
            return fitted(y).square().sum()

        (first,) = torch.autograd.grad(plain(one), one, create_graph=True)
        rows = [torch.autograd.grad(first[0, i], one, retain_graph=True)[0][0] for i in range(12)]
        torch.testing.assert_close(hessian(loss)(observed[0].detach()), torch.stack(rows), rtol=1e-7, atol=1e-8)


def test_trees_and_captured_parameters():
    weight = torch.nn.Parameter(torch.tensor([2.0, 0.5], dtype=F64))
    target = observations(2)[:, :2]

    def residual(z):
        return {"fit": torch.tanh(z["a"]) * weight - 0.1 * target, "size": (0.3 * z["b"]).exp() - z["a"] ** 2}

    start = {"a": torch.zeros(2, 2, dtype=F64), "b": torch.ones(2, 2, dtype=F64)}
    found = ti.solve(ti.LeastSquares(residual), start)
    assert found.converged.all()
    (got,) = torch.autograd.grad(found.value["a"].sum(), weight)

    def solved(w):
        return torch.atanh(0.1 * target / w).sum()  # every residual vanishes

    torch.testing.assert_close(got, grad(solved)(weight.detach()), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "solver", [ti.LBFGS(), ti.NewtonKrylov(), ti.LevenbergMarquardt(linear_solver=ti.CG())], ids=repr
)
def test_every_solver_of_minima_serves(solver):
    observed = observations(3)
    found = ti.solve(ti.LeastSquares(decay), torch.ones(3, 2, dtype=F64), observed, solver=solver)
    torch.testing.assert_close(found.value, fitted(observed), rtol=1e-6, atol=1e-7)


def test_curvature_and_derivatives_know_it():
    observed = observations(2).requires_grad_()
    problem = ti.LeastSquares(decay)
    solution = ti.solve(problem, torch.ones(2, 2, dtype=F64), observed)
    found = ti.diagnostics.curvature(problem, solution.value.detach(), observed)
    assert (found.least > 0).all()
    (tangent,) = ti.derivatives.Derivatives(solution).along((torch.ones_like(observed),))
    moved = torch.func.jvp(fitted, (observed.detach(),), (torch.ones_like(observed),))[1]
    torch.testing.assert_close(tangent, moved, rtol=1e-8, atol=1e-8)


def test_equilibrium_propagation_takes_a_solver_of_minima():
    observed = observations(2).requires_grad_()
    start, problem = torch.ones(2, 2, dtype=F64), ti.LeastSquares(decay)
    with pytest.raises(ValueError, match="not a sum of squares"):
        ti.solve(problem, start, observed, gradient=ti.EquilibriumPropagation())
    nudged = ti.EquilibriumPropagation(solver=ti.LBFGS())
    got = ti.solve(problem, start, observed, gradient=nudged).value
    (got,) = torch.autograd.grad(got.sum(), observed)
    torch.testing.assert_close(got, torch.autograd.grad(fitted(observed).sum(), observed)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (lambda z: z.sum(), ValueError, "dim 0 must be the batch"),
        (lambda z: z.float(), ValueError, "keep the dtype"),
        (lambda z: 1.0, TypeError, "must return tensors"),
        (lambda z: {}, ValueError, "no tensors"),
        (3, TypeError, "must be callable"),
    ],
)
def test_bad_residuals_are_said_in_words(residual, error, message):
    with pytest.raises(error, match=message):
        ti.solve(ti.LeastSquares(residual), torch.ones(2, 2, dtype=F64))


def test_who_needs_residuals_says_so():
    energy = ti.Minimum(lambda z: z.square().sum(1))
    for options in ({"solver": ti.LevenbergMarquardt()}, {"gradient": ti.GaussNewton()}):
        with pytest.raises(ValueError, match="LeastSquares"):
            ti.solve(energy, torch.ones(2, 2, dtype=F64), **options)
