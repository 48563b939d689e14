"""The solver for a solution that the caller brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver


@final
@dataclass(frozen=True, kw_only=True)
class Given(Solver):
    """Tests the start and takes no step; a start that misses the tolerance breaks down. For
    :func:`~torchimplicit.attach`."""

    max_steps: int = 1

    def start(self, point: Point) -> None:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: None, progress: Progress) -> Move:
        return Move(point, breakdown=torch.ones(len(point.z), dtype=torch.bool, device=point.z.device))

    def fell_short(self, summary: str) -> str:
        return (
            f"what attach was given does not solve the problem to the tolerance: {summary}. Solve it further, or give "
            "attach the rtol or atol that it was solved to; the derivative taken here is as inexact as the solution"
        )
