"""The reversible iteration; tests/gradients/test_reversible.py inverts its steps."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import torchimplicit as ti
from torchimplicit.solvers import Solver
from torchimplicit.testing import SolverSuite


class TestReversibleIteration(SolverSuite):
    per_step: ClassVar = 2

    def make(self, **options: Any) -> Solver:
        return ti.ReversibleIteration(**options)


class TestOverRelaxed(TestReversibleIteration):
    def make(self, **options: Any) -> Solver:
        return ti.ReversibleIteration(**{"damping": 1.05, **options})


@pytest.mark.parametrize("damping", [0.5, 0.8, 1.2])
def test_is_the_hand_written_loop(damping):
    y = z = z0 = torch.full((2, 3), 0.1, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    iterates = [z]
    for _ in range(7):
        y = (1 - damping) * y + damping * torch.cos(z + x)
        z = (1 - damping) * z + damping * torch.cos(y + x)
        iterates.append(z)
    solver = ti.ReversibleIteration(damping=damping, steps=7, keep_trajectory=True)
    solution = ti.solve(ti.FixedPoint(lambda z, x: torch.cos(z + x)), z0, x, solver=solver)
    for ours, theirs in zip(solution.trajectory, iterates, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert solution.evaluations == 14


@pytest.mark.parametrize("damping", [1.0, 0.0, 2.0, -0.5])
def test_a_damping_without_an_inverse(damping):
    with pytest.raises(ValueError, match=r"ReversibleIteration\.damping is"):
        ti.ReversibleIteration(damping=damping)


def test_other_problems_are_refused():
    with pytest.raises(ValueError, match="FixedPoint"):
        ti.solve(ti.Root(torch.cos), torch.ones(1, 1), solver=ti.ReversibleIteration())


def test_how_often_a_pair_is_remembered():
    double, single = (torch.float64, torch.float64), (torch.float64, torch.float32)
    assert [ti.ReversibleIteration().span(*dtypes) for dtypes in (double, single)] == [9, 6]
    assert [ti.ReversibleIteration(damping=0.8).span(*dtypes) for dtypes in (double, single)] == [4, 2]
    assert ti.ReversibleIteration(damping=0.999).span(*double) == 1
    assert ti.ReversibleIteration(keep_every=3).span(*double) == 3
