"""Newton's method with a Krylov solver inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from torchimplicit.linear import Dense, LinearSolver
from torchimplicit.problems import Point, System
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.descent import Descent, downhill, leave, modified
from torchimplicit.solvers.line_search import evaluate_some, rows_apart, search, showing_nonfinite
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_type

SMALL = 32
"""The Newton equation is solved by factorizing the matrix up to this many unknowns per sample."""


@final
@dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """Newton's method: solve :math:`A s = r` by products with the Jacobian, then search along :math:`s`.

    For a map, the step is halved, per sample, until the residual decreases by the Armijo-like test of Kelley (1995,
    section 8.2); a sample that finds no decrease in ``halvings`` trials breaks down.

    For a :class:`Minimum`, it descends on the energy, by the line search of :class:`LBFGS` with as many trials. Where
    the Hessian is factorized, the modulus of its eigenvalues is taken, so that every step descends; a stationary point
    with a negative eigenvalue, which is not a minimum, is left along its eigenvector (``Status.SADDLE`` where that
    fails). Elsewhere a step that does not descend, or whose linear solver met negative curvature, is replaced by the
    iterate of conjugate gradients before they meet it (Nocedal and Wright 2006, algorithm 7.1).

    Products with the Jacobian are exact, by automatic differentiation. They are not counted in
    ``solution.evaluations``; the evaluations of the search are.

    Args:
        linear_solver: for the Newton equation; ``None``: :class:`Dense` up to 32 unknowns, else the problem's default,
            which solves it as accurately as an adjoint system: tight enough for quadratic convergence.
        halvings: the most times that a step is halved.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
        TypeError: ``linear_solver`` is not a linear solver.
    """

    linear_solver: LinearSolver | None = None
    halvings: int = 12
    max_steps: int = 50
    mixes_parts: ClassVar[bool] = True
    by_products: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    not_unrolled: ClassVar[str | None] = "use Implicit, or unroll Anderson, Broyden or FixedPointIteration"

    def check(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)
        check_count(self, "halvings", least=0)

    def confirms(self, system: System, z: Tensor) -> bool:
        return isinstance(system, MinimumSystem) and isinstance(self._linear(system, z), Dense)

    def start(self, point: Point) -> Any:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: Any, progress: Progress) -> Move:
        system = evaluate.system
        solver = self._linear(system, point.z)
        residual = point.residual
        if progress.active is not None:
            # a sample that is done needs no step, and must not keep the linear solver busy
            residual = torch.where(progress.active[:, None], residual, 0)
        tape = system.linearize(point.z, evaluate.params)
        if isinstance(system, MinimumSystem) and isinstance(solver, Dense):
            return self._descend(evaluate, point, modified(system.operator(tape, False), residual), progress)
        newton = system.solve_linear(tape, False, residual, solver)
        if isinstance(system, MinimumSystem):
            return self._descend(evaluate, point, downhill(system.operator(tape, False), residual, newton), progress)
        return self._search(evaluate, point, newton.value, newton.report.converged, progress)

    def _linear(self, system: System, z: Tensor) -> LinearSolver:
        if self.linear_solver is not None:
            return self.linear_solver
        batch, dim = z.shape
        # Krylov methods stagnate on badly scaled systems; where the matrix is small, factorizing it does not
        return Dense() if dim <= SMALL else system.default_linear_solver(dim, batch)

    def _search(self, evaluate: Evaluator, point: Point, direction: Tensor, exact: Tensor, progress: Progress) -> Move:
        """Halve the step along ``direction`` until the residual's norm decreases."""
        norm = row_norm(point.residual)
        size = torch.ones_like(norm)
        active = progress.active
        solved = progress.short(point, direction, exact)
        searching = torch.ones_like(norm, dtype=torch.bool) if active is None else active
        damped = ~exact
        reached, rows, trial = point, None, point
        if solved is not None:
            searching = searching & ~solved
        for _ in range(self.halvings + 1):
            to = point.z + size[:, None].to(point.z.dtype) * direction
            trial = evaluate_some(evaluate, to, searching, rows, reached)
            accepted = searching & (row_norm(trial.residual) <= (1 - 1e-4 * size) * norm)
            reached = trial.select(accepted, reached)
            searching = searching & ~accepted
            left = int(searching.sum())
            if not left:
                break
            damped = damped | searching
            rows = rows_apart(evaluate, searching, left)
            size = 0.5 * size
        progress.refuse(damped)
        if not left:
            return Move(reached, solved=solved)
        return Move(showing_nonfinite(trial, searching, reached), breakdown=searching, solved=solved)

    def _descend(self, evaluate: Evaluator, point: Point, descent: Descent, progress: Progress) -> Move:
        """Search along a descent direction of the energy, and leave saddles."""
        active, direction = progress.active, descent.direction
        solved = progress.short(point, direction, descent.exact)
        searching, saddle = active, None
        if solved is not None:
            searching = ~solved if active is None else active & ~solved
            if descent.negative is not None:
                saddle, solved = solved & descent.negative, solved & ~descent.negative
        searched = search(evaluate, point, direction, searching, self.halvings + 1)
        progress.refuse((searched.trials > 1) | ~descent.exact)
        failed = searched.failed
        to = searched.point
        if searched.any_failed:
            to = showing_nonfinite(searched.last, failed, to)
        if saddle is not None and descent.downward is not None and bool(saddle.any()):
            to, stays = leave(evaluate, point, to, descent.downward, saddle, self.halvings + 1)
            return Move(to, breakdown=failed | stays, solved=solved, saddle=stays)
        return Move(to, breakdown=failed, solved=solved)
