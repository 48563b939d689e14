"""Equilibrium propagation: orders of its error, and what it needs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from maps import data
from torch import Tensor

import torchimplicit as ti
from torchimplicit.testing import GradientSuite
from torchimplicit.testing.gradient_suite import convex_energy, relative_error

SOLVER = ti.LBFGS(rtol=0.0, atol=1e-10)
WEIGHT = torch.tensor([[1.0, 2.0, -0.5], [0.4, 1.0, 1.5]], dtype=torch.float64)
TOTAL = torch.tensor([1.0, 2.0], dtype=torch.float64)


class TestEquilibriumPropagation(GradientSuite):
    kinds = ("minimum",)
    bound = 1e-5
    second_order = False
    forward_mode = False

    def make(self) -> ti.EquilibriumPropagation:
        return ti.EquilibriumPropagation()


def head(value: Tensor) -> Tensor:
    """A loss with parameters of its own, nonlinear across the samples too."""
    return torch.logsumexp(value.sin() @ torch.tensor([1.0, -2.0, 0.5], dtype=value.dtype), 0) + value.square().mean()


def gradients(gradient: Any, constraint: str = "none") -> Tensor:
    """In w, x and, where there is one, the constraint's tensors; all in one vector."""
    x, w = data(batch=2, dim=3)
    more = {"none": (), "shared": (WEIGHT[0], TOTAL[0]), "per sample": (WEIGHT, TOTAL)}[constraint]
    leaves = [t.clone().requires_grad_() for t in (x, w, *more)]
    problem = ti.Minimum(convex_energy, ti.LinearEquality(*leaves[2:]) if more else None)
    value = ti.solve(problem, torch.zeros_like(x), *leaves[:2], solver=SOLVER, gradient=gradient).value
    return torch.cat([g.flatten() for g in torch.autograd.grad(head(value), leaves)])


@pytest.mark.parametrize("constraint", ["none", "shared", "per sample"])
@pytest.mark.parametrize(("symmetric", "order"), [(False, 1), (True, 2)])
def test_order_of_the_error_in_the_nudge(constraint, symmetric, order):
    exact = gradients(ti.Implicit(), constraint)
    nudges = [0.4, 0.1, 0.025]
    errors = [
        relative_error(gradients(ti.EquilibriumPropagation(nudge=n, symmetric=symmetric), constraint), exact)
        for n in nudges
    ]
    for i in (0, 1):
        slope = math.log(errors[i] / errors[i + 1]) / math.log(nudges[i] / nudges[i + 1])
        assert slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("constraint", ["none", "shared", "per sample"])
def test_close_to_the_exact_gradient_by_default(constraint):
    assert (
        relative_error(gradients(ti.EquilibriumPropagation(), constraint), gradients(ti.Implicit(), constraint)) < 1e-5
    )


def test_the_estimate_does_not_depend_on_the_scale_of_the_loss():
    x, w = data(batch=2, dim=3)
    w = w.requires_grad_()
    gradient = ti.EquilibriumPropagation(nudge=1e-2, solver=SOLVER)
    value = ti.solve(ti.Minimum(convex_energy), torch.zeros_like(x), x, w, solver=SOLVER, gradient=gradient).value
    (small,) = torch.autograd.grad(1e-6 * head(value), w, retain_graph=True)
    (large,) = torch.autograd.grad(1e6 * head(value), w)
    assert relative_error(1e12 * small, large) < 1e-6


def test_a_sample_without_a_cotangent_contributes_nothing():
    x, w = data(batch=2, dim=3)
    x = x.requires_grad_()
    gradient = ti.EquilibriumPropagation()
    value = ti.solve(ti.Minimum(convex_energy), torch.zeros_like(x), x, w, solver=SOLVER, gradient=gradient).value
    (got,) = torch.autograd.grad(value[0].sum(), x)
    assert got[1].eq(0).all()
    assert got[0].ne(0).any()


def test_exact_on_a_quadratic_energy():
    """There the symmetric difference has no error: it is implicit differentiation with the Hessian's inverse."""
    x, w = data(batch=2, dim=3)

    def energy(z, w):
        return 0.5 * (z.square().sum(1) + (z @ w.T).square().sum(1)) - (z * x).sum(1)

    def of(gradient):
        leaf = w.clone().requires_grad_()
        value = ti.solve(ti.Minimum(energy), torch.zeros_like(x), leaf, solver=SOLVER, gradient=gradient).value
        return torch.autograd.grad(head(value), leaf)[0]

    assert relative_error(of(ti.EquilibriumPropagation(nudge=0.1)), of(ti.Implicit())) < 1e-7


def test_one_sided_equals_damped_implicit_differentiation_on_a_quadratic_energy():
    """With E = <z, A z>/2 - <b, z>, moving b: the nudged minimum is p - beta A^-1 u, and the estimate in b exact."""
    x, _ = data(batch=2, dim=3)
    b = x.clone().requires_grad_()
    a = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=x.dtype))

    def energy(z, b):
        return (0.5 * (z @ a) * z - b * z).sum(1)

    gradient = ti.EquilibriumPropagation(nudge=0.5, symmetric=False)
    value = ti.solve(ti.Minimum(energy), torch.zeros_like(x), b, solver=SOLVER, gradient=gradient).value
    (got,) = torch.autograd.grad(value.sum(), b)
    assert relative_error(got, torch.linalg.solve(a, torch.ones_like(b).T).T) < 1e-7


def test_the_nudged_solves_are_reported():
    x, w = data(batch=2, dim=3)
    gradient = ti.EquilibriumPropagation()
    solution = ti.solve(ti.Minimum(convex_energy), torch.zeros_like(x), x, w.requires_grad_(), gradient=gradient)
    assert solution.adjoint is None
    solution.value.sum().backward()
    assert solution.adjoint.status.shape == (2,)
    assert (solution.adjoint.steps > 0).all()


def test_needs_an_energy():
    x, _ = data()
    for problem in (ti.FixedPoint(lambda z, x: 0.5 * z + x), ti.Root(lambda z, x: z - x)):
        with pytest.raises(ValueError, match="Minimum"):
            ti.solve(problem, torch.zeros_like(x), x, gradient=ti.EquilibriumPropagation())


@pytest.mark.parametrize("constraint", ["none", "per sample"])
def test_its_inner_tolerance_is_its_own(constraint):
    """A forward solve that stops early is differentiated where it stopped: the nudged solves are as tight as the nudge
    asks, and the tilt makes their start stationary."""
    x, w = data(batch=2, dim=3)
    more = () if constraint == "none" else (WEIGHT, TOTAL)
    found = []
    for gradient in (ti.Implicit(), ti.EquilibriumPropagation(nudge=1e-4), ti.EquilibriumPropagation(nudge=None)):
        leaf = w.clone().requires_grad_()
        problem = ti.Minimum(convex_energy, ti.LinearEquality(*more) if more else None)
        loose = ti.LBFGS(rtol=0.0, atol=0.05)
        solution = ti.solve(problem, torch.zeros_like(x), x, leaf, solver=loose, gradient=gradient)
        found.append(torch.autograd.grad(head(solution.value), leaf)[0])
        if gradient != ti.Implicit():
            assert bool(solution.adjoint.converged.all())
    assert relative_error(found[1], found[0]) < 1e-5
    assert relative_error(found[2], found[0]) < 1e-4


@pytest.mark.parametrize("stiffness", [1e-2, 1.0, 1e2])
def test_the_nudge_that_is_chosen_moves_the_solution_as_far_as_it_may(stiffness):
    """The least eigenvalue is ``stiffness``, along the first axis, along which the cotangent lies."""
    scale = stiffness * torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    reached = []

    def energy(z, x):
        reached.append(z.detach())
        return (0.5 * scale * (z - x).square()).sum(1)

    gradient = ti.EquilibriumPropagation(nudge=None, reach=1e-2, symmetric=False)
    value = ti.solve(ti.Minimum(energy), torch.zeros_like(x), x, solver=SOLVER, gradient=gradient).value
    reached.clear()
    value[0, 0].backward()
    moved = [float((z - value.detach()).norm()) for z in reached]
    # a line search may try further on its way to the nudged solution
    assert min(moved, key=lambda m: abs(m - 1e-2 * 3)) == pytest.approx(1e-2 * 3, rel=1e-4)
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 0, 0]], dtype=torch.float64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dim", [10, 40, 200])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("gradient", [ti.EquilibriumPropagation(nudge=None), ti.DampedImplicit()])
def test_a_sample_without_a_hessian_and_one_at_zero_change_no_other(gradient, preconditioned, dim):
    """What is chosen by the eigenvalues is chosen sample by sample, and there is something to choose at zero."""
    scale = torch.linspace(1.0, 5.0, dim, dtype=torch.float64)
    x = torch.ones(3, dim, dtype=torch.float64)
    x[1], x[2] = 10.0, 0.0  # the second sample's energy is nowhere finite; the third's solution is zero
    x.requires_grad_()

    def energy(z, x):
        return ((0.5 * scale * z - x) * z).sum(1) * torch.where(x[:, 0] > 5, torch.nan, 1.0)

    solver = ti.LBFGS(preconditioner=(lambda v: v / scale) if preconditioned else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        solution = ti.solve(ti.Minimum(energy), torch.zeros_like(x), x, solver=solver, gradient=gradient, throw=False)
        (slope,) = torch.autograd.grad(solution.value.sum(), x)
    assert solution.converged.tolist() == [True, False, True]
    torch.testing.assert_close(slope[[0, 2]], (1 / scale).expand(2, -1), rtol=1e-5, atol=1e-5)
    assert not slope[1].isfinite().any()
