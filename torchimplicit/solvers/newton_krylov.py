"""Newton's method with a Krylov solver inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.linear import LinearSolver
from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_type


@final
@dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """Newton's method: solve :math:`A s = r` by products with the Jacobian, then search along :math:`s`.

    The step is halved, per sample, until the residual decreases by the Armijo-like test of Kelley (1995, section 8.2);
    a sample that finds no decrease in ``halvings`` trials breaks down. Products with the Jacobian are exact, by
    automatic differentiation. They are not counted in ``solution.evaluations``; the evaluations of the search are.

    Args:
        linear_solver: for the Newton equation; ``None``: the problem's default, solved to a relative 1e-2 of the
            tolerance that the adjoint would have, tight enough for quadratic convergence.
        halvings: the most times that a step is halved.
        rtol, atol, max_steps, keep_trajectory, check_every: see :class:`Solver`.
    """

    linear_solver: LinearSolver | None = None
    halvings: int = 12
    max_steps: int = 50

    def check(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)
        check_count(self, "halvings", least=0)

    def start(self, point: Point) -> Any:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: Any, progress: Progress) -> Move:
        if torch.is_grad_enabled():
            raise UnsupportedDerivativeError(
                "Unrolled cannot differentiate through NewtonKrylov's inner linear solves: use Implicit, or unroll "
                "Anderson, Broyden or FixedPointIteration"
            )
        system = evaluate.system
        solver = self.linear_solver or system.default_linear_solver(point.z.shape[1], point.z.shape[0])
        tape = system.linearize(point.z, evaluate.params)
        direction = system.solve_linear(tape, False, point.residual, solver).value
        return self._search(evaluate, point, direction, progress.active)

    def _search(self, evaluate: Evaluator, point: Point, direction: Tensor, active: Tensor | None) -> Move:
        norm = row_norm(point.residual)
        size = torch.ones_like(norm)
        trial = evaluate(evaluate.place(point.z + direction))
        for halving in range(self.halvings + 1):
            accepted = row_norm(trial.residual) <= (1 - 1e-4 * size) * norm
            if active is not None:
                accepted = accepted | ~active
            if bool(accepted.all()):
                return Move(trial)
            if halving == self.halvings:
                break
            size = torch.where(accepted, size, 0.5 * size)
            shorter = point.z + size[:, None].to(point.z.dtype) * direction
            trial = evaluate(evaluate.place(torch.where(accepted[:, None], trial.z, shorter)))
        return Move(trial.select(accepted, point), breakdown=~accepted)
