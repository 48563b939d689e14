"""A system with a multiple of the identity added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from torchimplicit.linear.base import BlockSolver, LinearSolution, LinearSolver, solve_any
from torchimplicit.linear.operator import LinearOperator


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Shifted(BlockSolver):
    """Solves :math:`(A_i + s_i I)\\,y_i = b_i`, on the complement of the operator's null vector.

    Args:
        solver: of the shifted systems.
        shift: s, ``[batch]``.
    """

    solver: LinearSolver
    shift: Tensor

    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        return self.solver.solve(operator.shifted(self.shift), b, x0)

    def solve_block(self, operator: LinearOperator, b: Tensor) -> LinearSolution:
        return solve_any(self.solver, operator.shifted(self.shift), b)
