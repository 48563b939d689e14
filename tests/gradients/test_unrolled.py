"""Differentiation through the solver's steps."""

from __future__ import annotations

import pytest
import torch
from maps import EXACT, assert_agree, data, fixed_point, tanh_map, unrolled

import torchimplicit as ti
from torchimplicit.solvers import Solver
from torchimplicit.testing import GradientSuite
from torchimplicit.testing.gradient_suite import Kind


class TestUnrolled(GradientSuite):
    bound = 1e-6
    vmap = False
    of_z0 = True

    def solver(self, kind: Kind) -> Solver:
        return ti.FixedPointIteration(damping=1.0 if kind == "fixed_point" else 0.7, rtol=0.0, atol=1e-12)

    def make(self) -> ti.Unrolled:
        return ti.Unrolled()


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
def test_equals_a_loop_written_by_hand():
    """Also far from the solution, in z0 as well, and to second order."""
    x, w = data()
    z0 = torch.full_like(x, 0.3)

    def compute(solve):
        leaves = [t.clone().requires_grad_() for t in (z0, x, w)]
        first = torch.autograd.grad(solve(*leaves).sin().sum(), leaves, create_graph=True)
        return [g.detach() for g in (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves))]

    solver = ti.FixedPointIteration(max_steps=3)
    got = compute(lambda *leaves: fixed_point(tanh_map, *leaves, solver=solver, gradient=ti.Unrolled()))
    assert_agree(got, compute(lambda *leaves: unrolled(tanh_map, *leaves, steps=3)), 1e-12)


@pytest.mark.parametrize("solver", [ti.Anderson(rtol=1e-13), ti.Broyden(rtol=1e-13)], ids=lambda s: type(s).__name__)
def test_accelerated_solvers(solver):
    """An accelerated method's iterates are differentiable; their derivative lags behind by some steps."""
    x, w = data()
    w = w.requires_grad_()
    got, expected = (
        torch.autograd.grad(fixed_point(tanh_map, torch.zeros_like(x), x, w, solver=solver, gradient=g).sum(), w)[0]
        for g in (ti.Unrolled(), EXACT)
    )
    assert_agree(got, expected, 1e-4)


def test_gradient_descent_on_a_minimum():
    x, w = data()

    def energy(z, x, w):
        return (0.5 * (z - x).square() + 0.1 * (z @ w.T).pow(4)).sum(1)

    def of(gradient):
        leaf = w.clone().requires_grad_()
        solver = ti.GradientDescent(step_size=0.5, momentum=0.3, rtol=0.0, atol=1e-13)
        value = ti.solve(ti.Minimum(energy), torch.zeros_like(x), x, leaf, solver=solver, gradient=gradient).value
        return torch.autograd.grad(value.sin().sum(), leaf)[0]

    assert_agree(of(ti.Unrolled()), of(EXACT), 1e-6)


@pytest.mark.parametrize(("problem", "solver"), [(ti.Root, ti.NewtonKrylov()), (ti.Minimum, ti.LBFGS())])
def test_solvers_that_cannot_be_unrolled_say_so(problem, solver):
    x, _ = data()
    function = (lambda z, x: (z - x).square().sum(1)) if problem is ti.Minimum else (lambda z, x: z - x)
    with pytest.raises(ti.UnsupportedDerivativeError, match=type(solver).__name__):
        ti.solve(
            problem(function), torch.zeros_like(x), x.requires_grad_(), solver=solver, gradient=ti.Unrolled()
        )  # fmt: skip
