from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pytest
import torch

import torchimplicit as ti
from torchimplicit import FixedPoint, LinearEquality, Minimum, NewtonCG, Status
from torchimplicit.solvers import Solver, newton_cg
from torchimplicit.testing.solver_suite import SolverSuite

D = torch.float64


class TestNewtonCG(SolverSuite):
    kind: ClassVar[Literal["map", "energy"]] = "energy"
    unrolled = False
    half = False
    reads = 6.0
    row_cost = 2.6

    def make(self, **options: Any) -> Solver:
        return NewtonCG(**options)

    @pytest.mark.parametrize("call", [0, 2])  # it is done by the fourth
    def test_a_bad_row_is_named_and_changes_no_other(self, call: int) -> None:
        super().test_a_bad_row_is_named_and_changes_no_other(call)


class TestByProducts(TestNewtonCG):
    reads = 30.0
    row_cost = 4.5

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(newton_cg, "SMALL", 0)

    def make(self, **options: Any) -> Solver:
        return NewtonCG(**{"inner": 4, **options})


def quadratic(n: int, cond: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=D)).Q
    return q @ torch.diag(torch.logspace(0, -math.log10(cond), n, dtype=D)) @ q.T, torch.randn(
        2, n, generator=g, dtype=D
    )


@pytest.mark.parametrize("cond", [1e4, 1e8])
def test_an_ill_conditioned_quadratic_takes_a_step_or_two(cond):
    matrix, b = quadratic(60, cond)
    problem = Minimum(lambda z, b: 0.5 * ((z @ matrix) * z).sum(1) - (z * b).sum(1))
    solution = ti.solve(problem, torch.zeros_like(b), b, solver=NewtonCG())
    assert solution.converged.all(), solution.summary()
    assert (solution.steps <= 7).all()  # how many depends on rounding: 6 on one machine, 7 on another
    exact = torch.linalg.solve(matrix, b.mT).mT
    assert ((solution.value - exact).norm(dim=1) <= 1e-6 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("small", [0, 512])
def test_saddles_are_left(small, monkeypatch):
    monkeypatch.setattr(newton_cg, "SMALL", small)
    start = torch.tensor([[1e-3, 0.4], [0.0, 0.5]], dtype=D)
    if small:
        start = torch.cat((start, torch.zeros(1, 2, dtype=D)))  # exactly at the maximum along x
    solution = ti.solve(
        Minimum(lambda z: 0.25 * (z[:, 0] ** 2 - 1) ** 2 + z[:, 1] ** 2), start, solver=NewtonCG(), throw=False
    )
    left = solution.value[:, 0].abs()
    torch.testing.assert_close(left[0], torch.ones((), dtype=D))
    if small:
        torch.testing.assert_close(left, torch.ones(3, dtype=D))
        assert solution.converged.all()


def test_a_saddle_without_a_way_down_is_named():
    # finite on a line alone: no trial off it is lower
    def energy(z):
        x, y = z.unbind(1)
        return x**2 - y**2 + torch.where(y.detach() != 0, 1.0, 0.0)

    with pytest.warns(ti.ConvergenceWarning, match="SADDLE"):
        solution = ti.solve(Minimum(energy), torch.zeros(1, 2, dtype=D), solver=NewtonCG(trials=3))
    assert (solution.status == Status.SADDLE).all()


def test_stays_on_the_constraint():
    matrix, b = quadratic(20, 1e6)
    weight = torch.rand(20, dtype=D, generator=torch.Generator().manual_seed(1)) + 0.5
    problem = Minimum(
        lambda z, b: 0.5 * ((z @ matrix) * z).sum(1) - (z * b).sum(1), constraint=LinearEquality(weight, 1.0)
    )
    solution = ti.solve(problem, torch.ones_like(b) / weight.sum(), b, solver=NewtonCG())
    assert solution.converged.all(), solution.summary()
    torch.testing.assert_close(solution.value @ weight, torch.ones(2, dtype=D))
    slope = solution.value @ matrix - b
    off = slope - (slope @ weight)[:, None] * weight / weight.square().sum()
    assert (off.norm(dim=1) < 1e-9).all()


def test_is_for_minima():
    with pytest.raises(ValueError, match="energy"):
        ti.solve(FixedPoint(torch.cos), torch.ones(1, 1), solver=NewtonCG())
    with pytest.raises(ValueError, match="inner"):
        NewtonCG(inner=0)
