"""Plain and damped iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch

from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.validation import check_fraction


@final
@dataclass(frozen=True, kw_only=True)
class FixedPointIteration(Solver):
    """Iterate :math:`z \\leftarrow (1-\\lambda) z + \\lambda f(z)` (Picard; Krasnoselskij for :math:`\\lambda<1`).

    Converges where the damped map contracts. On a root the step is :math:`-\\lambda f(z)`; on a minimum it is a
    gradient step of size :math:`\\lambda`.

    Args:
        damping: :math:`\\lambda` in (0, 1].
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
    """

    damping: float = 1.0
    max_steps: int = 200

    def check(self) -> None:
        check_fraction(self, "damping")

    @property
    def straight(self) -> bool:
        return self.damping == 1.0

    def start(self, point: Point) -> Any:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: Any, progress: Progress) -> Move:
        if self.damping == 1.0 and point.image is not None:
            return Move(point.image)  # z + (f(z) - z) would round, and cost a vector
        return Move(torch.add(point.z, point.residual, alpha=self.damping))
