"""The phantom gradient by a truncated Neumann series."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from torchimplicit.captured import Adjoint, Passes
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import LinearSolution, Neumann
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solution import Status
from torchimplicit.solvers import Solver
from torchimplicit.validation import check_count, check_fraction


@final
@dataclass(frozen=True, kw_only=True)
class NeumannPhantom(LinearEstimate):
    """The Neumann-series phantom gradient (NPG; Geng et al. 2021, eq. 17): :math:`\\lambda\\sum_{i<k} B^i` in place of
    :math:`(I-J)^{-1}`, with :math:`B = \\lambda J + (1-\\lambda) I` at the solution.

    Memory does not grow with ``steps``. Reverse and forward mode, first order.

    Args:
        steps: k, the number of terms.
        damping: :math:`\\lambda` in (0, 1].

    Raises:
        ValueError: a number is out of range.
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_count(self, "steps")
        check_fraction(self, "damping")

    def passes(self, solver: Solver) -> Passes:
        return Passes(solver=solver, estimate=Adjoint.estimate(self.steps, self.damping))

    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        series = Neumann(damping=self.damping, max_steps=self.steps, rtol=0.0)
        solution = task.system.solve_linear(tape, transposed, b, series)
        status = solution.report.status
        status = status.masked_fill(status == Status.MAX_STEPS, int(Status.STEPS_TAKEN))  # as many as were asked for
        return replace(solution, report=replace(solution.report, status=status))
