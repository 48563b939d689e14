"""Gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch

from torchimplicit.problems import Point, System
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.problems.projected import ProjectedSystem
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.validation import check_nonnegative, check_positive


@final
@dataclass(frozen=True, kw_only=True)
class GradientDescent(Solver):
    """Gradient descent with heavy-ball momentum (Polyak 1964), projected where the minimum is constrained.

    :math:`v \\leftarrow m v - P\\nabla E`, :math:`z \\leftarrow z + \\eta v`.

    Args:
        step_size: :math:`\\eta`.
        momentum: :math:`m` in [0, 1).
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
    """

    step_size: float = 1e-2
    momentum: float = 0.9
    max_steps: int = 5000

    def check(self) -> None:
        check_positive(self, "step_size")
        check_nonnegative(self, "momentum")
        if self.momentum >= 1:
            raise ValueError(f"GradientDescent.momentum is {self.momentum}, and must lie in [0, 1)")

    def supports(self, system: System) -> None:
        only_minimum(self, system)

    def start(self, point: Point) -> Any:
        return torch.zeros_like(point.z)

    def step(self, evaluate: Evaluator, point: Point, state: Any, progress: Progress) -> Move:
        velocity = torch.add(point.residual, state, alpha=self.momentum)
        return Move(torch.add(point.z, velocity, alpha=self.step_size), velocity)


def only_minimum(solver: Solver, system: System) -> None:
    """Raise ``ValueError`` unless ``system`` is a minimum that ``solver``, which needs an energy, can handle."""
    if isinstance(system, MinimumSystem):
        return
    if isinstance(system, ProjectedSystem):
        raise ValueError(
            f"{type(solver).__name__} handles no constraint but a single LinearEquality: take ProjectedNewton for this "
            "one"
        )
    raise ValueError(
        f"{type(solver).__name__} needs an energy, and only Minimum has one: for FixedPoint take Anderson, Broyden or "
        "FixedPointIteration; for Root take NewtonKrylov or Broyden"
    )
