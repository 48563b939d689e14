from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import Anderson, Broyden, FixedPoint, FixedPointIteration, NewtonKrylov, Polyalgorithm, Root, Status
from torchimplicit.defaults import FIXED_POINT
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite, Spy


class TestPolyalgorithm(SolverSuite):
    unrolled = True

    def make(self, **options: Any) -> Solver:
        return Polyalgorithm(**{"members": (Anderson(max_steps=1000), Broyden(), NewtonKrylov()), **options})


class TestSecondMember(SolverSuite):
    """The first gives up at once."""

    unrolled = False
    half = False
    reads = 12.0
    row_cost = 4.0

    def make(self, **options: Any) -> Solver:
        return Polyalgorithm(**{"members": (NewtonKrylov(max_steps=1), NewtonKrylov()), **options})


def stretched(z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Contracts where c is small; where it is large the plain step leads away."""
    return c - c * z


def test_a_sample_that_needs_it_goes_on_alone():
    c = torch.tensor([[0.3], [0.5], [-40.0], [0.2]], dtype=torch.float64).expand(4, 3).contiguous()
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    solver = Polyalgorithm(members=(FixedPointIteration(max_steps=60), NewtonKrylov()))
    spy = Spy(lambda z, c: 0.3 * torch.tanh(c * z * scale) + c)
    solution = ti.solve(FixedPoint(spy, rowwise=True), torch.ones(4, 3, dtype=torch.float64), c, solver=solver)
    assert solution.converged.all()
    assert len(solution.turns) == 1
    spy = Spy(lambda z, c: stretched(z, c * scale))
    with torch.no_grad():
        solution = ti.solve(FixedPoint(spy, rowwise=True), torch.zeros(4, 3, dtype=torch.float64), c, solver=solver)
    assert solution.converged.all()
    first, second = solution.turns
    assert (first.solver, first.tried) == ("FixedPointIteration", 4)
    assert (second.solver, second.tried, second.solved) == ("NewtonKrylov", 4 - first.solved, 4 - first.solved)
    assert 0 < second.tried < 4
    assert f"FixedPointIteration solved {first.solved} of 4, then NewtonKrylov solved" in solution.summary()
    exact = c * scale / (1 + c * scale)
    torch.testing.assert_close(solution.value, exact)


@pytest.mark.parametrize("rowwise", [False, True])
def test_the_derivative_is_that_of_the_solution(rowwise):
    c = torch.tensor([[0.3], [-40.0], [0.2]], dtype=torch.float64, requires_grad=True)
    solution = ti.solve(FixedPoint(stretched, rowwise=rowwise), torch.zeros(3, 1, dtype=torch.float64), c)
    assert solution.converged.all(), solution.summary()
    (grad,) = torch.autograd.grad(solution.value.sum(), c)
    torch.testing.assert_close(grad, 1 / (1 + c) ** 2)


def test_samples_that_depend_on_each_other():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(5, 5, dtype=torch.float64, generator=g)
    c = torch.randn(5, 4, dtype=torch.float64, generator=g)

    def f(z, c):
        return 3 * torch.sin(mix @ z) + c

    for problem in (FixedPoint(f), Root(lambda z, c: z - f(z, c))):
        solution = ti.solve(problem, torch.zeros_like(c), c, throw=False)
        defect = (f(solution.value, c) - solution.value).norm(dim=1)
        assert (defect[solution.converged] < 1e-7).all(), solution.summary()


def test_what_no_member_solves_is_said():
    def f(z):
        return z**2 + 1

    with pytest.warns(ti.ConvergenceWarning, match="NewtonKrylov solved 0 of 1, then TrustRegion") as caught:
        solution = ti.solve(Root(f), torch.tensor([[3.0]], dtype=torch.float64), throw=False)
    assert len(caught) == 1
    assert not solution.converged
    assert len(solution.turns) == 5
    assert f(solution.value) < 1.1  # the best of what was reached


def test_a_start_that_is_not_finite_is_not_tried_again():
    spy = Spy(lambda z: z * torch.nan)
    with pytest.raises(ti.SolveError):
        ti.solve(FixedPoint(spy), torch.zeros(2, 2))
    assert len(spy.seen) <= 2


def test_members_that_need_products_are_left_out_where_there_are_none():
    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return 1 - 3 * z

        @staticmethod
        def backward(ctx, g):
            if torch.is_grad_enabled():
                raise RuntimeError("no second derivative")
            return -3 * g

    solver = Polyalgorithm(members=(FixedPointIteration(max_steps=5), NewtonKrylov(), Broyden()))
    start = torch.zeros(2, 3, dtype=torch.float64)
    with torch.no_grad():
        solution = ti.solve(FixedPoint(Foreign.apply), start, solver=solver)
    assert solution.converged.all()
    assert [turn.solver for turn in solution.turns] == ["FixedPointIteration", "Broyden"]


def test_options_for_all():
    solver = Polyalgorithm(members=(Anderson(rtol=1e-3), Broyden()), rtol=1e-5, check_every=3)
    assert (solver.leading.rtol, solver.leading.check_every) == (1e-5, 3)
    assert Polyalgorithm(members=(Anderson(rtol=1e-3),)).leading == Anderson(rtol=1e-3)
    assert FIXED_POINT.leading is FIXED_POINT.members[0]


def test_the_budget_is_that_of_all():
    solver = Polyalgorithm(members=(FixedPointIteration(max_steps=5), Broyden()), max_steps=7)
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(FixedPoint(lambda z: torch.cos(9 * z)), torch.ones(2, 5), solver=solver)
    assert (solution.steps <= 7).all()
    assert (solution.status == Status.MAX_STEPS).all()


def test_validation():
    with pytest.raises(ValueError, match="members"):
        Polyalgorithm()
    with pytest.raises(ValueError, match="tuple"):
        Polyalgorithm(members=[Anderson()])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="polyalgorithms"):
        Polyalgorithm(members=(Anderson(), Polyalgorithm(members=(Broyden(),))))


def wells(z: torch.Tensor) -> torch.Tensor:
    """Saddles where some of the entries after the first are zero; minima of value zero at 0, ±1, ±1, ..."""
    return z[:, 0] ** 2 + ((z[:, 1:] ** 2 - 1) ** 2).sum(dim=1)


@pytest.mark.parametrize("dim", [2, 5, 100])
def test_a_minimization_that_begins_at_a_saddle_leaves_it(dim):
    z0 = torch.zeros(3, dim, dtype=torch.float64)
    z0[1], z0[2, 0] = 0.7, 1.0  # the second is no saddle; the third slides into one, in a step or two
    solution = ti.solve(ti.Minimum(wells), z0)
    assert solution.converged.all()
    assert wells(solution.value).abs().max() < 1e-12


def test_a_start_at_the_minimum_stays_there():
    z0 = torch.ones(2, 3, dtype=torch.float64)
    z0[:, 0] = 0
    solution = ti.solve(ti.Minimum(wells), z0)
    assert solution.converged.all()
    assert torch.equal(solution.value, z0)
    assert solution.steps.tolist() == [0, 0]
    assert solution.evaluations == 1


def test_the_derivative_beyond_a_saddle():
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def energy(z, a):
        return a * z[:, 0] ** 2 / 2 - a * z[:, 1] ** 2 / 2 + z[:, 1] ** 4 / 4

    value = ti.solve(ti.Minimum(energy), torch.zeros(1, 2, dtype=torch.float64), a).value
    (slope,) = torch.autograd.grad(value[0, 1].abs(), a)
    torch.testing.assert_close(slope, 0.5 * a.detach() ** -0.5)


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
def test_a_saddle_from_which_no_minimum_is_found_is_named():
    def saddle(z):
        return z[:, 0] ** 2 - z[:, 1] ** 2

    solution = ti.solve(ti.Minimum(saddle), torch.zeros(1, 2, dtype=torch.float64), throw=False)
    assert solution.status.tolist() == [ti.Status.SADDLE]
    with pytest.warns(ti.ConvergenceWarning, match="SADDLE"):
        ti.solve(ti.Minimum(saddle), torch.zeros(1, 2, dtype=torch.float64))
