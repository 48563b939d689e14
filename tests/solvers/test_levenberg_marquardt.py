from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit import CG, LeastSquares, LevenbergMarquardt, Root, Status
from torchimplicit.problems import Problem
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite

F64 = torch.float64


class OfSquares(SolverSuite):
    """The suite's maps as sums of squares."""

    unrolled = False
    half = False
    reads = 8.0
    row_cost = 2.6  # one evaluation a step for the tape, one for the trial
    test_the_figures_are_those_of_what_is_returned = None  # of a fixed point

    def problem(self, function: Any, **options: Any) -> Problem:
        def residual(z: Any, *args: Any) -> Any:
            return torch.utils._pytree.tree_map(torch.sub, z, function(z, *args))

        residual.func = function  # whose rows are remembered to depend on each other

        return LeastSquares(residual, **options)


class TestAssembled(OfSquares):
    def make(self, **options: Any) -> Solver:
        return LevenbergMarquardt(**options)


class TestByProducts(OfSquares):
    reads = 60.0

    def make(self, **options: Any) -> Solver:
        return LevenbergMarquardt(**{"linear_solver": CG(), **options})


def rosenbrock(z: Tensor) -> Tensor:
    return torch.stack((10 * (z[:, 1] - z[:, 0] ** 2), 1 - z[:, 0]), dim=1)


def powell(z: Tensor) -> Tensor:
    a, b, c, d = z.unbind(1)
    return torch.stack((a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2), dim=1)


def freudenstein(z: Tensor) -> Tensor:
    a, b = z.unbind(1)
    return torch.stack((-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b), dim=1)


def beale(z: Tensor) -> Tensor:
    a, b = z.unbind(1)
    return torch.stack([y - a * (1 - b**i) for i, y in ((1, 1.5), (2, 2.25), (3, 2.625))], dim=1)


def kowalik(z: Tensor) -> Tensor:
    y = torch.tensor([0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246])
    u = torch.tensor([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625]).to(z)
    a, b, c, d = z[:, :, None].unbind(1)
    return y.to(z) - a * (u**2 + u * b) / (u**2 + u * c + d)


@pytest.mark.parametrize(
    ("residual", "start", "least"),
    [
        (rosenbrock, (-1.2, 1.0), 0.0),
        (powell, (3.0, -1.0, 0.0, 1.0), 0.0),
        (freudenstein, (0.5, -2.0), 24.4921),
        (beale, (1.0, 1.0), 0.0),
        (kowalik, (0.25, 0.39, 0.415, 0.39), 1.53753e-4),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_problems_of_more_garbow_and_hillstrom(residual, start, least):
    """Their least half sums of squares are published, to six digits."""
    found = ti.solve(LeastSquares(residual), torch.tensor([start], dtype=F64))
    assert found.converged.all()
    assert abs(float(0.5 * residual(found.value).square().sum()) - least) <= 1e-5 * least + 1e-14


def test_the_unit_of_an_unknown_changes_nothing():
    """Of each unknown by itself, since the damping is scaled by the Jacobian's columns."""
    start = torch.tensor([[-1.2, 1.0]], dtype=F64)
    plain = ti.solve(LeastSquares(rosenbrock), start)
    for units in ((1e6, 1.0), (1.0, 2.0**-20)):
        unit = torch.tensor(units, dtype=F64)
        other = ti.solve(LeastSquares(lambda z, unit=unit: rosenbrock(z / unit)), start * unit)
        torch.testing.assert_close(other.value / unit, plain.value, rtol=1e-7, atol=1e-7)
        assert (other.steps - plain.steps).abs().max() <= 2


def test_every_sample_has_its_own_damping():
    start = torch.tensor([[1.0, 1.0], [-1.2, 1.0], [-120.0, 100.0]], dtype=F64)
    found = ti.solve(LeastSquares(rosenbrock), start)
    assert found.converged.all()
    for i in range(3):
        alone = ti.solve(LeastSquares(rosenbrock), start[i : i + 1])
        assert alone.steps[0] == found.steps[i]


def test_more_unknowns_than_residuals():
    found = ti.solve(LeastSquares(lambda z: z.sum(1, keepdim=True) - 3), torch.zeros(2, 4, dtype=F64))
    torch.testing.assert_close(found.value, torch.full((2, 4), 0.75, dtype=F64), rtol=1e-9, atol=1e-9)
    assert found.converged.all()


def test_an_unknown_without_influence_stays():
    found = ti.solve(LeastSquares(lambda z: z[:, :1] ** 3 - 8), torch.ones(2, 3, dtype=F64))
    torch.testing.assert_close(found.value, torch.tensor([[2.0, 1.0, 1.0]] * 2, dtype=F64), rtol=1e-9, atol=1e-9)


def test_large_systems_take_products():
    x = torch.randn(2, 600, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = ti.solve(LeastSquares(lambda z: z + 0.3 * torch.sin(z.roll(1, 1)) - x), torch.zeros_like(x))
    assert found.converged.all()
    assert (found.value + 0.3 * torch.sin(found.value.roll(1, 1)) - x).abs().max() < 1e-8


def test_roots():
    def f(z: Tensor) -> Tensor:  # Newton's Jacobian is singular at the start
        return torch.stack((z[:, 0] ** 2 + z[:, 1] ** 2 - 4, z[:, 0] * z[:, 1] - 1), dim=1)

    found = ti.solve(Root(f), torch.tensor([[1.0, 1.0]], dtype=F64), solver=LevenbergMarquardt())
    assert found.converged.all()
    assert f(found.value).abs().max() < 1e-8


def test_a_minimum_that_is_no_root_is_told():
    with pytest.warns(ti.ConvergenceWarning):
        found = ti.solve(Root(lambda z: z**2 + 1), torch.full((1, 1), 2.0, dtype=F64), solver=LevenbergMarquardt())
    assert found.status[0] != Status.CONVERGED


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"trials": 0}, {"linear_solver": ti.Anderson()}])
def test_bad_options(options):
    with pytest.raises((ValueError, TypeError)):
        LevenbergMarquardt(**options)
