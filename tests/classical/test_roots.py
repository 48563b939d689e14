"""The defaults on classical systems of equations, from their standard starts and from far away."""

from __future__ import annotations

import statistics
import warnings

import pytest
import torch

import torchimplicit as ti
from tests.classical.roots import LARGE, ROOTS

SOLVED = 1e-6


def found(name: str, times: float) -> tuple[ti.Solution, float]:
    f, start = ROOTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        solution = ti.solve(ti.Root(f, batched=False), times * start, throw=False)
    return solution, float(f(solution.value).norm())


def names(times: float) -> list[str]:
    return [name for name, (_, z) in ROOTS.items() if times == 1 or (len(z) < LARGE and bool(z.any()))]


@pytest.mark.parametrize("name", list(ROOTS))
def test_every_system_is_solved_from_its_standard_start(name):
    solution, size = found(name, 1)
    assert solution.converged, solution.summary()
    assert size <= SOLVED


@pytest.mark.parametrize(("times", "least"), [(10, 24), (100, 22)])
def test_from_far_away(times, least):
    assert len(names(times)) == 27
    solved, evaluations = 0, []
    for name in names(times):
        solution, size = found(name, times)
        assert not solution.converged or size <= 1e-4, (name, size, solution.summary())
        if size <= SOLVED:
            solved += 1
            evaluations.append(float(solution.evaluations))
    assert solved >= least
    assert statistics.median(evaluations) <= 40  # MINPACK's hybrd: 62 and 75


@pytest.mark.parametrize("name", ["freudenstein and roth", "powell badly scaled", "rosenbrock 10"])
def test_the_derivative_of_what_a_later_member_finds(name):
    f, start = ROOTS[name]
    shift = torch.zeros_like(start, requires_grad=True)
    solution = ti.solve(ti.Root(lambda z, s: f(z) - s, batched=False), start, shift)
    assert len(solution.turns) > 1
    weight = torch.linspace(1, 2, len(start), dtype=start.dtype)
    (grad,) = torch.autograd.grad((weight * solution.value).sum(), shift)
    jacobian = torch.func.jacrev(f)(solution.value.detach())
    torch.testing.assert_close(grad, torch.linalg.solve(jacobian.mT, weight), rtol=1e-6, atol=1e-9)
