"""The shipped suites, with ``compile=True``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchimplicit import Anderson, FixedPointIteration
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import SolverSuite

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::torchimplicit.errors.CaptureWarning")]


def _turn(dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dim)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q


TURNS = {dim: _turn(dim) for dim in (1, 8, 16, 24, 40)}


class _Compiled(SolverSuite):
    compile = True

    def function(self, z: torch.Tensor, x: torch.Tensor, difficulty: torch.Tensor) -> torch.Tensor:
        # as the suite's, but for the matrix, which it draws in every evaluation
        return difficulty[..., None] * torch.tanh(z @ TURNS[x.shape[-1]].to(z)) + x

    def test_asking_less_often_gives_the_same(self) -> None:  # the host does not ask at all
        pass


class TestCompiledAnderson(_Compiled):
    def make(self, **options: Any) -> Solver:
        return Anderson(**options)


class TestCompiledIteration(_Compiled):
    def make(self, **options: Any) -> Solver:
        return FixedPointIteration(**options)
