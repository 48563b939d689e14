"""The one-step (Jacobian-free) gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchimplicit.captured import Adjoint, Continuation, Passes
from torchimplicit.closure import is_transformed
from torchimplicit.gradients.base import FlatSolution, SolveTask, differentiable, run_by
from torchimplicit.gradients.continued import Continued
from torchimplicit.gradients.figures import reported, truncated
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.gradients.start import Start
from torchimplicit.gradients.unrolled import through_steps
from torchimplicit.gradients.unrolled_phantom import UnrolledPhantom
from torchimplicit.linear import LinearSolution
from torchimplicit.problems import System
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solution import Status
from torchimplicit.solvers import FixedPointIteration, Solver, SolverResult


@final
@dataclass(frozen=True, kw_only=True)
class OneStep(LinearEstimate):
    """The one-step gradient, with the identity in place of the inverse: :math:`\\bar\\theta = f_\\theta^T u` (Fung et
    al. 2022, JFB; Bolte et al. 2023).

    It takes one backward pass through ``f``, and is an ascent direction where the map contracts strongly enough. After
    a prescribed number of steps (``FixedPointIteration(steps=n)``) it is the derivative of the last step, to every
    order, where the state before that step is a constant: as in a loop of which autograd records only the last turn,
    and without a further evaluation. After other solvers, and after zero steps, it is taken at the value.
    """

    def recorded(self, solver: Solver) -> int | None:
        return 1 if isinstance(solver, FixedPointIteration) and solver.steps else None

    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        if task.direct and task.solver.steps == 0:  # no step has been recorded: the derivative of one at the start
            solution = task.solve(params)
            z = _Moved.apply(solution.z, -task.system.residual(solution.z, *params))
            return solution._replace(z=reported(z, task.linear.record, truncated(solution.z, 0, 0.0)))
        if self.recorded(task.solver) is None:
            return super().attach(task, params)
        if task.linear.capture is not None and task.linear.capture.goes_on:
            return self._compiled(task, params)
        if task.direct or not differentiable(params):
            solution = through_steps(task, task.start.fixed(), params)
            return solution._replace(z=reported(solution.z, task.linear.record, truncated(solution.z.detach(), 0, 0.0)))
        return self._after_a_node(task, params)

    def passes(self, solver: Solver) -> Passes:
        if self.recorded(solver) is None:
            return Passes(solver=solver, estimate=Adjoint.estimate(0))
        assert isinstance(solver, FixedPointIteration)
        assert solver.steps
        if not torch.is_grad_enabled():
            return Passes(solver=solver)
        return Passes(solver=solver.given(solver.steps - 1), continuation=Continuation(1, solver.damping))

    @staticmethod
    def _compiled(task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        """Solve by compiled code, in two parts: the steps before the last one, and the last one."""
        solver, capture = task.solver, task.linear.capture
        assert isinstance(solver, FixedPointIteration)
        assert solver.steps
        assert capture is not None
        before = solver.given(solver.steps - 1)

        def run(system: System, start: Start, params: Sequence[Tensor]) -> SolverResult:
            return capture.solve(before, system, start.z, params) or run_by(before)(system, start, params)

        solution = replace(task, run=run).solve(params)
        z, (norm, parts) = Continued.apply(task, Continuation(1, solver.damping), solution.z, *params)
        task.spent(1)
        outcome = task.results[-1]
        status = torch.where(z.detach().isfinite().all(dim=1), int(Status.STEPS_TAKEN), int(Status.NONFINITE))
        residual = parts if parts.ndim == 1 else parts.amax(dim=1)
        report = replace(outcome.report, status=status, steps=solution.steps + 1, residual=residual)
        task.results[-1] = replace(outcome, report=report, norm=norm, parts=parts)
        z = reported(z, task.linear.record, truncated(z.detach(), 0, 0.0))
        return FlatSolution(z, status, report.steps, residual)

    @staticmethod
    def _after_a_node(task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        """Solve under a transform: the steps before the last one are hidden from it inside a node."""
        solver = task.solver
        assert isinstance(solver, FixedPointIteration)
        assert solver.steps
        before = solver.given(solver.steps - 1)
        task = replace(task, run=run_by(before, recorded=1))
        solution = UnrolledPhantom(steps=1, damping=solver.damping).attach(task, params)
        outcome = task.results[-1]
        if not is_transformed(solution.z):
            outcome = replace(outcome, z=solution.z.detach())
            if outcome.trajectory:
                last = outcome.z if solver.keeps(solver.steps) else None
                outcome = replace(outcome, trajectory=(*outcome.trajectory, last))
            task.results[-1] = outcome
        return solution._replace(steps=solution.steps + 1)

    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        return LinearSolution(b, truncated(b, 0, 0.0))


class _Moved(Function):
    """``(z, image) -> z`` with the derivative of ``image``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, image: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[None, Tensor]:
        return None, u

    @staticmethod
    def jvp(ctx: Any, _: Any, moved: Tensor) -> Tensor:
        return moved
