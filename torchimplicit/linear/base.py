"""What every linear solver takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from torchimplicit.linear.operator import LinearOperator
from torchimplicit.solution import Report


@dataclass(frozen=True)
class LinearSolution:
    """The solution of a batch of linear systems.

    Attributes:
        value: ``[batch, dim]``.
        report: the figures; ``report.evaluations`` counts products in whole-batch equivalents.
    """

    value: Tensor
    report: Report


class LinearSolver(ABC):
    """Solves :math:`A_i y_i = b_i` for a batch of operators, every sample to its own tolerance."""

    @abstractmethod
    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """Solve for ``b`` (``[batch, dim]``), from ``x0`` or zero. Runs without recording gradients."""
