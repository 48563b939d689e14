"""The base class of the iterative linear solvers: their options and the call of the loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchimplicit.linear.base import BlockSolver, LinearSolution, LinearSolver, least_curvature, solve_each
from torchimplicit.linear.cycle import Method
from torchimplicit.linear.joined import OfRows
from torchimplicit.linear.loop import run
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.options import check_block, check_vectors
from torchimplicit.linear.preconditioners import Preconditioner, as_preconditioner
from torchimplicit.linear.series import Begun
from torchimplicit.precision import default_rtol
from torchimplicit.solution import Report
from torchimplicit.validation import check_count, check_nonnegative


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(BlockSolver):
    """A solver that takes steps until :math:`\\lVert b - Ay\\rVert_2 \\le atol + rtol\\,\\lVert b\\rVert_2`.

    Attributes:
        rtol: relative tolerance of each sample; ``None`` stands for ``eps(dtype)**(2/3)``.
        atol: absolute tolerance of each sample.
        max_steps: the most steps that a sample may take.
        preconditioner: an approximation of the operator with a cheap inverse, or a plain function
            :math:`v \\mapsto M^{-1}v`.
        check_every: the residuals are tested once every so many steps. Each test waits for the device; on a GPU with
            cheap products, testing less often saves time and may cost a few steps at the end.

    Raises:
        ValueError: a number is out of range.
        TypeError: ``preconditioner`` is neither a preconditioner nor callable.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 200
    preconditioner: Preconditioner | Callable[[Tensor], Tensor] | None = None
    check_every: int = 1

    def __post_init__(self) -> None:
        check_nonnegative(self, "rtol", optional=True)
        check_nonnegative(self, "atol")
        check_count(self, "max_steps")
        check_count(self, "check_every")
        as_preconditioner(self.preconditioner)

    def init(self) -> LinearSolver:
        preconditioner = as_preconditioner(self.preconditioner)
        return self if preconditioner is None else replace(self, preconditioner=preconditioner.init())

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        return default_rtol(dtype) if self.rtol is None else self.rtol, self.atol

    @property
    def confirms(self) -> bool:
        return True

    @property
    def preconditioned(self) -> bool:
        return self.preconditioner is not None

    def joined(self, operator: LinearOperator, joined: LinearOperator) -> LinearSolver:
        each = as_preconditioner(self.preconditioner)
        return self if each is None else replace(self, preconditioner=OfRows(each, operator))

    @abstractmethod
    def method(self, operator: LinearOperator) -> Method:
        """The steps for ``operator``; raises ``ValueError`` where the operator lacks what they need."""

    def _begin(self, operator: LinearOperator, b: Tensor) -> LinearSolution | Begun | None:
        """Try a leaner loop of the method's own, from zero: returns the solution, or where the common loop is to go on,
        or ``None`` to leave everything to that."""
        return None

    @torch.no_grad()
    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """Solve for ``b`` (``[batch, dim]``), starting from ``x0`` or zero. Records no gradients.

        Raises:
            ValueError: ``b`` or ``x0`` does not fit the operator, or the operator lacks what the method needs.
        """
        check_vectors(operator, b, x0)
        preconditioner = as_preconditioner(self.preconditioner)
        rtol, atol = self.tolerances(b.dtype)
        begun = None if x0 is not None or preconditioner is not None else self._begin(operator, b)
        if isinstance(begun, LinearSolution):
            return begun
        solution = run(
            self.method(operator),
            operator,
            b,
            x0 if begun is None else begun.value,
            rtol=rtol,
            atol=atol,
            max_steps=self.max_steps,
            check_every=self.check_every,
            preconditioner=preconditioner,
        )
        if begun is not None:
            report = solution.report
            steps, evaluations = (report.steps + begun.steps).clamp(max=self.max_steps), report.evaluations
            solution = replace(solution, report=replace(report, steps=steps, evaluations=evaluations + begun.products))
        if preconditioner is not None:
            preconditioner.after_solve(solution.report.steps)
        return solution

    @torch.no_grad()
    def solve_block(self, operator: LinearOperator, b: Tensor) -> LinearSolution:
        """Solve for a block with its products taken together; with a preconditioner, one right-hand side at a time."""
        check_block(operator, b)
        if self.preconditioned:  # it may hold one matrix per sample, and cannot be applied to copies
            return solve_each(self, operator, b)
        copies, batch, _ = b.shape
        solution = self.solve(operator.repeated(copies), b.reshape(-1, operator.dim))
        report = solution.report
        figures = Report(
            report.status.reshape(copies, batch).amax(0),
            report.steps.reshape(copies, batch).amax(0),
            report.residual.reshape(copies, batch).amax(0),
            copies * report.evaluations,
            curvature=None
            if report.curvature is None
            else least_curvature(report.curvature.reshape(copies, batch).unbind()),
            condition=None if report.condition is None else report.condition.reshape(copies, batch).amax(0),
        )
        return LinearSolution(solution.value.reshape(b.shape), figures, solution.strayed)
