"""Backpropagation through the iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from torchimplicit.captured import Passes
from torchimplicit.closure import is_vmapped
from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients.base import FlatSolution, Gradient, SolveTask, differentiable, owned, refuse_detached
from torchimplicit.gradients.figures import reported
from torchimplicit.gradients.start import Start
from torchimplicit.solvers import Solver


@final
@dataclass(frozen=True, kw_only=True)
class Unrolled(Gradient):
    """Backpropagation through every step of the solver. Memory grows with the steps.

    Exact for the iterate that was reached, to any order, and with respect to ``z0`` as well. Not available under
    ``torch.func.vmap``, where the number of steps would depend on the data. ``solution.adjoint`` has the figures of the
    forward pass, whose steps the backward pass repeats in reverse.
    """

    def passes(self, solver: Solver) -> Passes:
        return Passes(solver=solver, refusal="Unrolled needs the steps that the eager loop takes")

    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        from_start = differentiable((task.start.z,))
        if not (task.direct or from_start or differentiable(params)):
            return task.solve(params)
        if any(map(is_vmapped, (task.start.z, *params))):
            raise UnsupportedDerivativeError(
                "Unrolled cannot run under torch.func.vmap, where the number of steps would depend on the data: use "
                "Implicit() or UnrolledPhantom()"
            )
        solution = through_steps(task, task.start, params)
        report = task.results[-1].report
        # Two evaluations cost no product: the last one, which only judges the result (unless the number of steps was
        # prescribed), and the first one, if z0 is a constant.
        judging = 1 if task.solver.steps is None else 0
        products = max(0.0, report.evaluations - judging - (0 if from_start else 1))
        return solution._replace(z=reported(solution.z, task.linear.record, replace(report, evaluations=products)))

    def recorded(self, solver: Solver) -> int | None:
        return solver.steps


def through_steps(task: SolveTask, start: Start, params: Sequence[Tensor]) -> FlatSolution:
    """Run the solver with autograd recording its steps."""
    outcome = task.run(task.system, start, params)
    task.results.append(outcome)
    report = outcome.report
    if outcome.z.requires_grad and task.solver.steps is None:  # prescribed steps behave as a loop written by hand
        refuse_detached(task, outcome.z, params)
    return FlatSolution(owned(task, outcome.z), report.status, report.steps, report.residual)
