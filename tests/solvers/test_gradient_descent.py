from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import FixedPoint, GradientDescent, LinearEquality, Minimum, Root, Status
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestGradientDescent(SolverSuite):
    kind = "energy"
    free_of_units = False

    def make(self, **options: Any) -> Solver:
        return GradientDescent(**{"step_size": 1.0, "momentum": 0.0, **options})


class TestMomentum(SolverSuite):
    kind = "energy"
    free_of_units = False

    def make(self, **options: Any) -> Solver:
        return GradientDescent(**{"step_size": 0.5, "momentum": 0.5, **options})


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)])
def test_momentum_is_the_hand_written_loop(weight):
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = torch.zeros(3, dtype=x.dtype) if weight is None else weight / weight.norm()
    z = torch.zeros_like(x) + (0 if weight is None else 1.5 * unit / weight.norm())
    velocity = torch.zeros_like(x)
    iterates = [z]
    for _ in range(9):
        gradient = 2 * (z - x) + 4 * z**3
        velocity = 0.8 * velocity - (gradient - (gradient * unit).sum(1, keepdim=True) * unit)
        z = z + 0.05 * velocity
        iterates.append(z)
    constraint = None if weight is None else LinearEquality(weight, 1.5)
    problem = Minimum(lambda z, x: ((z - x) ** 2 + z**4).sum(1), constraint=constraint)
    solver = GradientDescent(step_size=0.05, momentum=0.8, max_steps=9, keep_trajectory=True)
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(problem, torch.zeros_like(x), x, solver=solver)
    assert len(solution.trajectory) == 10
    for ours, theirs in zip(solution.trajectory, iterates, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_too_long_a_step_is_found():
    curvature = torch.tensor([[1.0], [100.0]])
    with pytest.raises(ti.SolveError, match=r"1 of 2 samples \(1\)") as caught:
        ti.solve(
            Minimum(lambda z, c: (c * (z - 1) ** 2).sum(1)),
            torch.zeros(2, 1),
            curvature,
            solver=GradientDescent(step_size=0.1, momentum=0.0),
        )
    assert caught.value.solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]


@pytest.mark.parametrize("problem", [FixedPoint(lambda z: z / 2), Root(lambda z: z)])
def test_refuses_a_problem_without_an_energy(problem):
    with pytest.raises(ValueError, match=r"GradientDescent needs an energy.* take Anderson"):
        ti.solve(problem, torch.ones(2, 3), solver=GradientDescent())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.0}, r"momentum is 1.0, and must lie in \[0, 1\)"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"step_size": 0.0}, "step_size is 0.0, and must be a positive"),
        ({"step_size": float("inf")}, "step_size is inf"),
    ],
)
def test_refuses(options, words):
    with pytest.raises(ValueError, match=rf"GradientDescent\.{words}"):
        GradientDescent(**options)
