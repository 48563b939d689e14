"""Newton's method with a Krylov solver inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.linear import Dense, LinearSolver
from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.line_search import evaluate_some, rows_apart
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_type

SMALL = 32
"""Up to so many unknowns per sample, the Newton equation is solved by factorizing the matrix."""


@final
@dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """Newton's method: solve :math:`A s = r` by products with the Jacobian, then search along :math:`s`.

    The step is halved, per sample, until the residual decreases by the Armijo-like test of Kelley (1995, section 8.2);
    a sample that finds no decrease in ``halvings`` trials breaks down. Products with the Jacobian are exact, by
    automatic differentiation. They are not counted in ``solution.evaluations``; the evaluations of the search are.

    Args:
        linear_solver: for the Newton equation; ``None``: :class:`Dense` up to 32 unknowns, else the problem's default,
            which solves it as accurately as an adjoint system: tight enough for quadratic convergence.
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
        batch, dim = point.z.shape
        # Krylov methods stagnate on badly scaled systems; where the matrix is small, factorizing it does not
        default = Dense() if dim <= SMALL else system.default_linear_solver(dim, batch)
        solver = self.linear_solver or default
        residual = point.residual
        if progress.active is not None:
            # a sample that is done asks for no step, and must not keep the linear solver busy
            residual = torch.where(progress.active[:, None], residual, 0)
        tape = system.linearize(point.z, evaluate.params)
        direction = system.solve_linear(tape, False, residual, solver).value
        return self._search(evaluate, point, direction, progress.active)

    def _search(self, evaluate: Evaluator, point: Point, direction: Tensor, active: Tensor | None) -> Move:
        norm = row_norm(point.residual)
        size = torch.ones_like(norm)
        searching = torch.ones_like(norm, dtype=torch.bool) if active is None else active
        reached, rows = point, None
        for _ in range(self.halvings + 1):
            to = point.z + size[:, None].to(point.z.dtype) * direction
            trial = evaluate_some(evaluate, to, searching, rows, reached)
            accepted = searching & (row_norm(trial.residual) <= (1 - 1e-4 * size) * norm)
            reached = trial.select(accepted, reached)
            searching = searching & ~accepted
            left = int(searching.sum())
            if not left:
                return Move(reached)
            rows = rows_apart(evaluate, searching, left)
            size = 0.5 * size
        # a sample that met nothing but NaN and infinity is shown them, so that it counts as non-finite
        return Move(trial.select(searching & ~torch.isfinite(row_norm(trial.residual)), reached), breakdown=searching)
