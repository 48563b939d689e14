from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import GMRES, Dense, Minimum, NewtonKrylov, Root, Status
from torchimplicit.linear import LinearSolver
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestNewtonKrylov(SolverSuite):
    unrolled = False
    half = False
    reads = 6.0  # those of the linear solver and of the search among them
    row_cost = 2.6  # one evaluation a step for the tape, one for the search

    def make(self, **options: Any) -> Solver:
        return NewtonKrylov(**options)


class TestNewtonGMRES(SolverSuite):
    unrolled = False
    half = False
    reads = 60.0
    row_cost = 3.9  # the tape is made anew for the rows that GMRES goes on with

    def make(self, **options: Any) -> Solver:
        return NewtonKrylov(**{"linear_solver": GMRES(), **options})


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_converges_quadratically():
    c = column(8.0, 27.0, 1000.0)
    solver = NewtonKrylov(keep_trajectory=True, rtol=1e-14, atol=1e-12)
    solution = ti.solve(Root(lambda z, c: z**3 - c), column(1.8, 2.7, 9.0), c, solver=solver)
    errors = [(z / c ** (1 / 3) - 1).abs() for z in solution.trajectory]
    for before, after in pairwise(errors):
        assert (after <= 1.3 * before**2 + 1e-15).all()
    assert solution.steps.max() <= 5


def test_every_sample_has_its_own_step_size():
    # from |z| > 1.39 the full step of Newton's method on arctan diverges
    z0 = column(0.1, 10.0, 1000.0)
    solution = ti.solve(Root(torch.atan), z0, solver=NewtonKrylov())
    assert solution.converged.all()
    alone = ti.solve(Root(torch.atan), z0[:1], solver=NewtonKrylov())
    assert solution.steps[0] == alone.steps[0] < solution.steps[1]


@pytest.mark.parametrize("inside", [False, True])
def test_a_badly_scaled_root(inside):
    scale = torch.logspace(-6, 6, 6, dtype=torch.float64)
    a = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def f(z):
        y = z * scale if inside else z
        out = torch.tanh(y @ a.T) + 2 * y - 1
        return out if inside else out * scale

    solution = ti.solve(Root(f), torch.zeros(3, 6, dtype=torch.float64))
    assert solution.converged.all(), solution.summary()
    assert solution.steps.max() <= 12


def test_a_large_root_by_gmres():
    x = torch.randn(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = ti.solve(Root(lambda z, x: z + 0.3 * torch.sin(z.roll(1, 1)) - x), torch.zeros_like(x), x)
    assert solution.converged.all()
    assert solution.steps.max() <= 6


# the saddle itself, the ridge that leads to it, its neighbourhood, and far away
SADDLE_STARTS = torch.tensor([[0.0, 0.0], [0.7, 0.0], [0.3, 0.1], [1.0, 0.05], [5.0, -9.0]], dtype=torch.float64)


@pytest.mark.parametrize("linear", [None, ti.MINRES(), ti.CG()])
def test_leaves_a_saddle(linear):
    z0 = SADDLE_STARTS if linear is None else SADDLE_STARTS[2:]  # products do not tell what a residual has no part of
    energy = Minimum(lambda z: z[:, 0] ** 2 - z[:, 1] ** 2 + z[:, 1] ** 4)
    solution = ti.solve(energy, z0, solver=NewtonKrylov(linear_solver=linear))
    assert solution.converged.all(), solution.summary()
    torch.testing.assert_close(solution.value[:, 0], torch.zeros(len(z0)).double())
    torch.testing.assert_close(solution.value[:, 1].abs(), torch.full((len(z0),), 0.5**0.5).double())


def test_a_saddle_that_no_trial_leaves_is_named():
    # its value does not follow its second derivative
    def energy(z):
        return z[:, 0] ** 2 - 1e-3 * (z[:, 1] - z[:, 1].detach()) ** 2

    with pytest.warns(ti.ConvergenceWarning, match="1 SADDLE"):
        solution = ti.solve(Minimum(energy), torch.zeros(1, 2, dtype=torch.float64), solver=NewtonKrylov())
    assert solution.status.tolist() == [Status.SADDLE]


def himmelblau(z):
    return (z[:, 0] ** 2 + z[:, 1] - 11) ** 2 + (z[:, 0] + z[:, 1] ** 2 - 7) ** 2


def rosenbrock(z):
    return (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(1)


@pytest.mark.parametrize("linear", [None, ti.MINRES(), ti.CG()])
@pytest.mark.parametrize("energy", [himmelblau, rosenbrock])
def test_descends_on_an_energy(energy, linear):
    z0 = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.2, 1.0], [-1.0, 1.5], [6.0, -7.0]], dtype=torch.float64)
    solver = NewtonKrylov(linear_solver=linear, keep_trajectory=True, max_steps=200)
    solution = ti.solve(Minimum(energy), z0, solver=solver)
    assert solution.converged.all(), solution.summary()
    assert energy(solution.value).max() <= 1e-15
    path = torch.stack([energy(z) for z in solution.trajectory])
    assert (path[1:] <= path[:-1] * (1 + 1e-12) + 1e-25).all()


def test_a_start_at_a_minimum_takes_no_step():
    z0 = torch.tensor([[3.0, 2.0]], dtype=torch.float64)
    solution = ti.solve(Minimum(himmelblau), z0, solver=NewtonKrylov())
    assert solution.converged.all()
    assert solution.steps.tolist() == [0]
    assert torch.equal(solution.value, z0)


@pytest.mark.parametrize("problem", ["root", "fixed point"])
def test_what_broke_down_beside_others_reports_its_own_residual(problem):
    a = column(1.0, -1e6)  # z**2 + 1 = 0 has no root; z**2 = 1e6 has one
    z0 = column(1e-3, 0.5)
    stated = Root(lambda z, a: z * z + a) if problem == "root" else ti.FixedPoint(lambda z, a: z - (z * z + a) / 10)
    with pytest.warns(ti.ConvergenceWarning, match="1 CONVERGED, 1 BREAKDOWN"):
        both = ti.solve(stated, z0, a, solver=NewtonKrylov())
    with pytest.warns(ti.ConvergenceWarning):
        alone = ti.solve(stated, z0[:1], a[:1], solver=NewtonKrylov())
    torch.testing.assert_close(both.residual[:1], alone.residual)
    assert both.residual[0] > 0.9


def test_a_search_without_a_decrease_breaks_down_and_says_so():
    c = column(-1.0, 4.0)  # z**2 = -1 has no root
    with pytest.warns(ti.ConvergenceWarning, match="1 CONVERGED, 1 BREAKDOWN"):
        solution = ti.solve(Root(lambda z, c: z**2 - c), column(1.0, 1.0), c)
    assert solution.status.tolist() == [Status.BREAKDOWN, Status.CONVERGED]
    assert torch.isfinite(solution.value).all()


def test_a_singular_jacobian_that_the_residual_fits():
    solution = ti.solve(Root(lambda z: (z.sum(1, keepdim=True) - 1).expand(-1, 2)), torch.ones(3, 2))
    torch.testing.assert_close(solution.value.sum(1), torch.ones(3))


class Recorder(LinearSolver):
    """Dense, noting the right-hand sides."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def solve(self, operator, b, x0=None):
        self.seen.append(b)
        return Dense().solve(operator, b, x0)


def test_finished_samples_ask_for_no_step():
    recorder = Recorder()
    solution = ti.solve(Root(torch.atan), column(0.1, 10.0, 1000.0), solver=NewtonKrylov(linear_solver=recorder))
    for step, b in enumerate(recorder.seen):
        asks = b[:, 0] != 0
        assert asks[solution.steps > step].all()
        assert not asks[solution.steps < step].any()


@pytest.mark.parametrize("value", [GMRES, "gmres"])
def test_refuses_what_is_no_linear_solver(value):
    with pytest.raises(TypeError, match=r"NewtonKrylov\.linear_solver must be a LinearSolver, not"):
        NewtonKrylov(linear_solver=value)


@pytest.mark.parametrize("solver", [ti.NewtonKrylov(), ti.NewtonCG(), ti.LBFGS()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_that_depend_on_each_other_stay_on_their_planes(solver, dtype):
    """As one system the energy is flat across the planes: Newton's steps there grew to 1e5, and in float32 the
    projection left a point 1.5 beside the plane, CONVERGED."""
    torch.manual_seed(0)
    weight, total = torch.tensor([2.0, 0.4], dtype=dtype), torch.tensor(1.4, dtype=dtype)
    a, x = torch.randn(2, 2, dtype=dtype), torch.randn(2, 2, dtype=dtype)

    def energy(z, x):
        return 0.5 * z.square().sum(1) + torch.nn.functional.softplus(z @ a + x).sum(1) + 0.3 * (z.mean(0) * z).sum(1)

    problem = ti.Minimum(energy, ti.LinearEquality(weight, total))
    solution = ti.solve(problem, torch.zeros(2, 2, dtype=dtype), x, solver=solver)
    solution = ti.solve(problem, torch.zeros(2, 2, dtype=dtype), x, solver=solver)  # the coupling is known now
    assert solution.converged.all()
    assert solution.evaluations <= 12
    rtol = torch.finfo(dtype).eps ** (2 / 3)
    torch.testing.assert_close(solution.value @ weight, total.expand(2), rtol=rtol, atol=0)
    z = solution.value.double().requires_grad_()
    a, x = a.double(), x.double()
    (slope,) = torch.autograd.grad(energy(z, x).sum(), z)
    along = slope - (slope @ weight.double())[:, None] * weight.double() / weight.double().square().sum()
    assert along.norm() <= 10 * rtol * slope.norm()
