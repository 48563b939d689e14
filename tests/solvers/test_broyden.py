from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import Broyden, FixedPoint, Root
from torchimplicit.solvers import Solver
from torchimplicit.solvers.broyden import InverseEstimate
from torchimplicit.solvers.history import History
from torchimplicit.testing.solver_suite import SolverSuite


class TestBroyden(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return Broyden(**options)


class TestBroydenThatStartsAnew(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return Broyden(**{"memory": 4, **options})


def linear(dim: int, batch: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dim)
    w = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    x = torch.randn(batch, dim, dtype=torch.float64, generator=generator)
    return scale * w / torch.linalg.matrix_norm(w, 2), x


@pytest.mark.parametrize("scale", [0.9, 3.0])
def test_a_linear_map_takes_two_steps_a_dimension(scale):
    # Gay 1979; the map need not contract
    w, x = linear(6, 3, scale)
    solution = ti.solve(FixedPoint(lambda z, x: z @ w.T + x), torch.zeros_like(x), x, solver=Broyden(rtol=1e-9))
    exact = torch.linalg.solve(torch.eye(6, dtype=x.dtype) - w, x.T).T
    torch.testing.assert_close(solution.value, exact, rtol=1e-6, atol=1e-6)
    assert solution.steps.max() <= 2 * 6 + 1


def test_a_full_memory_does_not_spoil_a_contraction():
    w, x = linear(40, 4, 0.9)
    solution = ti.solve(
        FixedPoint(lambda z, x: z @ w.T + x), torch.zeros_like(x), x, solver=Broyden(memory=5, max_steps=300)
    )
    assert solution.converged.all()


def test_a_root():
    x = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    solution = ti.solve(Root(lambda z, x: z**3 + z - x), torch.zeros_like(x), x, solver=Broyden())
    torch.testing.assert_close(solution.value**3 + solution.value, x)


def test_a_step_that_changes_nothing_gives_no_update():
    # the residual of the second coordinate never changes: its secant condition is 0 / 0
    solution = ti.solve(
        Root(lambda z: torch.stack((z[:, 0] - 1, 0 * z[:, 1]), dim=1)),
        torch.zeros(2, 2, dtype=torch.float64),
        solver=Broyden(),
    )
    assert torch.equal(solution.value, torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(2, 2))


def test_refuses_an_empty_memory():
    with pytest.raises(ValueError, match=r"Broyden\.memory is 0, and must be at least 1"):
        Broyden(memory=0)


@pytest.mark.parametrize("gamma", [None, -0.5])
def test_the_inverse_is_that_of_rank_one_updates(gamma):
    """Broyden's good update by Sherman and Morrison, on the inverse as a matrix."""
    with torch.no_grad():
        eye, a = (
            torch.eye(5, dtype=torch.float64),
            torch.linalg.qr(linear(5, 1, 1.0)[0]).Q + torch.diag(torch.arange(5.0)),
        )
        unit = None if gamma is None else torch.full((1, 1), gamma, dtype=torch.float64)
        z, r = torch.zeros(1, 5, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)
        matrix = (1.0 if gamma is None else gamma) * eye
        step = r if unit is None else unit * r
        inverse = InverseEstimate(History.empty(z, 9).put(0, step), z.new_zeros(1, 8, 8), unit)
        for _ in range(6):
            before, r = r, r - step @ a.T
            s, y = step[0], (before - r)[0]  # A s = y
            matrix = matrix + torch.outer(s - matrix @ y, s @ matrix) / (s @ matrix @ y)
            step, inverse = inverse.stepped(r)
            torch.testing.assert_close(step, r @ matrix.T)
            probes = eye[:1] + torch.arange(5.0)
            torch.testing.assert_close(inverse.times(probes), probes @ matrix.T)
            torch.testing.assert_close(inverse.transposed_times(probes), probes @ matrix)
