from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import GMRES, Minimum, PseudoTransient, Root
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite


class TestPseudoTransient(SolverSuite):
    unrolled = False
    half = False
    reads = 6.0
    row_cost = 2.6  # one evaluation a step for the tape, one for the step

    def make(self, **options: Any) -> Solver:
        return PseudoTransient(**{"step_size": 10.0, **options})


class TestByProducts(SolverSuite):
    unrolled = False
    half = False
    reads = 60.0
    row_cost = 3.9

    def make(self, **options: Any) -> Solver:
        return PseudoTransient(**{"linear_solver": GMRES(), "step_size": 10.0, **options})


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def freudenstein_roth(z: torch.Tensor) -> torch.Tensor:
    """Freudenstein and Roth (1963), with a place near (11.41, -0.897) where the norm is least."""
    x, y = z.unbind(1)
    return torch.stack((-13 + x + ((5 - y) * y - 2) * y, -29 + x + ((y + 1) * y - 14) * y), 1)


def test_passes_by_a_place_where_the_norm_is_least():
    start = row(15.0, -2.0)
    with pytest.warns(ti.ConvergenceWarning):
        assert not ti.solve(Root(freudenstein_roth), start, solver=ti.TrustRegion()).converged
    solution = ti.solve(Root(freudenstein_roth), start, solver=PseudoTransient(step_size=1e10))
    assert solution.converged
    torch.testing.assert_close(solution.value, row(5.0, 4.0))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_time_may_run_backwards(sign):
    problem = Root(lambda z: sign * (torch.sinh(z) - 2))
    solution = ti.solve(problem, row(-3.0), solver=PseudoTransient(step_size=0.1))
    assert solution.converged
    torch.testing.assert_close(solution.value, torch.asinh(row(2.0)))


def test_claims_nothing_that_a_small_equation_denies():
    # the last equation is so large beside the others that a step for it alone is short
    def brown(z):  # Brown's almost-linear function (1969)
        return torch.cat((z[:, :-1] + z.sum(1, keepdim=True) - 41, z.prod(1, keepdim=True) - 1), 1)

    for step_size in (1.0, 1e10):
        solver = PseudoTransient(step_size=step_size, max_steps=50)
        start = torch.full((1, 40), 50.0, dtype=torch.float64)
        solution = ti.solve(Root(brown), start, solver=solver, throw=False)
        assert not solution.converged or brown(solution.value).norm() < 1e-6


def test_validation():
    with pytest.raises(ValueError, match="step_size"):
        PseudoTransient(step_size=0.0)
    with pytest.raises(ValueError, match="LBFGS"):
        ti.solve(Minimum(lambda z: (z**2).sum(1)), row(1.0), solver=PseudoTransient())
