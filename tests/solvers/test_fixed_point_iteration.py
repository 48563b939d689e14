from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import FixedPoint, FixedPointIteration, Root, Status
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestFixedPointIteration(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return FixedPointIteration(**options)


class TestDamped(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return FixedPointIteration(**{"damping": 0.8, **options})


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_is_the_hand_written_loop(damping):
    z = z0 = torch.zeros(2, 3, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    iterates = [z]
    for _ in range(7):
        z = (1 - damping) * z + damping * torch.cos(z + x)
        iterates.append(z)
    solver = FixedPointIteration(damping=damping, max_steps=7, keep_trajectory=True, rtol=0.0)
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(FixedPoint(lambda z, x: torch.cos(z + x)), z0, x, solver=solver)
    for ours, theirs in zip(solution.trajectory, iterates, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_root_by_its_plain_step():
    solution = ti.solve(
        Root(lambda z, x: 0.5 * (z - x)), torch.zeros(2, 3), torch.ones(2, 3), solver=FixedPointIteration()
    )
    torch.testing.assert_close(solution.value, torch.ones(2, 3), rtol=1e-4, atol=1e-4)


def test_growth_without_bound_is_found_long_before_infinity():
    slope = torch.tensor([[0.5], [3.0], [0.5]])
    with pytest.raises(ti.SolveError, match=r"grew without bound in 1 of 3 samples \(1\)") as caught:
        ti.solve(FixedPoint(lambda z, s: s * z + 1), torch.zeros(3, 1), slope, solver=FixedPointIteration())
    solution = caught.value.solution
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert solution.steps[1] < 20
    torch.testing.assert_close(solution.value[[0, 2]], torch.full((2, 1), 2.0), rtol=1e-4, atol=0.0)
    assert solution.value[1] == 0  # the iterate of least residual


def test_a_solution_of_zero_is_found():
    solution = ti.solve(FixedPoint(lambda z: 0.5 * z), torch.ones(2, 3), solver=FixedPointIteration())
    assert solution.converged.all()
    assert solution.value.abs().max() < 1e-6


@pytest.mark.parametrize("damping", [0.0, -0.1, 1.1, float("nan")])
def test_refuses_a_damping_outside_of_its_range(damping):
    with pytest.raises(ValueError, match=r"FixedPointIteration\.damping is .* must lie in \(0, 1\]"):
        FixedPointIteration(damping=damping)
