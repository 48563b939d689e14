"""Adjoint systems that are nearly singular say so."""

from __future__ import annotations

import warnings

import pytest
import torch

import torchimplicit as ti


@pytest.mark.parametrize("linear", [None, ti.Dense()])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_nearly_singular_adjoint_is_warned_of(size, linear):
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([[1.0, 1e-11], [1.0, 0.5]], dtype=x.dtype) * size
    problem = ti.Root(lambda z, x: slopes * (z - x))
    solution = ti.solve(problem, torch.zeros_like(x), x, gradient=ti.Implicit(linear_solver=linear))
    with pytest.warns(ti.ConvergenceWarning, match="nearly singular in 1 of 2 samples"):
        solution.value.sum().backward()
    assert solution.adjoint.condition[0] > 1e10
    assert solution.adjoint.condition[1] < 10


def test_a_regular_one_is_not():
    w = torch.diag(torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64))
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    for linear in (None, ti.MINRES()):
        problem = ti.Minimum(lambda z, x: 0.5 * ((z - x) @ w * (z - x)).sum(1))
        solution = ti.solve(
            problem, torch.zeros_like(x), x, solver=ti.NewtonKrylov(), gradient=ti.Implicit(linear_solver=linear)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solution.value.sum().backward()
        assert 1e3 < solution.adjoint.condition[0] < 1e7


def test_an_equilibrium_that_is_about_to_be_lost():
    """Its Jacobian has an eigenvalue of one, but for rounding."""
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([1 - 1e-13, 0.5], dtype=x.dtype)
    solution = ti.solve(ti.FixedPoint(lambda z, x: slopes * z + x), torch.zeros_like(x), x)
    with pytest.warns(ti.ConvergenceWarning, match="nearly singular"):
        solution.value.sum().backward()
