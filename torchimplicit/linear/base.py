"""The interface of the linear solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchimplicit.linear.operator import LinearOperator
from torchimplicit.precision import default_rtol
from torchimplicit.solution import Report


@dataclass(frozen=True)
class LinearSolution:
    """The solution of a batch of linear systems.

    Attributes:
        value: ``[batch, dim]``.
        report: the figures; ``report.evaluations`` counts products in whole-batch equivalents.
        strayed: whether the solve was abandoned because the true residuals are far from those of the recurrence, a sign
            that rows depend on each other.
    """

    value: Tensor
    report: Report
    strayed: bool = False


class LinearSolver(ABC):
    """Solves :math:`A_i y_i = b_i` for a batch of operators, every sample to its own tolerance."""

    @abstractmethod
    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """Solve for ``b`` (``[batch, dim]``), starting from ``x0`` or zero. Records no gradients.

        A sample whose ``b`` is not finite gets NaN and does not affect the others.

        Raises:
            ValueError: ``b`` or ``x0`` does not fit the operator.
        """

    def init(self) -> LinearSolver:
        """Return the same solver with a memory for what it derives from an operator (a factorization, a
        preconditioner).

        For the two systems of one point, :math:`A` and :math:`A^T`, or for a sequence of nearby ones. A solver that
        derives nothing returns itself.
        """
        return self

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """The ``(rtol, atol)`` in force for right-hand sides of ``dtype``."""
        return default_rtol(dtype), 0.0

    def joined(self, operator: LinearOperator, joined: LinearOperator) -> LinearSolver:
        """The solver for the samples of ``operator`` as one system, whose operator is ``joined``."""
        return self

    @property
    def confirms(self) -> bool:
        """True if the residuals in its report are confirmed by a product of the whole operator."""
        return False

    @property
    def preconditioned(self) -> bool:
        """True if it has a preconditioner, which approximates the operator in the problem's own units."""
        return False

    @property
    def truncated(self) -> bool:
        """True if it takes a prescribed number of steps, regardless of the residual."""
        return False

    @property
    def by_spectrum(self) -> bool:
        """True if it converges only where the operator's eigenvalues lie in a certain region."""
        return False


class BlockSolver(LinearSolver):
    """A solver that is faster when it solves for several right-hand sides together."""

    @abstractmethod
    def solve_block(self, operator: LinearOperator, b: Tensor) -> LinearSolution:
        """Solve for a block ``[k, batch, dim]``, each right-hand side to its own tolerance.

        The report's figures are the worst over the k; its evaluations count products with single vectors.
        """


def solve_each(solver: LinearSolver, operator: LinearOperator, b: Tensor) -> LinearSolution:
    """Solve for a block ``[k, batch, dim]``, one right-hand side after another; see :meth:`BlockSolver.solve_block`."""
    solutions = [solver.solve(operator, one) for one in b]
    reports = [solution.report for solution in solutions]
    figures = Report(
        torch.stack([report.status for report in reports]).amax(0),  # statuses are ordered from good to bad
        torch.stack([report.steps for report in reports]).amax(0),
        torch.stack([report.residual for report in reports]).amax(0),
        sum(report.evaluations for report in reports),
        curvature=least_curvature([report.curvature for report in reports]),
        condition=largest([report.condition for report in reports]),
    )
    return LinearSolution(torch.stack([one.value for one in solutions]), figures, any(one.strayed for one in solutions))


def largest(figures: Sequence[Tensor | None]) -> Tensor | None:
    """The largest of the figures of several right-hand sides; ``None`` if one of them is unknown."""
    known = [one for one in figures if one is not None]
    return None if len(known) < len(figures) else torch.stack(known).amax(0)


def least_curvature(figures: Sequence[Tensor | None]) -> Tensor | None:
    """The smallest curvature over several right-hand sides, NaN where none was negative; ``None`` if one is unknown."""
    known = [one for one in figures if one is not None]
    if len(known) < len(figures):
        return None
    least = torch.stack(known).nan_to_num(nan=torch.inf).amin(0)
    return least.masked_fill(least == torch.inf, torch.nan)
