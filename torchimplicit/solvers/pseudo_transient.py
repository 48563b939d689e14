"""Pseudo-transient continuation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear import LinearSolver
from torchimplicit.precision import working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.line_search import evaluate_some
from torchimplicit.solvers.newton_model import assembles, meets, only_maps, solved_dense
from torchimplicit.state import row_norm
from torchimplicit.validation import check_positive, check_type


class PseudoTransientState(NamedTuple):
    """The length of the next time step, ``[batch]``, negative where time runs backwards."""

    time: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class PseudoTransient(Solver):
    """Pseudo-transient continuation: :math:`(\\delta^{-1}I+A)s=r`, implicit Euler steps of :math:`\\dot z=-R(z)`.

    The time steps grow as the residual falls (switched evolution relaxation; Kelley and Keyes 1998), so the method ends
    as Newton's. It need not lower the residual's norm in every step, and so is not trapped where that norm has a local
    minimum. Time runs in the direction in which the residual falls at first. Products with the Jacobian are not counted
    in ``solution.evaluations``.

    Args:
        linear_solver: for the equation of a step; ``None``: the matrix is assembled up to 128 unknowns, else the
            problem's default.
        step_size: the first time step, as a multiple of :math:`\\lVert r\\rVert/\\lVert Ar\\rVert` at the start; a
            large one makes it Newton's method without a safeguard.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
        TypeError: ``linear_solver`` is not a linear solver.
    """

    linear_solver: LinearSolver | None = None
    step_size: float = 1.0
    max_steps: int = 200
    by_products: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    not_unrolled: ClassVar[str | None] = "use Implicit, or unroll Anderson, Broyden or FixedPointIteration"

    def check(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)
        check_positive(self, "step_size")

    def supports(self, system: System) -> None:
        only_maps(self, system)

    def start(self, point: Point) -> Any:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: PseudoTransientState | None, progress: Progress) -> Move:
        system, z, residual, active = evaluate.system, point.z, point.residual, progress.active
        if active is not None:
            residual = torch.where(active[:, None], residual, 0)
        norm = row_norm(residual)
        tape = system.linearize(z, evaluate.params)
        operator = system.operator(tape, False)
        if state is None:
            image = operator.product(residual)
            time = norm / row_norm(image)
            time = torch.where(torch.isfinite(time) & (time > 0), self.step_size * time, 1)
            state = PseudoTransientState(torch.where((residual * image).sum(dim=1) < 0, -time, time))
        shift = 1 / state.time
        if self.linear_solver is None and assembles(z):
            dtype = working_dtype(z.dtype)
            matrix = operator.dense().to(dtype)
            matrix.diagonal(dim1=1, dim2=2).add_(shift.to(dtype)[:, None])
            step, exact = solved_dense(matrix, residual.to(dtype), torch.ones_like(z, dtype=dtype))
            step = step.to(z.dtype)
        else:
            solver = self.linear_solver or system.default_linear_solver(z.shape[1], z.shape[0])
            solution = system.solve_linear(tape, False, residual, solver, lambda _: shift)
            step, exact = solution.value, solution.report.converged
        # late in the solve the shift vanishes: the step is Newton's where it solves the equation without the shift
        exact = exact & meets(residual, residual - shift[:, None] * step)
        solved = progress.short(point, step, exact)
        moving = torch.ones_like(exact) if active is None else active
        if solved is not None:
            moving = moving & ~solved
        reached = evaluate_some(evaluate, z + step, moving, None, point)
        progress.refuse(~exact)
        # by a factor of ten at most, either way
        ratio = (norm / row_norm(reached.residual)).nan_to_num(0.1, 10, 0.1).clamp(0.1, 10)
        time = torch.where(moving, state.time * ratio, state.time)
        return Move(reached, PseudoTransientState(time), solved=solved)
