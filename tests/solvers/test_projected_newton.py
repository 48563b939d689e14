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


SETS = {
    "box": lambda dim: Box(-1.0, 1.0),
    "ball": lambda dim: ti.L2Ball(0.8),
    "plane": lambda dim: (ti.LinearEquality(torch.ones(dim, dtype=torch.float64), 0.0), Box(-1.0, 1.0)),
    "polyhedron": lambda dim: (ti.LinearInequalities(torch.ones(1, dim, dtype=torch.float64), 1.0), Box(-1.0, 1.0)),
}


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


@pytest.mark.parametrize("constraint", SETS.values(), ids=SETS)
@pytest.mark.parametrize("dim", [40, 90])
def test_a_start_at_a_saddle_of_many_unknowns_is_left(dim, constraint):
    curvature = torch.linspace(1, 3, dim, dtype=torch.float64)
    curvature[3], curvature[-1] = -0.5, -1.0

    def energy(z: torch.Tensor) -> torch.Tensor:
        return (0.5 * curvature * z.square() + 0.25 * z**4).sum(1)

    parts = constraint(dim)
    found = ti.solve(Minimum(energy, parts), torch.zeros(2, dim, dtype=torch.float64))
    assert found.converged.all()
    slope = curvature * found.value + found.value**3
    near = ti.solve(Minimum(lambda z, y: 0.5 * (z - y).square().sum(1), parts), found.value, found.value - 0.1 * slope)
    torch.testing.assert_close(near.value, found.value, rtol=1e-7, atol=1e-7)
    assert energy(found.value).max() < -0.15


def test_a_saddle_of_many_unknowns_without_an_end_is_not_called_a_minimum():
    energy = Minimum(lambda z: z[:, 0] ** 2 - z[:, 1:].square().sum(1), ti.NonNegative())
    with pytest.warns(ti.ConvergenceWarning, match="has no minimum"):
        found = ti.solve(energy, torch.zeros(2, 90, dtype=torch.float64))
    assert not found.converged.any()
