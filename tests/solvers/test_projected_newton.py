from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import Box, Minimum, ProjectedNewton
from torchimplicit.problems import Problem
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestProjectedNewton(SolverSuite):
    """On a box whose bounds are nowhere met, where the suite knows the solutions."""

    kind = "energy"
    unrolled = False
    half = False
    reads = 30.0
    row_cost = 4.0
    test_stops_at_once_at_a_solution = None  # a step of Newton's finds that, and one look at the whole batch
    test_samples_that_depend_on_each_other = None  # they are not solved as one system, and are told

    def make(self, **options: Any) -> Solver:
        return ProjectedNewton(**options)

    def problem(self, function: Any, **options: Any) -> Problem:
        return Minimum(function, Box(-1e30, 1e30), **options)


def test_what_it_is_not_for():
    for problem in (ti.Root(torch.sin), Minimum(lambda z: z.square().sum(1))):
        with pytest.raises(ValueError, match="on a set"):
            ti.solve(problem, torch.ones(2, 3), solver=ProjectedNewton())


def test_every_iterate_lies_in_the_set_and_the_energy_never_rises():
    def energy(z: torch.Tensor) -> torch.Tensor:
        return (100 * (z[:, 1] - z[:, 0] ** 2) ** 2 + (1 - z[:, 0]) ** 2) + z[:, 2] ** 4

    start = torch.tensor([[-1.2, 1.0, 2.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    solver = ProjectedNewton(keep_trajectory=True)
    found = ti.solve(Minimum(energy, Box(-2.0, 0.8)), start, solver=solver)
    assert found.converged.all()
    energies = torch.stack([energy(z) for z in found.trajectory])
    assert (energies.diff(dim=0) <= 1e-12).all()
    assert all(bool(((z >= -2) & (z <= 0.8)).all()) for z in found.trajectory)


@pytest.mark.parametrize("beside", [1e-6, 1e-3, 0.1])
def test_a_saddle_on_a_set_is_left(beside):
    """Along the second coordinate the energy falls to the faces of the box."""
    energy = ti.Minimum(lambda z: z[:, 0] ** 2 - z[:, 1] ** 2, constraint=ti.Box(-1.0, 1.0))
    solution = ti.solve(energy, torch.tensor([[0.3, beside], [-0.7, -beside]], dtype=torch.float64))
    torch.testing.assert_close(solution.value.abs(), torch.tensor([[0.0, 1.0]] * 2, dtype=torch.float64))
    assert solution.status.tolist() == [ti.Status.CONVERGED] * 2
