"""Derivatives in any units of the state, of its leaves and of the energy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.testing.gradient_suite import relative_error

F64 = torch.float64
BATCH, DIM = 3, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


ROOT = normal(DIM, DIM, seed=1)
HESSIAN = ROOT @ ROOT.T / DIM + torch.eye(DIM, dtype=F64)


def constrained(x: Tensor, unit: float, energy_unit: float) -> Tensor:
    """A minimum under a constraint, in units of the state and of the energy; the value in units of one."""

    def energy(p: Tensor, x: Tensor) -> Tensor:
        q = p / unit
        return energy_unit * (0.5 * (q @ HESSIAN * q).sum(1) + 0.1 * q.pow(4).sum(1) - (q * x.sin()).sum(1))

    constraint = ti.LinearEquality(torch.linspace(0.5, 1.5, DIM, dtype=F64), unit)
    return ti.solve(ti.Minimum(energy, constraint), torch.zeros_like(x), x).value / unit


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("energy_unit", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("unit", [1e-12, 1e-5, 1e12])
def test_a_constrained_minimum(unit, energy_unit, order):
    def slope(*units: float) -> Tensor:
        x = normal(BATCH, DIM, seed=2).requires_grad_()
        (g,) = torch.autograd.grad(constrained(x, *units).sin().sum(), x, create_graph=order == 2)
        return g if order == 1 else torch.autograd.grad((g * normal(BATCH, DIM, seed=3)).sum(), x)[0]

    assert relative_error(slope(unit, energy_unit), slope(1.0, 1.0)) < 1e-9


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_a_constrained_minimum_under_transforms(unit):
    x, t = normal(BATCH, DIM, seed=2), normal(BATCH, DIM, seed=3)
    tangents = [torch.func.jvp(lambda x, u=u: constrained(x, u, 1.0), (x,), (t,))[1] for u in (unit, 1.0)]
    assert relative_error(*tangents) < 1e-9
    curved = [torch.func.hessian(lambda x, u=u: constrained(x, u, 1.0).sin().sum())(x) for u in (unit, 1.0)]
    assert relative_error(*curved) < 1e-9


@pytest.mark.parametrize("linear", [None, ti.GMRES(), ti.Dense(), ti.BiCGStab(), ti.LSMR()])
@pytest.mark.parametrize("unit", [1e-12, 1e-5, 1e12])
@pytest.mark.parametrize("kind", [ti.FixedPoint, ti.Root])
def test_leaves_of_different_units(kind, unit, linear):
    w = 0.3 * normal(DIM, DIM, seed=4) / DIM**0.5

    def solved(unit: float, x: Tensor) -> Any:
        def f(z: Any, x: Tensor) -> Any:
            a, b = z[0], z[1] / unit
            return torch.tanh(a @ w + 0.3 * b + x), unit * torch.tanh(0.4 * a - b @ w + x)

        def r(z: Any, x: Tensor) -> Any:
            return tuple(a - b for a, b in zip(z, f(z, x), strict=True))

        zero, problem = torch.zeros(BATCH, DIM, dtype=F64), kind(f if kind is ti.FixedPoint else r)
        return ti.solve(problem, (zero, zero), x, gradient=ti.Implicit(linear_solver=linear))

    def slope(unit: float) -> Tensor:
        x = normal(BATCH, DIM, seed=2).requires_grad_()
        solution = solved(unit, x)
        a, b = solution.value
        (g,) = torch.autograd.grad(a.sin().sum() + (b / unit).square().sum(), x)
        assert solution.adjoint.converged.all()
        return g

    assert relative_error(slope(unit), slope(1.0)) < 1e-8

    def tangent(unit: float) -> Tensor:
        x, t = normal(BATCH, DIM, seed=2), normal(BATCH, DIM, seed=3)
        return torch.func.jvp(lambda x: solved(unit, x).value[1] / unit, (x,), (t,))[1]

    assert relative_error(tangent(unit), tangent(1.0)) < 1e-8
