from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from torchimplicit.linear import LinearOperator, LinearSolver, Neumann
from torchimplicit.solution import Status
from torchimplicit.testing.linear_suite import LinearSolverSuite, matrix_operator, residuals


class TestNeumann(LinearSolverSuite):
    kind = "contraction"

    def make(self, **options: Any) -> LinearSolver:
        return Neumann(**options)


def system(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(4, 10, 10, generator=generator, dtype=torch.float64)
    j = spread * j / torch.linalg.matrix_norm(j, 2, keepdim=True)
    return torch.eye(10, dtype=torch.float64) - j, torch.randn(4, 10, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("terms", [1, 2, 5, 40])
@pytest.mark.parametrize("damping", [1.0, 0.5, 0.8])
@pytest.mark.parametrize("spread", [0.9, 3.0])
def test_truncated_series(terms: int, damping: float, spread: float) -> None:
    """``damping * sum_{i<k} (I - damping A)^i b``, convergent or not, in k - 1 products."""
    (a, b), tally = system(spread), [0]
    solution = Neumann(rtol=0.0, max_steps=terms, damping=damping).solve(matrix_operator(a, tally), b)
    power = b.clone()
    expected = torch.zeros_like(b)
    for _ in range(terms):
        expected = expected + damping * power
        power = power - damping * (a @ power.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(solution.value, expected, rtol=1e-10, atol=1e-12)
    assert tally[0] == 4 * (terms - 1)
    assert solution.report.status.eq(Status.MAX_STEPS).all()
    assert solution.report.steps.eq(terms).all()


def test_truncated_series_from_a_start() -> None:
    a, b = system(0.9)
    start = torch.ones_like(b)
    solution = Neumann(rtol=0.0, max_steps=1).solve(matrix_operator(a), b, start)
    torch.testing.assert_close(solution.value, start + b - (a @ start.unsqueeze(-1)).squeeze(-1))


def test_truncated_series_from_the_solution() -> None:
    a, b = system(0.9)
    start = torch.zeros_like(b)
    start[0] = torch.linalg.solve(a[0], b[0])
    b[0] = (a[:1] @ start[:1].unsqueeze(-1)).flatten()
    solution = Neumann(rtol=0.0, max_steps=6).solve(matrix_operator(a), b, start)
    torch.testing.assert_close(solution.value[0], start[0])
    other = Neumann(rtol=0.0, max_steps=6).solve(matrix_operator(a), b)
    assert solution.value[1:].equal(other.value[1:])


def test_truncated_series_keeps_bad_samples_apart() -> None:
    a, b = system(0.9)
    clean = Neumann(rtol=0.0, max_steps=4).solve(matrix_operator(a), b)
    b[1, 0] = torch.nan
    a = a.clone()
    a[2, 0, 0] = torch.nan
    solution = Neumann(rtol=0.0, max_steps=4).solve(matrix_operator(a), b)
    assert solution.value[[0, 3]].equal(clean.value[[0, 3]])
    assert solution.report.status[1:3].eq(Status.NONFINITE).all()
    assert solution.value[1].isnan().all()
    assert solution.value[2].isfinite().all()


def test_divergence_gives_the_best_iterate() -> None:
    a, b = system(3.0)
    solution = Neumann(max_steps=60).solve(matrix_operator(a), b)
    assert solution.report.status.eq(Status.MAX_STEPS).all()
    true = residuals(a, b, solution.value) / b.norm(dim=-1)
    torch.testing.assert_close(solution.report.residual, true)
    assert (true <= 1).all()


def test_overflow_gives_the_best_iterate() -> None:
    a, b = system(100.0)
    solution = Neumann(max_steps=1000).solve(matrix_operator(a), b)
    assert solution.report.status.eq(Status.NONFINITE).all()
    assert (residuals(a, b, solution.value) <= b.norm(dim=-1)).all()


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_all_goes_well_in_the_memory_of_a_loop(damping: float) -> None:
    """While a product is taken, the right-hand side and its argument are the only vectors; every product is a term."""
    (a, b), held = system(0.8), []

    def product(v: torch.Tensor) -> torch.Tensor:
        vectors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == b.shape]
        held.append(len({t.data_ptr() for t in vectors}))
        return (a @ v.unsqueeze(-1)).squeeze(-1)

    operator = LinearOperator(product=product, batch=4, dim=10, dtype=b.dtype, device=b.device)
    solution = Neumann(rtol=1e-9, damping=damping).solve(operator, b)
    assert max(held) <= 2
    assert solution.report.evaluations == len(held) == int(solution.report.steps.max())
    assert solution.report.converged.all()
    true = residuals(a, b, solution.value) / b.norm(dim=-1)
    torch.testing.assert_close(solution.report.residual, true, rtol=1e-3, atol=1e-15)
    torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-9)


def test_residuals_that_grow_on_the_way() -> None:
    """A series that converges, with a Jacobian that is not normal: its residuals rise before they fall."""
    j = torch.eye(6, dtype=torch.float64).roll(1, 1).triu() * 5 + 0.3 * torch.eye(6, dtype=torch.float64)
    a, b = torch.eye(6, dtype=torch.float64) - j.expand(3, 6, 6), torch.randn(3, 6, dtype=torch.float64)
    b[1] = 0.0
    tally = [0]
    solution = Neumann(rtol=1e-10).solve(matrix_operator(a, tally, restrict=None), b)
    assert solution.report.converged.all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)
    assert solution.report.evaluations == tally[0] / 3


def test_the_budget_is_that_of_all_steps() -> None:
    a, b = system(0.9)
    solution = Neumann(rtol=1e-12, max_steps=7).solve(matrix_operator(a, restrict=None), b)
    assert solution.report.status.eq(Status.MAX_STEPS).all()
    assert solution.report.steps.eq(7).all()
    torch.testing.assert_close(solution.report.residual, residuals(a, b, solution.value) / b.norm(dim=-1))


def test_the_right_hand_side_is_not_given_away() -> None:
    b = torch.ones(2, 3, dtype=torch.float64)
    solution = Neumann().solve(matrix_operator(torch.eye(3, dtype=torch.float64).expand(2, 3, 3), restrict=None), b)
    assert solution.value.data_ptr() != b.data_ptr()
    assert torch.equal(solution.value, b)


def test_damping_is_validated() -> None:
    with pytest.raises(ValueError, match="damping"):
        Neumann(damping=0.0)
