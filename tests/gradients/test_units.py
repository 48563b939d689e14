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


@pytest.mark.parametrize("kind", ["fixed point", "root", "minimum", "plane", "box", "least squares"])
def test_orders_and_modes_in_any_unit(kind):
    """Second order, forward mode and ``torch.func``, of problems, cotangents and tangents of extreme size."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.5 * torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    x, c, t = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)

    def derivatives(state, size, cotangent=1.0, tangent=1.0):
        def image(z, x):
            return state * torch.tanh(z / state @ weight.T + x)

        def energy(z, x):
            y = z / state
            return size * (0.5 * y**2 + 0.25 * y**4 - y * x + 0.1 * torch.cos(y @ weight)).sum(1)

        problem = {
            "fixed point": lambda: ti.FixedPoint(image),
            "root": lambda: ti.Root(lambda z, x: (z - image(z, x)) / state * size),
            "minimum": lambda: ti.Minimum(energy),
            "plane": lambda: ti.Minimum(energy, ti.LinearEquality(torch.ones(3, dtype=x.dtype), state)),
            "box": lambda: ti.Minimum(energy, ti.Box(-0.4 * state, 0.4 * state)),
            "least squares": lambda: ti.LeastSquares(
                lambda z, x: size * torch.cat(((z - image(z, x)) / state, 0.3 * z / state), dim=1)
            ),
        }[kind]()

        def solved(x):
            return ti.solve(problem, torch.full((2, 3), 0.1 * state, dtype=x.dtype), x).value

        def loss(x):
            return (solved(x) * (cotangent / state) * c).sum()

        here = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(here), here, create_graph=True)
        (twice,) = torch.autograd.grad(slope, here, tangent * t)
        moved = torch.func.jvp(solved, (x,), (tangent * t,))[1] / state / tangent
        mixed = torch.func.jvp(torch.func.grad(loss), (x,), (tangent * t,))[1] / cotangent / tangent
        return slope.detach() / cotangent, twice / cotangent / tangent, moved, mixed

    expected = derivatives(1.0, 1.0)
    cases = [
        (1e-30, 1.0),
        (1e30, 1.0),
        (1.0, 1e-30),
        (1.0, 1e30),
        (1e-30, 1e30),
        (1.0, 1.0, 1e-30),
        (1.0, 1.0, 1e30, 1e-30),
    ]
    for case in cases:
        for got, right in zip(derivatives(*case), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-8)


def test_a_derivative_beyond_the_range_of_the_dtype_is_refused():
    """The Hessian is 1e52. Backward passes are computed in other units."""
    x = torch.tensor([[0.2, -0.3]], requires_grad=True)

    def solved(x):
        problem = ti.Minimum(lambda z, x: (0.5 * (z * 1e26) ** 2 - z * 1e26 * x).sum(1), ti.Box(-1e-26, 0.25e-26))
        return ti.solve(problem, torch.full((1, 2), 1e-27), x).value * 1e26

    torch.testing.assert_close(torch.autograd.grad(solved(x).sum(), x)[0], torch.ones(1, 2))
    with pytest.raises(ti.UnsupportedDerivativeError, match="beyond the range of"):
        torch.func.jvp(solved, (x.detach(),), (torch.ones(1, 2),))


@pytest.mark.parametrize("unit", [1e-3, 1.0, 300.0])
def test_a_series_on_a_minimum_with_leaves_of_unlike_sizes_is_that_of_its_hessian(unit):
    def energy(z: Any, x: Tensor) -> Tensor:
        a, b = z
        squares = a.square().sum(dim=1) + (b - unit).square().sum(dim=1)
        return 0.5 * squares + 0.3 * (a * (b - unit)).sum(dim=1) - (a * x).sum(dim=1)

    def slope(linear: Any) -> Tensor:
        x = normal(BATCH, DIM, seed=2).requires_grad_()
        start = (torch.zeros(BATCH, DIM, dtype=F64), torch.full((BATCH, DIM), unit, dtype=F64))
        solution = ti.solve(ti.Minimum(energy), start, x, gradient=ti.Implicit(linear_solver=linear))
        (g,) = torch.autograd.grad(solution.value[0].sin().sum() + solution.value[1].square().sum(), x)
        assert solution.adjoint.converged.all()
        return g

    assert relative_error(slope(ti.Neumann(damping=0.9)), slope(ti.Dense())) < 1e-7
