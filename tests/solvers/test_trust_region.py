from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import GMRES, Minimum, Root, TrustRegion
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestTrustRegion(SolverSuite):
    unrolled = False
    half = False
    reads = 6.0
    row_cost = 2.6  # one evaluation a step for the tape, one for the search

    def make(self, **options: Any) -> Solver:
        return TrustRegion(**options)


class TestByProducts(SolverSuite):
    unrolled = False
    half = False
    reads = 60.0
    row_cost = 3.9  # the tape is made anew for the rows that GMRES goes on with

    def make(self, **options: Any) -> Solver:
        return TrustRegion(**{"linear_solver": GMRES(), **options})


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_every_sample_has_its_own_region():
    # from |z| > 1.39 the full step of Newton's method on arctan diverges
    solution = ti.solve(Root(torch.atan), column(0.1, 10.0, 1000.0), solver=TrustRegion())
    assert solution.converged.all()
    alone = ti.solve(Root(torch.atan), column(0.1), solver=TrustRegion())
    assert solution.steps[0] == alone.steps[0] < solution.steps[1]


def test_a_valley_in_any_units():
    unit = torch.tensor([1e-5, 1e3], dtype=torch.float64)

    def f(z, unit):  # Rosenbrock's
        x, y = (z / unit).unbind(1)
        return torch.stack((10 * (y - x**2), 1 - x), 1)

    start = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    one = ti.solve(Root(f), start, torch.ones_like(unit), solver=TrustRegion())
    other = ti.solve(Root(f), start * unit, unit, solver=TrustRegion())
    assert one.converged
    assert other.converged
    assert one.steps == other.steps
    torch.testing.assert_close(other.value / unit, torch.ones_like(other.value))


@pytest.mark.parametrize("linear_solver", [None, GMRES()])
def test_a_place_where_the_norm_is_least_is_no_root(linear_solver):
    solver = TrustRegion(linear_solver=linear_solver)
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(Root(lambda z: z**2 + 1), column(3.0, -0.5), solver=solver)
    assert (solution.status == ti.Status.BREAKDOWN).all()
    assert solution.steps.max() < 60


def test_a_singular_jacobian_at_the_start():
    solution = ti.solve(Root(lambda z: z**2 - z.flip(1)), torch.zeros(1, 2, dtype=torch.float64) + 0.5)
    assert solution.converged.all()
    singular = ti.solve(
        Root(lambda z: torch.stack((z[:, 0] ** 2 + z[:, 1] - 2, z[:, 0] * z[:, 1] - 1), 1)),
        torch.tensor([[0.0, 0.0]], dtype=torch.float64),
        solver=TrustRegion(),
    )
    assert singular.converged.all(), singular.summary()


def test_is_for_maps():
    with pytest.raises(ValueError, match="LBFGS"):
        ti.solve(Minimum(lambda z: (z**2).sum(1)), column(1.0), solver=TrustRegion())


def test_validation():
    for name, value in (("radius", 0.0), ("trials", 0)):
        with pytest.raises(ValueError, match=name):
            TrustRegion(**{name: value})
    with pytest.raises(TypeError, match="linear_solver"):
        TrustRegion(linear_solver="dense")  # type: ignore[arg-type]
