"""SHINE: Broyden's inverse in the backward pass."""

from __future__ import annotations

import pytest
import torch
from maps import EXACT, assert_agree, data, fixed_point, tanh_map

import torchimplicit as ti
from torchimplicit.solvers import Solver
from torchimplicit.testing import GradientSuite
from torchimplicit.testing.gradient_suite import Kind, relative_error

BROYDEN = ti.Broyden(rtol=1e-13)


class _Broyden(GradientSuite):
    kinds = ("fixed_point", "root")
    second_order = False
    vectorized_backward = False

    def solver(self, kind: Kind) -> Solver:
        return ti.Broyden(rtol=0.0, atol=1e-12)


class TestSharedInverse(_Broyden):
    bound = 0.2
    consistency = 1e-2  # the batch decides how long each sample's inverse is refined

    def make(self) -> ti.SharedInverse:
        return ti.SharedInverse()


class TestRefinedSharedInverse(_Broyden):
    bound = 1e-6

    def make(self) -> ti.SharedInverse:
        return ti.SharedInverse(refine=10)


@pytest.mark.parametrize(("dim", "bound"), [(1, 1e-9), (4, 0.5)])
def test_a_linear_problem(dim, bound):
    """In one dimension the secant is the derivative, and the inverse is exact; in more, Broyden can solve a linear
    problem without having found its whole inverse (Gay 1979)."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    w = 0.7 * w / torch.linalg.matrix_norm(w, 2)
    b = torch.randn(3, dim, dtype=w.dtype, generator=generator).requires_grad_()
    u = torch.linspace(1, 2, dim, dtype=w.dtype).expand(3, dim)

    def of(gradient):
        value = fixed_point(lambda z, b: z @ w.T + b, torch.zeros_like(b), b, solver=BROYDEN, gradient=gradient)
        return torch.autograd.grad(value, b, u)[0]

    exact = of(EXACT)
    assert_agree(of(ti.SharedInverse()), exact, bound)
    assert relative_error(of(ti.SharedInverse()), exact) < 0.75 * relative_error(of(ti.OneStep()), exact)


def gradient_error(gradient: ti.SharedInverse | ti.OneStep, scale: float = 2.0) -> tuple[float, float]:
    """Relative error and cosine of the gradient in w."""
    x, w = data(batch=8, dim=6)
    w = (scale * w).requires_grad_()

    def of(gradient):
        value = fixed_point(tanh_map, torch.zeros_like(x), x, w, solver=BROYDEN, gradient=gradient)
        return torch.autograd.grad(value.sin().sum(), w)[0]

    got, exact = of(gradient), of(EXACT)
    return relative_error(got, exact), float(torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0))


def test_better_than_one_step():
    error, cosine = gradient_error(ti.SharedInverse())
    one_step_error, one_step_cosine = gradient_error(ti.OneStep())
    assert error < 0.75 * one_step_error
    assert cosine > max(one_step_cosine, 0.97)


def test_refinement_makes_it_exact():
    errors = [gradient_error(ti.SharedInverse(refine=k))[0] for k in (0, 1, 3, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_falls_back_to_one_step_where_the_estimate_is_poor():
    """A ratio that no estimate satisfies leaves the one-step gradient."""
    assert gradient_error(ti.SharedInverse(ratio=1e-9)) == gradient_error(ti.OneStep())


def test_the_measured_residual_is_reported():
    x, w = data(batch=4)
    solution = ti.solve(
        ti.FixedPoint(tanh_map),
        torch.zeros_like(x),
        x,
        w.requires_grad_(),
        solver=BROYDEN,
        gradient=ti.SharedInverse(),
    )
    solution.value.sum().backward()
    assert solution.adjoint.residual.shape == (4,)
    assert ((solution.adjoint.residual > 0) & (solution.adjoint.residual < 1)).all()


@pytest.mark.parametrize("solver", [ti.Anderson(), ti.FixedPointIteration(), ti.NewtonKrylov(), None])
def test_needs_broyden(solver):
    x, w = data()
    with pytest.raises(ValueError, match=r"Broyden\(\)"):
        ti.solve(
            ti.FixedPoint(tanh_map), torch.zeros_like(x), x, w, solver=solver, gradient=ti.SharedInverse()
        )  # fmt: skip
